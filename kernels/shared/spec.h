// What the kernels of every device agree on. Python's side of it is gkd/ops/native.py.
#pragma once

#include <cstdint>

#if defined(__CUDACC__)
#define GKD_INLINE __host__ __device__ __forceinline__
#else
#define GKD_INLINE inline __attribute__((always_inline))
#endif

namespace gkd {

// Every divergence that has kernels: the name that Python calls it by, and its struct in divergences.h. The only list:
// all that goes by kind is made from it, CUDA's object files by kernels/building/kernels.py, and Python asks the library for it.
#define GKD_DIVERGENCES(entry)          \
  entry(forward_kl, ForwardKl)          \
  entry(reverse_kl, ReverseKl)          \
  entry(jsd, Jsd)                       \
  entry(skew_forward_kl, SkewForwardKl) \
  entry(skew_reverse_kl, SkewReverseKl) \
  entry(tvd, TotalVariation)            \
  entry(alpha, Alpha)                   \
  entry(mixed_kl, MixedKl)

#define GKD_KIND(name, Struct) name,
enum class Kind : int64_t { GKD_DIVERGENCES(GKD_KIND) count };
#undef GKD_KIND

#define GKD_KIND(name, Struct) #name " "
constexpr char kKindNames[] = GKD_DIVERGENCES(GKD_KIND);  // in that order, a space after each
#undef GKD_KIND

enum class Dtype : int { float16, bfloat16, float32, float64 };

constexpr double kLog2E = 1.4426950408889634;

// Beyond a log ratio of 45 one probability is as good as 0 beside the other, in any dtype: e^-45 = 3e-20.
constexpr float kFar = 45.0f;
// Up to here a term that is second order in the log ratio comes from a series, beyond from its definition.
constexpr float kNearLogRatio = 0.5f;
constexpr float kNearRatio = 0.25f;
// Up to this difference of the two sides' largest logits, differences between the sides are taken as they are, which is
// exact where the two are close; beyond, each logit is taken from its side's largest first, which is where they matter.
constexpr float kLead = 16.0f;

// Columns of the `stats` of a row or of a shard of it. Maxima are those of the raw logits, sums those of
// e^((logit - maximum) / temperature). cross is, with x the logits over the temperature,
//   sum e^(x_teacher - max) (x_teacher - x_student) for the forward KL and, with the sides exchanged, for the reverse KL.
enum Stat { kStudentMax, kStudentSum, kTeacherMax, kTeacherSum, kCross, kStats };

// Columns of the `sums` of a row or of a shard of it: the divergence, and what its gradient needs to know of the row.
enum Sum { kValue, kFirst, kSecond, kSums };

// More sums over a row, for by-products and hard labels: P d and -Q d, d the log ratio of P to Q; Q x and P x, x the
// side's exponent; e^(student - largest) at temperature 1.
enum ExtraSum { kSumForwardKl = kSums, kSumReverseKl, kSumStudentExponent, kSumTeacherExponent, kSumHard, kAllSums };

// Columns of the by-products, in the order of gkd.objectives.BYPRODUCTS without "divergence".
enum Byproduct { kForwardKl, kReverseKl, kStudentEntropy, kTeacherEntropy, kTop1Agreement, kByproducts };

}  // namespace gkd
