// Value and gradient at once, in as few instructions a pair of logits as there can be: what `whole.cuh` does with a
// row's logits in half precision.
//
// Values are first order here: sums of P d, not of P (d + e^-d - 1), with an absolute error of about 3e-7 nat. A
// gradient's dtype rounds much more away, and it is taken from the same quantities as elsewhere. Exponents are in base
// 2 and relative to a whole number near the row's largest, so one product and sum, rounded once, gives an exponent, and
// logits of any size and shift do.
//
// A form is made, by one thread for all, from the sums of pass 1, and has
//   kCross   whether pass 1 finds the cross sum, too
//   kSums    whether a pass before the gradient's finds sums: add(s, t, sums) does, finish(sums) takes those of the row
//   kValue   whether the gradient's pass finds the value
//   gradient(s, t, value)   that of a column; adds to the value
//   value(sum)  the row's, from that sum if there is one
//   serves(parameter)  whether it is accurate enough for a divergence of that parameter
#pragma once

#include "running.cuh"

namespace gkd {

constexpr float kLn2 = CudaMath::kLn2;

// What exponents are relative to, and the sums of 2^exponent.
struct Exponents {
  float scale;  // log2(e) / temperature
  float student_reference, teacher_reference;
  float student_inverse_sum, teacher_inverse_sum;
  float log_sum_ratio;  // natural logarithm of the student's sum over the teacher's

  Exponents() = default;
  template <bool kCross>
  GKD_DEVICE Exponents(const BitSums<kCross>& sums, float scale_)
      : scale(scale_), student_reference(sums.student.reference), teacher_reference(sums.teacher.reference),
        student_inverse_sum(1.0f / sums.student.sum), teacher_inverse_sum(1.0f / sums.teacher.sum),
        log_sum_ratio(logf(sums.student.sum / sums.teacher.sum)) {}
  GKD_DEVICE float student(float logit) const { return device::fused(logit, scale, -student_reference); }
  GKD_DEVICE float teacher(float logit) const { return device::fused(logit, scale, -teacher_reference); }
};

// KL(P || Q) = sum P d + Q - P, each term >= 0; the difference is the gradient's. The sum of Q - P is 0 but for what
// the row's sums of exponentials are off by, and takes that out of the sum of P d.
struct HalfForwardKl {
  static constexpr bool kCross = false, kSums = false, kValue = true;
  Exponents row;
  float weight;

  static bool serves(double) { return true; }
  HalfForwardKl() = default;
  GKD_DEVICE HalfForwardKl(const BitSums<false>& sums, const Exponents& row_, const ForwardKl<CudaMath>&, float weight_)
      : row(row_), weight(weight_) {}
  GKD_DEVICE float gradient(float s, float t, float& value) const {
    const float x = row.student(s), y = row.teacher(t);
    const float q = device::product(device::exp2(x), row.student_inverse_sum);
    const float p = device::product(device::exp2(y), row.teacher_inverse_sum);
    const float difference = q - p, d = fmaxf(device::fused(y - x, kLn2, row.log_sum_ratio), -kFar);
    value += fmaxf(device::fused(p, d, difference), 0.0f);  // also where P is 0 and d is infinite
    return difference * weight;
  }
  GKD_DEVICE float value(float sum) const { return sum; }
};

// R = KL(Q || P) = sum Q l is known from pass 1, and the gradient is w Q (l - R), l = log Q/P. With exponents x and y,
// l - R is x - y less its mean over Q, in bits: the sums of exponentials drop out.
struct HalfReverseKl {
  static constexpr bool kCross = true, kSums = false, kValue = false;
  Exponents row;
  float kl, mean, factor;

