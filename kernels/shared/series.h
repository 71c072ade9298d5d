// Polynomials for float, in Horner's form; errors are relative, found by a minimax fit, before rounding.
#pragma once

#include "spec.h"

namespace gkd::series {

// 2^f on |f| <= 1/2: 2e-9.
template <class F>
GKD_INLINE F exp2_fraction(F f) {
  F p = f * 0.000154780224f + 0.00134004315f;
  p = p * f + 0.00961799454f;
  p = p * f + 0.0555032715f;
  p = p * f + 0.240226522f;
  p = p * f + 0.693147182f;
  return p * f + 1.0f;
}

// (e^r - 1 - r) / r^2 on |r| <= ln(2)/2: 3e-10 of e^r - 1.
template <class F>
GKD_INLINE F expm1_tail(F r) {
  F p = r * 0.000199141665f + 0.0013941006f;
  p = p * r + 0.00833327323f;
  p = p * r + 0.041666355f;
  p = p * r + 0.166666672f;
  return p * r + 0.5f;
}

// (log(1 + f) - f + f^2/2) / f^3 on |f| <= 1/3: 5e-9 of log(1 + f).
template <class F>
GKD_INLINE F log1p_tail(F f) {
  F p = f * -0.131917357f + 0.139624208f;
  p = p * f - 0.121151082f;
  p = p * f + 0.140109256f;
  p = p * f - 0.166854665f;
  p = p * f + 0.200100437f;
  p = p * f - 0.249996886f;
  return p * f + 0.333332241f;
}

// (x + e^-x - 1) / x^2 on |x| <= kNearLogRatio: 3e-8.
template <class F>
GKD_INLINE F kl_curve_over_square(F x) {
  F p = x * -0.000199795075f + 0.00139821961f;
  p = p * x - 0.00833312795f;
  p = p * x + 0.0416657925f;
  p = p * x - 0.166666672f;
  return p * x + 0.5f;
}

// ((1 + y) log(1 + y) - y) / y^2 on |y| <= kNearRatio: 3e-8.
template <class F>
GKD_INLINE F xlogx_curve(F y) {
  F p = y * 0.0195298214f - 0.0254128277f;
  p = p * y + 0.0332561135f;
  p = p * y - 0.0499489941f;
  p = p * y + 0.0833345056f;
  p = p * y - 0.166667074f;
  return p * y + 0.5f;
}

}  // namespace gkd::series
