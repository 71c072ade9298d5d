// Every divergence, once, for all devices. The formulas with their sources: gkd/objectives/closed_forms.py.
//
// M is the arithmetic of a device (kernels/cpu/math.h, kernels/cuda/math.cuh):
//   M::S            the scalar, float or double;   M::F   what it computes on: a vector of S, or S itself
//   M::exp2_nonpositive(x, scale)  2^(x scale), 0 where that underflows
//   M::expm1(x)     e^x - 1 for |x| <= 90           M::log1p(y)   for y >= -1/2        M::abs(x)
//   M::kl_curve(x)  x + e^-x - 1 for |x| < kNearLogRatio, to full relative accuracy
//   M::xlogx_curve(y)  ((1+y) log(1+y) - y) / y^2 for |y| < kNearRatio, likewise
//   M::log(x)       of a scalar                     M::product(a, b)  rounded: never fused with what follows, so that
//                                                   equal probabilities have a difference of 0
//
// A divergence is made from its parameter, in double because 1 - parameter may be small (or from the row's coefficients:
// `divergence_of`), and has
//   value(pair)            its term of the row's sum
//   first(pair), second(pair)  terms of two more sums over the row, which its gradient or `total` needs (0 for none)
//   gradient(pair, first, second)  with respect to student_logits / temperature, given those two sums
//   needs_sums             whether there are such terms
//   total(value, second)   the row's divergence, from those two sums
//   kForwardKlSum, kReverseKlSum  the most accurate sum that is that KL: one of enum Sum, or of ExtraSum
// Adding one: a struct here and a line in spec.h's list, with its reference in gkd/objectives/closed_forms.py.
#pragma once

#include <type_traits>

#include "job.h"

namespace gkd {

template <class M>
struct Pair {
  using F = typename M::F;
  F student;    // Q
  F teacher;    // P
  F log_ratio;  // d = log P - log Q; +-inf where one of them is 0, NaN where both are -inf logits
};

// Comparisons with NaN are false, so a NaN log ratio (both sides impossible) comes out finite, and 0 times it is 0.
template <class M>
GKD_INLINE typename M::F at_least(typename M::F x, typename M::S low) {
  return x > low ? x : typename M::F{} + low;
}

template <class M>
GKD_INLINE typename M::F clamp(typename M::F x) {
  using F = typename M::F;
  const typename M::S far = kFar;
  F below = x < far ? x : F{} + far;
  return below > -far ? below : F{} - far;
}

// A term of KL(first || second): first (l + e^-l - 1) >= 0, l = log first/second. The sum over a row of first l alone
// has 2.5e-6 nat of absolute error; this form keeps its relative accuracy.
template <class M>
GKD_INLINE typename M::F kl_term(typename M::F first, typename M::F second, typename M::F l) {
  using F = typename M::F;
  using S = typename M::S;
  l = at_least<M>(l, -S(kFar));
  l = first > S(0) ? l : F{} - S(kFar);  // 0 * inf = 0
  const F near = first * M::kl_curve(l), far = first * l - first + second;
  return M::abs(l) < S(kNearLogRatio) ? near : far;
}

// The mixture w L + (1 - w) H of a heavier and a lighter side, w <= 1/2: accurate for w near 0, where taking it from
// the lighter side is not.
template <class M>
struct Mixture {
  using F = typename M::F;
  using S = typename M::S;
  F log_ratio;  // log L/H, within +-kFar
  F ratio;      // L/H - 1
  F to_heavy;   // log M/H
  F to_light;   // log M/L

  GKD_INLINE Mixture(F light_over_heavy, S light_weight) {
    log_ratio = clamp<M>(light_over_heavy);
    ratio = M::expm1(log_ratio);
    to_heavy = M::log1p(light_weight * ratio);
    to_light = to_heavy - log_ratio;
  }
};

// log M/P and log M/Q of M = w P + (1 - w) Q for any w in [0, 1].
template <class M>
struct LogMixture {
  using F = typename M::F;
  using S = typename M::S;
  F to_teacher, to_student;

