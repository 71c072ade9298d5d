// The arithmetic of a GPU: float, with 2^x and log2 x from the special-function units (2 units in the last place).
#pragma once

#include <cmath>

#include "../shared/divergences.h"
#include "../shared/series.h"
#include "device.cuh"

namespace gkd {

struct CudaMath {
  using S = float;
  using F = float;

  static constexpr float kLn2 = 0.693147181f;

  static GKD_INLINE F abs(F x) { return fabsf(x); }
  static GKD_INLINE F product(F a, S b) { return device::product(a, b); }
  // The units flush denormal numbers to 0.
  static GKD_INLINE F exp2_nonpositive(F x, S scale) { return device::exp2(x * scale); }

  // Near 0 from a series, relative to x; elsewhere 1e-6 of the result.
  static GKD_INLINE F expm1(F x) {
    const F near = x + x * x * series::expm1_tail(x);
    const F far = device::exp2(x * S(kLog2E)) - 1.0f;
    return abs(x) < 0.3465f ? near : far;
  }
  static GKD_INLINE F log1p(F y) {
    const F near = y + y * y * (y * series::log1p_tail(y) - 0.5f);
    const F far = device::log2(1.0f + y) * kLn2;
    return abs(y) < 0.333f ? near : far;
  }
  static GKD_INLINE F kl_curve(F x) { return x * x * series::kl_curve_over_square(x); }
  static GKD_INLINE F xlogx_curve(F y) { return series::xlogx_curve(y); }
  static GKD_INLINE S log(S x) { return logf(x); }  // once a row: exact at 1 and accurate near it
};

// In one instruction each: fmaxf and fminf also pass over NaN.
template <>
GKD_INLINE float at_least<CudaMath>(float x, float low) {
  return fmaxf(x, low);
}
template <>
GKD_INLINE float clamp<CudaMath>(float x) {
  return fmaxf(fminf(x, kFar), -kFar);
}

}  // namespace gkd