  static bool serves(double) { return true; }
  HalfReverseKl() = default;
  GKD_DEVICE HalfReverseKl(const BitSums<true>& sums, const Exponents& row_, const ReverseKl<CudaMath>&, float weight)
      : row(row_), mean(sums.cross / sums.student.sum), factor(weight * row.student_inverse_sum * kLn2) {
    kl = kLn2 * mean - row.log_sum_ratio;
  }
  GKD_DEVICE float gradient(float s, float t, float&) const {
    const float x = row.student(s);
    const float lead = fmaxf(x - row.teacher(t), kLowest);  // -inf or NaN where Q is 0; finite otherwise
    return device::exp2(x) * factor * (lead - mean);
  }
  GKD_DEVICE float value(float) const { return fmaxf(kl, 0.0f); }
};

// With r = 2^-|d|, of the heavier of P and Q, H, and the lighter, L = H r:
//   log2 H/M = -log2(1 + w (r - 1)), w the weight of L;   log2 L/M = log2 H/M - |d|
//   value = beta sum P log P/M + (1 - beta) S,   S = sum Q log Q/M
//   gradient = (1 - beta) Q (log Q/M - S), where log2 Q/M = -log2(1 - beta + beta 2^d) will do
// Probabilities are times the student's sum of exponentials until the row's end.
struct HalfJsd {
  static constexpr bool kCross = false, kSums = true, kValue = false;
  static constexpr float kFarBits = 60.0f;
  Exponents row;
  float bits_ratio;  // of the two sums of exponentials, in bits
  float teacher_weight, student_weight, weight;
  float slope, level, jsd;

  // A value is in proportion to beta (1 - beta), and its error is not.
  static bool serves(double beta) { return beta >= 1.0 / 64 && beta <= 1 - 1.0 / 64; }
  HalfJsd() = default;
  GKD_DEVICE HalfJsd(const BitSums<false>&, const Exponents& row_, const Jsd<CudaMath>& divergence, float weight_)
      : row(row_), bits_ratio(row.log_sum_ratio * float(kLog2E)), student_weight(divergence.student_weight),
        weight(weight_) {
    teacher_weight = 1.0f - student_weight;
  }
  GKD_DEVICE void add(float s, float t, float& student_sum, float& teacher_sum) const {
    const float x = row.student(s), y = row.teacher(t) + bits_ratio;
    const float d = fminf(fmaxf(y - x, -kFarBits), kFarBits);  // NaN, of two impossible tokens, becomes finite
    const bool teacher_heavier = d > 0.0f;
    const float ratio = device::exp2(-fabsf(d)), heavy = device::exp2(fmaxf(x, y)), light = heavy * ratio;
    const float lighter_weight = teacher_heavier ? student_weight : teacher_weight;
    const float heavy_bits = -device::log2(device::fused(lighter_weight, ratio - 1.0f, 1.0f));
    const float heavy_term = heavy * heavy_bits, light_term = light * (heavy_bits - fabsf(d));
    student_sum += teacher_heavier ? light_term : heavy_term;
    teacher_sum += teacher_heavier ? heavy_term : light_term;
  }
  GKD_DEVICE void finish(float student_sum, float teacher_sum) {
    const float unit = row.student_inverse_sum * kLn2;
    const float student_kl = student_sum * unit, teacher_kl = teacher_sum * unit;
    jsd = fmaxf(teacher_weight * teacher_kl + student_weight * student_kl, 0.0f);
    const float factor = weight * student_weight * row.student_inverse_sum;
    slope = -factor * kLn2, level = -factor * student_kl;
  }
  GKD_DEVICE float gradient(float s, float t, float&) const {
    const float x = row.student(s), d = (row.teacher(t) + bits_ratio) - x;
    const float mixed_bits = device::log2(device::fused(teacher_weight, device::exp2(d), student_weight));
    return device::exp2(x) * device::fused(fminf(mixed_bits, kFarBits), slope, level);  // NaN is passed over, too
  }
  GKD_DEVICE float value(float) const { return jsd; }
};

// The form of a divergence that has one.
template <class D>
struct HalfForm {
  using Type = void;
};
template <>
struct HalfForm<ForwardKl<CudaMath>> {
  using Type = HalfForwardKl;
};
template <>
struct HalfForm<ReverseKl<CudaMath>> {
  using Type = HalfReverseKl;
};
template <>
struct HalfForm<Jsd<CudaMath>> {
  using Type = HalfJsd;
};

}  // namespace gkd