  GKD_INLINE LogMixture(const Pair<M>& pair, S teacher_weight, S student_weight) {
    if (teacher_weight <= S(0.5)) {
      Mixture<M> mixture(pair.log_ratio, teacher_weight);
      to_teacher = mixture.to_light;
      to_student = mixture.to_heavy;
    } else {
      Mixture<M> mixture(-pair.log_ratio, student_weight);
      to_teacher = mixture.to_heavy;
      to_student = mixture.to_light;
    }
  }
};

// value * weight; a weight of 0 drops what is infinite, too.
template <class S>
GKD_INLINE S times(S value, S weight) {
  return weight == S(0) ? S(0) : value * weight;
}

// What most have in common.
struct Divergence {
  static constexpr int kForwardKlSum = kSumForwardKl, kReverseKlSum = kSumReverseKl;
  template <class S>
  GKD_INLINE S total(S value_sum, S) const {
    return value_sum;
  }
};

// Gradients of the general form g = u - Q sum(u), u = Q dD/dQ up to a multiple of Q.
template <class M, class D>
struct Centred : Divergence {
  using F = typename M::F;
  using S = typename M::S;
  static constexpr bool needs_sums = true;
  GKD_INLINE F first(const Pair<M>& pair) const { return static_cast<const D*>(this)->slope(pair); }
  GKD_INLINE F second(const Pair<M>&) const { return F{}; }
  GKD_INLINE F gradient(const Pair<M>& pair, S first_sum, S) const {
    return static_cast<const D*>(this)->slope(pair) - pair.student * first_sum;
  }
};

template <class M>
struct ForwardKl : Divergence {
  using F = typename M::F;
  using S = typename M::S;
  static constexpr int kForwardKlSum = kValue;
  static constexpr bool needs_sums = false;
  GKD_INLINE explicit ForwardKl(double) {}
  GKD_INLINE F value(const Pair<M>& pair) const { return kl_term<M>(pair.teacher, pair.student, pair.log_ratio); }
  GKD_INLINE F first(const Pair<M>&) const { return F{}; }
  GKD_INLINE F second(const Pair<M>&) const { return F{}; }
  GKD_INLINE F gradient(const Pair<M>& pair, S, S) const { return pair.student - pair.teacher; }
};

template <class M>
struct ReverseKl : Centred<M, ReverseKl<M>> {
  using F = typename M::F;
  using S = typename M::S;
  static constexpr int kReverseKlSum = kValue;
  GKD_INLINE explicit ReverseKl(double) {}
  GKD_INLINE F value(const Pair<M>& pair) const { return kl_term<M>(pair.student, pair.teacher, -pair.log_ratio); }
  // Only what is infinite is bounded: then the sum of the slopes is the divergence itself, wherever that is finite.
  GKD_INLINE F slope(const Pair<M>& pair) const {
    F l = pair.log_ratio;
    l = M::abs(l) < S(__builtin_huge_valf()) ? l : clamp<M>(l);
    return -pair.student * l;
  }
};

template <class M>
struct Jsd : Centred<M, Jsd<M>> {
  using F = typename M::F;
  using S = typename M::S;
  S student_weight, light;
  bool student_is_heavy;
  GKD_INLINE explicit Jsd(double beta) : student_weight(S(1 - beta)), student_is_heavy(beta <= 0.5) {
    light = S(student_is_heavy ? beta : 1 - beta);
  }
  GKD_INLINE Mixture<M> mixture(const Pair<M>& pair) const {
    return Mixture<M>(student_is_heavy ? pair.log_ratio : -pair.log_ratio, light);
  }
  // Per unit of H, with x = L/H - 1 and f(y) = (1 + y) log(1 + y) - y, the term is w f(x) - f(w x).
  GKD_INLINE F value(const Pair<M>& pair) const {
    Mixture<M> m = mixture(pair);
    F heavy = student_is_heavy ? pair.student : pair.teacher;
    F lighter = student_is_heavy ? pair.teacher : pair.student;
    F mixed = light * m.ratio;
    F near = heavy * m.ratio * m.ratio * light * (M::xlogx_curve(m.ratio) - light * M::xlogx_curve(mixed));
    F far = -light * lighter * m.to_light - (S(1) - light) * heavy * m.to_heavy;
    return M::abs(m.ratio) < S(kNearRatio) ? near : far;
  }
  GKD_INLINE F slope(const Pair<M>& pair) const {
    Mixture<M> m = mixture(pair);
    return -student_weight * pair.student * (student_is_heavy ? m.to_heavy : m.to_light);
  }
};

template <class M>
struct SkewForwardKl : Centred<M, SkewForwardKl<M>> {
  using F = typename M::F;
  using S = typename M::S;
  S teacher_weight, student_weight;
  GKD_INLINE explicit SkewForwardKl(double alpha) : teacher_weight(S(alpha)), student_weight(S(1 - alpha)) {}
  GKD_INLINE LogMixture<M> mixture(const Pair<M>& pair) const {
    return LogMixture<M>(pair, teacher_weight, student_weight);
  }
  GKD_INLINE F value(const Pair<M>& pair) const {
    F mixed = teacher_weight * pair.teacher + student_weight * pair.student;
    return kl_term<M>(pair.teacher, mixed, -mixture(pair).to_teacher);
  }
  GKD_INLINE F slope(const Pair<M>& pair) const {  // (1 - alpha) Q (1 - P/M)
    return -student_weight * pair.student * M::expm1(-mixture(pair).to_teacher);
  }
};

template <class M>
struct SkewReverseKl : Centred<M, SkewReverseKl<M>> {
  using F = typename M::F;
  using S = typename M::S;
  S teacher_weight, student_weight;
  GKD_INLINE explicit SkewReverseKl(double alpha) : teacher_weight(S(1 - alpha)), student_weight(S(alpha)) {}
  GKD_INLINE LogMixture<M> mixture(const Pair<M>& pair) const {
    return LogMixture<M>(pair, teacher_weight, student_weight);
  }
  GKD_INLINE F value(const Pair<M>& pair) const {
    F mixed = teacher_weight * pair.teacher + student_weight * pair.student;
    return kl_term<M>(pair.student, mixed, -mixture(pair).to_student);
  }
  GKD_INLINE F slope(const Pair<M>& pair) const {  // Q (log Q/M + alpha (1 - Q/M))
    F to_student = mixture(pair).to_student;
    return pair.student * (-student_weight * M::expm1(-to_student) - to_student);
  }
};

// With Q split into its mass above P and the rest, g = above sum(below) - below sum(above): u - Q sum(u) would cancel
// where the two hardly overlap.
template <class M>
struct TotalVariation : Divergence {
  using F = typename M::F;
  using S = typename M::S;
  static constexpr bool needs_sums = true;
  GKD_INLINE explicit TotalVariation(double) {}
  GKD_INLINE F value(const Pair<M>& pair) const { return S(0.5) * M::abs(pair.teacher - pair.student); }
  GKD_INLINE F first(const Pair<M>& pair) const { return share_above(pair) * pair.student; }
  GKD_INLINE F second(const Pair<M>& pair) const { return (S(1) - share_above(pair)) * pair.student; }
  GKD_INLINE F gradient(const Pair<M>& pair, S above_sum, S below_sum) const {
    F share = share_above(pair);
    return pair.student * (share * below_sum - (S(1) - share) * above_sum);
  }

