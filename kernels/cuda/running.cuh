// Pass 1 over half-precision logits, in few instructions: sums of exponentials and, with them, a cross sum.
#pragma once

#include "shape.cuh"

namespace gkd {

// How logits become exponents of 2.
struct Scale {
  static constexpr float kRoomBits = 64.0f;
  float bits;  // log2(e) / temperature
  float room;  // the difference of two logits that is kRoomBits

  GKD_DEVICE explicit Scale(const Launch& launch)
      : bits(launch.inverse_temperature * float(kLog2E)), room(launch.temperature * (kRoomBits * CudaMath::kLn2)) {}
};

// 2^x for a whole number x <= 0; 0 where that is no normal number.
GKD_DEVICE float power_of_two(float x) { return device::float_of(uint32_t(fmaxf(x + 127.0f, 0.0f)) << 23); }

// The sum of 2^(logit scale - reference). The exponent is a product and a sum that are rounded once. The reference is a
// whole number, so that changing it is exact. It is not the largest exponent but one that a term may exceed by
// kRoomBits, so that a thread's first group sets it and it hardly ever moves.
struct BitSum {
  // Logits below do not move the reference, which would not be exact there, and count for nothing beside others. A row
  // that has no others is not usable.
  static constexpr float kLeast = -1e7f;
  float reference, sum;

  GKD_DEVICE void clear() { reference = kLowest, sum = 0.0f; }
  template <int kWidth>
  GKD_DEVICE float largest_reference() const {
    return lanes_max<kWidth>(reference);
  }
  template <int kWidth>
  GKD_DEVICE void reduce_warp() {
    const float top = largest_reference<kWidth>();
    sum = lanes_sum<kWidth>(sum * power_of_two(reference - top));
    reference = top;
  }
  // Whether there is a distribution, and exponents are exact enough.
  GKD_DEVICE bool usable() const { return sum > 0.0f && sum < INFINITY && fabsf(reference) < 1e7f; }
};

// A thread's way to it.
struct RunningSum {
  float reference, sum;
  float reach;  // the largest logit that the reference will do for

  GKD_DEVICE void clear() { reference = sum = 0.0f, reach = BitSum::kLeast; }
  GKD_DEVICE float exponent(float x, const Scale& scale) const { return device::fused(x, scale.bits, -reference); }
  // Makes the reference one for logits up to `top`, before any was added.
  GKD_DEVICE void begin(float top, const Scale& scale) {
    if (top > reach) reference = ceilf(top * scale.bits), reach = top + scale.room;
  }
  // The same later. Returns how far the reference moved.
  GKD_DEVICE float move(float top, const Scale& scale) {
    const float before = reference;
    begin(top, scale);
    sum *= power_of_two(before - reference);
    return reference - before;
  }
  GKD_DEVICE BitSum total() const { return {sum != 0.0f ? reference : kLowest, sum}; }
};

// Both sides' sums and, where it is wanted,
//   cross = sum 2^x (x - y),   x and y the exponents of student and teacher
// It is +inf or NaN where the teacher has a -inf that the student has not.
template <bool kCross>
struct BitSums {
  static constexpr int kWords = kCross ? 5 : 4;
  BitSum student, teacher;
  float cross;

  GKD_DEVICE void clear() { student.clear(), teacher.clear(), cross = 0.0f; }
  template <int kWidth>
  GKD_DEVICE void reduce_warp() {
    if constexpr (kCross) {
      const float by = student.reference - student.largest_reference<kWidth>();
      const float against = teacher.reference - teacher.largest_reference<kWidth>();
      cross = lanes_sum<kWidth>(power_of_two(by) * device::fused(by - against, student.sum, cross));
    }
    student.reduce_warp<kWidth>(), teacher.reduce_warp<kWidth>();
  }
  GKD_DEVICE float& at(int i) {
    if (i == 4) return cross;
    BitSum& side = i < 2 ? student : teacher;
    return i % 2 ? side.sum : side.reference;
  }
  GKD_DEVICE uint32_t word(int i) { return device::bits_of(at(i)); }
  GKD_DEVICE void set_word(int i, uint32_t bits) { at(i) = device::float_of(bits); }
  GKD_DEVICE bool usable() const {
    return student.usable() && teacher.usable() && (!kCross || fabsf(cross) < INFINITY);
  }
};

template <bool kCross>
struct RunningSums {
  RunningSum student, teacher;
  float cross;

  GKD_DEVICE void clear() { student.clear(), teacher.clear(), cross = 0.0f; }
  // Sets the references for the first logits, of which these are the largest.
  GKD_DEVICE void begin(float student_top, float teacher_top, const Scale& scale) {
    student.begin(student_top, scale), teacher.begin(teacher_top, scale);
  }
  template <int kGroup>
  GKD_DEVICE void add(const float (&s)[kGroup], float student_top, const float (&t)[kGroup], float teacher_top,
                      const Scale& scale) {
    if (student_top > student.reach || teacher_top > teacher.reach) move(student_top, teacher_top, scale);
    float student_sums[2] = {}, teacher_sums[2] = {}, crosses[2] = {};  // chains of additions half as long
#pragma unroll
    for (int i = 0; i < kGroup; ++i) {
      const float x = student.exponent(s[i], scale), y = teacher.exponent(t[i], scale), e = device::exp2(x);
      student_sums[i % 2] += e, teacher_sums[i % 2] += device::exp2(y);
      // -inf and NaN, where the student has no mass, become finite, and +inf stays
      if constexpr (kCross) crosses[i % 2] = device::fused(e, fmaxf(x - y, kLowest), crosses[i % 2]);
    }
    student.sum += student_sums[0] + student_sums[1], teacher.sum += teacher_sums[0] + teacher_sums[1];
    if constexpr (kCross) cross += crosses[0] + crosses[1];
  }
  GKD_DEVICE BitSums<kCross> total() const {
    return {student.total(), teacher.total(), student.sum != 0.0f ? cross : 0.0f};
  }

 private:
  // To a reference that is larger by k, all x become smaller by k; likewise all y.
  GKD_DEVICE void move(float student_top, float teacher_top, const Scale& scale) {
    const float sum = student.sum, by = student.move(student_top, scale);
    if constexpr (kCross) cross = (cross - by * sum) * power_of_two(-by);
    const float against = teacher.move(teacher_top, scale);
    if constexpr (kCross) cross += against * student.sum;
  }
};

}  // namespace gkd
