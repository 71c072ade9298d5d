// From the statistics of a row to its probabilities.
#pragma once

#include "divergences.h"
#include "spec.h"

namespace gkd {

template <class M>
struct Row {
  using F = typename M::F;
  using S = typename M::S;
  S inverse_temperature, log2_scale;  // e^(x / T) = 2^(x log2_scale)
  S student_max, student_inverse_sum, student_log_sum;
  S teacher_max, teacher_inverse_sum, teacher_log_sum;
  S offset;  // log P - log Q is (teacher - student) / temperature + offset ...
  S student_origin, teacher_origin, origin_offset;  // ... and so of logits taken from their origins first

  Row() = default;
  // The stats are those of enum Stat, for the whole vocabulary.
  template <class Stats>
  GKD_INLINE Row(const Stats& stats, S inverse_temperature_)
      : inverse_temperature(inverse_temperature_), log2_scale(inverse_temperature_ * S(kLog2E)) {
    student_max = S(stats[kStudentMax]);
    teacher_max = S(stats[kTeacherMax]);
    student_inverse_sum = S(1 / stats[kStudentSum]);
    teacher_inverse_sum = S(1 / stats[kTeacherSum]);
    student_log_sum = M::log(S(stats[kStudentSum]));
    teacher_log_sum = M::log(S(stats[kTeacherSum]));
    const S lead = student_max - teacher_max, log_sum_ratio = M::log(S(stats[kStudentSum] / stats[kTeacherSum]));
    const bool near = lead <= S(kLead) && lead >= -S(kLead);
    offset = lead * inverse_temperature + log_sum_ratio;
    student_origin = near ? S(0) : student_max, teacher_origin = near ? S(0) : teacher_max;
    origin_offset = near ? offset : log_sum_ratio;
  }

  GKD_INLINE S student_logsumexp() const { return student_max * inverse_temperature + student_log_sum; }
  GKD_INLINE S teacher_logsumexp() const { return teacher_max * inverse_temperature + teacher_log_sum; }

  // A row that holds NaN or +inf or nothing but -inf has no distribution: everything about it is NaN.
  GKD_INLINE bool broken() const { return !((student_logsumexp() + teacher_logsumexp()) * S(0) == S(0)); }

  GKD_INLINE F student_exponent(F logit) const { return (logit - student_max) * inverse_temperature; }
  GKD_INLINE F teacher_exponent(F logit) const { return (logit - teacher_max) * inverse_temperature; }

  // From differences of raw logits, which are exact where the two are close (`kLead`). A difference of two
  // log-probabilities would carry the rounding of each.
  GKD_INLINE F log_ratio(F student, F teacher) const {
    return ((teacher - teacher_origin) - (student - student_origin)) * inverse_temperature + origin_offset;
  }

  GKD_INLINE Pair<M> pair(F student, F teacher) const {
    return {M::product(M::exp2_nonpositive(student - student_max, log2_scale), student_inverse_sum),
            M::product(M::exp2_nonpositive(teacher - teacher_max, log2_scale), teacher_inverse_sum),
            log_ratio(student, teacher)};
  }
};

}  // namespace gkd