 private:
  GKD_INLINE static F share_above(const Pair<M>& pair) {
    F half = F{} + S(0.5);
    return pair.log_ratio < S(0) ? F{} + S(1) : (pair.log_ratio > S(0) ? F{} : half);
  }
};

// Terms base (e^(w l) - 1) + w (base - other), l = log other/base, from the side that carries more weight.
template <class M>
struct Alpha : Centred<M, Alpha<M>> {
  using F = typename M::F;
  using S = typename M::S;
  S weight, value_scale, slope_scale;
  bool mirrored;
  GKD_INLINE explicit Alpha(double alpha)
      : value_scale(S(1 / (alpha * (alpha - 1)))), slope_scale(S(-1 / alpha)), mirrored(alpha > 0.5) {
    weight = S(mirrored ? 1 - alpha : alpha);
  }
  GKD_INLINE F value(const Pair<M>& pair) const {
    F l = log_ratio(pair), base = mirrored ? pair.teacher : pair.student;
    F other = mirrored ? pair.student : pair.teacher;
    F near = base * (M::kl_curve(-weight * l) - weight * M::kl_curve(-l));
    F far = base * M::expm1(tilt(l)) + weight * (base - other);
    return (M::abs(l) < S(kNearLogRatio) ? near : far) * value_scale;
  }
  GKD_INLINE F slope(const Pair<M>& pair) const {  // (Q - P^alpha Q^(1 - alpha)) / alpha
    F l = log_ratio(pair), base = mirrored ? pair.teacher : pair.student;
    F tilted = base * M::expm1(tilt(l));
    if (mirrored) {
      F difference = M::abs(l) < S(kNearLogRatio) ? -base * M::expm1(l) : base - pair.student;
      tilted = tilted + difference;
    }
    return tilted * slope_scale;
  }

