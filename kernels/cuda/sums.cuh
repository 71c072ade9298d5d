// What a thread gathers over its columns and a team combines over a row.
#pragma once

#include "../shared/row.h"
#include "math.cuh"
#include "team.cuh"

namespace gkd {

constexpr float kLowest = -3.40282347e+38f;  // finite, so that a row of nothing but -inf has the sum 0, not NaN

// The largest logit and the sum of e^((logit - largest) / temperature), in one pass; scale is log2(e) / temperature.
struct OnlineSum {
  float max, sum;

  GKD_DEVICE void clear() { max = kLowest, sum = 0.0f; }
  template <int kGroup>
  GKD_DEVICE void add(const float (&x)[kGroup], float scale) {
    float top = max, total = 0.0f;
#pragma unroll
    for (int i = 0; i < kGroup; ++i) top = fmaxf(top, x[i]);  // fmaxf passes over NaN, the sum does not
#pragma unroll
    for (int i = 0; i < kGroup; ++i) total += device::exp2((x[i] - top) * scale);
    sum = sum * device::exp2(lift(top, scale)) + total;
    max = top;
  }
  // What a sum is multiplied by to be relative to a larger logit, as an exponent of 2.
  GKD_DEVICE float lift(float top, float scale) const { return (max - top) * scale; }
  template <int kWidth>
  GKD_DEVICE void reduce_warp(float scale) {
    const float top = lanes_max<kWidth>(max);
    sum = lanes_sum<kWidth>(sum * device::exp2(lift(top, scale)));
    max = top;
  }
};

struct SoftmaxSums {
  static constexpr int kWords = 4;
  OnlineSum student, teacher;
  float scale;

  SoftmaxSums() = default;
  GKD_DEVICE explicit SoftmaxSums(float scale_) : scale(scale_) { clear(); }
  GKD_DEVICE void clear() { student.clear(), teacher.clear(); }
  template <int kWidth>
  GKD_DEVICE void reduce_warp() {
    student.reduce_warp<kWidth>(scale), teacher.reduce_warp<kWidth>(scale);
  }
  GKD_DEVICE uint32_t word(int i) const {
    return device::bits_of(i == 0 ? student.max : i == 1 ? student.sum : i == 2 ? teacher.max : teacher.sum);
  }
  GKD_DEVICE void set_word(int i, uint32_t bits) {
    (i == 0 ? student.max : i == 1 ? student.sum : i == 2 ? teacher.max : teacher.sum) = device::float_of(bits);
  }
};

// Sums over a row, by the index of enum Sum and, with extras, of ExtraSum.
template <int kCount_, bool kExtras>
struct RowSums {
  static constexpr int kCount = kCount_, kWords = kCount + (kExtras ? 1 : 0);
  float sum[kCount];
  uint32_t top1;  // the smallest 2 column + (the teacher has no largest logit there) of the student's largest logits

  GKD_DEVICE RowSums() { clear(); }
  GKD_DEVICE void clear() {
#pragma unroll
    for (int i = 0; i < kCount; ++i) sum[i] = 0.0f;
    top1 = 0xffffffffu;
  }
  template <int kWidth>
  GKD_DEVICE void reduce_warp() {
#pragma unroll
    for (int i = 0; i < kCount; ++i) sum[i] = lanes_sum<kWidth>(sum[i]);
    if constexpr (kExtras) top1 = lanes_min<kWidth>(top1);
  }
  GKD_DEVICE uint32_t word(int i) const { return i < kCount ? device::bits_of(sum[i < kCount ? i : 0]) : top1; }
  GKD_DEVICE void set_word(int i, uint32_t bits) {
    if (i < kCount) {
      sum[i < kCount ? i : 0] = device::float_of(bits);
    } else {
      top1 = bits;
    }
  }
  GKD_DEVICE float at(int i) const { return i < kCount ? sum[i < kCount ? i : 0] : 0.0f; }
};

}  // namespace gkd