 private:
  GKD_INLINE F log_ratio(const Pair<M>& pair) const { return mirrored ? -pair.log_ratio : pair.log_ratio; }
  // Not the log ratio itself is bounded: e^(-kFar w) is not small for a small w.
  GKD_INLINE F tilt(F l) const {
    F tilted = weight * l;
    return tilted < S(kFar) ? tilted : F{} + S(kFar);
  }
};

// a KL(P || Q) + b KL(Q || P), a and b the row's own: what two loss terms on the same row cost together.
template <class M>
struct MixedKl : Centred<M, MixedKl<M>> {
  using F = typename M::F;
  using S = typename M::S;
  static constexpr int kForwardKlSum = kValue, kReverseKlSum = kSecond;
  S forward_weight, reverse_weight;
  GKD_INLINE MixedKl(S forward_weight_, S reverse_weight_)
      : forward_weight(forward_weight_), reverse_weight(reverse_weight_) {}
  GKD_INLINE F value(const Pair<M>& pair) const { return ForwardKl<M>(0).value(pair); }
  GKD_INLINE F second(const Pair<M>& pair) const { return ReverseKl<M>(0).value(pair); }
  GKD_INLINE S total(S forward_kl, S reverse_kl) const {
    return times(forward_kl, forward_weight) + times(reverse_kl, reverse_weight);
  }
  GKD_INLINE F slope(const Pair<M>& pair) const {  // a (Q - P) + b Q (log Q - log P)
    return forward_weight * (pair.student - pair.teacher) + reverse_weight * ReverseKl<M>(0).slope(pair);
  }
};

// The divergence of a row.
template <class D, class S>
GKD_INLINE D divergence_of(const Job<S>& job, int64_t row) {
  if constexpr (std::is_constructible_v<D, double>) {
    return D(job.parameter);
  } else {
    return D(job.kl_weights[row], job.kl_weights[job.rows + row]);
  }
}

// Calls visit(divergence) with that of the row.
template <class M, class Visitor>
GKD_INLINE void dispatch(const Job<typename M::S>& job, int64_t row, Visitor&& visit) {
#define GKD_KIND(name, Struct) \
  case Kind::name: return visit(divergence_of<Struct<M>>(job, row));
  switch (job.kind) {
    GKD_DIVERGENCES(GKD_KIND)
    case Kind::count: return;
  }
#undef GKD_KIND
}

}  // namespace gkd
