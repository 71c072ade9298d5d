// The kernel: one row of student and teacher logits by one team of blocks.
//
// On chip, a cluster's blocks hold a slice of both rows each, loaded once:
//   1 stats     maxima and sums of exponentials, online, while the later parts of the slice are still under way
//   2 sums      the divergence, and what its gradient needs to know of the row
//   3 gradient  (the forward KL needs no sums, so there 2 and 3 are one pass)
// A thread computes on the columns that it copied itself, in every pass, so between passes only the row's statistics
// travel: warp, block, cluster. Without room on chip one block reads the row from memory in each pass.
//
// The gradient may lie where the student does, also as a narrower dtype that starts where the student's row starts. So
// nothing of a row is written before the whole team has the whole row on chip; from memory, a block goes up the row and
// writes a stretch when all its threads have read theirs, which is never behind what is written.
#pragma once

#include "slice.cuh"

namespace gkd {

// Zeros in the gradient's columns beyond the logits'.
template <int kThreads>
GKD_DEVICE void write_padding(const Job<float>& job, int64_t row, const Team<kThreads>& team) {
  if (job.gradient_columns <= job.columns) return;
  char* to = row_of(job.gradient, row);
  const int64_t size = size_of(job.gradient.dtype);
  fill_zero(to + job.columns * size, to + job.gradient_columns * size,
            int64_t(team.rank) * kThreads + device::thread_index(), int64_t(team.ranks) * kThreads);
}

template <class Shape>
struct RowWork {
  using M = CudaMath;
  using D = typename Shape::D;
  using Sums = typename Shape::Sums;
  static constexpr int kGroup = Shape::kGroup, kThreads = Shape::kThreads;
  static constexpr bool kOnChip = Shape::kOnChip, kExtras = Shape::kExtras;
  using Values = float[kGroup];

  const Job<float>& job;
  const Launch& launch;
  const int64_t row;
  const Team<kThreads> team;
  uint32_t *const stats_scratch, *const sums_scratch;
  const Slice<Shape> slice;
  float hard_weight = 0.0f, label_logit = 0.0f;

  GKD_DEVICE RowWork(const Job<float>& job_, const Launch& launch_, int64_t row_, int rank)
      : job(job_), launch(launch_), row(row_), team{rank, launch_.ranks},
        stats_scratch(reinterpret_cast<uint32_t*>(device::shared_memory())),
        sums_scratch(stats_scratch + launch.stats_words),
        slice(job, launch, row, rank, device::shared_memory() + launch.scratch_bytes) {
    if constexpr (kExtras) read_label();
  }

  // After the team has announced itself.
  GKD_DEVICE void run() {
    if constexpr (kOnChip) slice.load();
    const RowFacts<M> facts = find_facts();
    const Row<M>& logits = facts.logits;
    float stats[kStats];
    for (int i = 0; i < kStats; ++i) stats[i] = facts.stats[i];
    const D divergence = divergence_of<D>(job, row);
    Sums sums;
    const bool given = job.given_sums && !kExtras && !wants_cross();
    const bool fused = !D::needs_sums && !kExtras && !job.given_sums && job.gradient.data;
    if (fused) {
      if constexpr (!D::needs_sums && !kExtras) find_sums_and_gradient(sums, logits, divergence);
    } else if (!given && (!job.stats_only() || wants_cross())) {
      find_sums(sums, logits, divergence);
    }
    if (wants_cross()) stats[kCross] = cross(sums.at(kValue), stats, logits);
    take_given_sums(sums);
    if (!fused) write_gradient(sums, logits, divergence);
    if (first_thread()) write_rows(stats, sums, logits, divergence);
  }

 private:
  GKD_DEVICE bool first_thread() const { return team.rank == 0 && device::thread_index() == 0; }
  GKD_DEVICE void read(const Side<Shape>& from, int i, Values& x) const {
    Group<kGroup> bits;
    if (kOnChip) {
      bits.load(from.slot_of(i), from.dtype());
    } else if (from.aligned && slice.geometry.whole(slice.group_of(i))) {
      bits.load(from.address(i), from.dtype());
    } else {
      bits.gather(from.address(i), from.dtype(), slice.geometry, slice.group_of(i));
    }
    bits.unpack(x, from.dtype());
  }

  GKD_DEVICE RowFacts<M> find_facts() const {
    RowFacts<M> facts;
    if (job.given_stats) {
      if constexpr (kOnChip) device::wait_copies<0>();
      team.wait_for_start();
      team.arrive(), team.wait();  // the whole row is on chip
      for (int i = 0; i < kStats; ++i) facts.stats[i] = job.given_stats[row * kStats + i];
    } else {
      find_stats(facts.stats);
    }
    if (team.in_first_warp()) facts.logits = Row<M>(facts.stats, launch.inverse_temperature);
    team.share(facts, stats_scratch + scratch_words(SoftmaxSums::kWords, kThreads, team.ranks));
    return facts;
  }
  // For the first warp.
  GKD_DEVICE void find_stats(float (&stats)[kStats]) const {
    SoftmaxSums sums(launch.inverse_temperature * float(kLog2E));
    if constexpr (kOnChip) {
      add_stage<0>(sums);
    } else {
      add(sums, 0, slice.count);
    }
    team.wait_for_start();
    team.reduce(sums, stats_scratch);
    stats[kStudentMax] = sums.student.max, stats[kStudentSum] = sums.student.sum;
    stats[kTeacherMax] = sums.teacher.max, stats[kTeacherSum] = sums.teacher.sum, stats[kCross] = 0.0f;
  }
  template <int kStage>
  GKD_DEVICE void add_stage(SoftmaxSums& sums) const {
    device::wait_copies<kStages - 1 - kStage>();
    add(sums, slice.stage_first(kStage), slice.stage_end(kStage));
    if constexpr (kStage + 1 < kStages) add_stage<kStage + 1>(sums);
  }
  GKD_DEVICE void add(SoftmaxSums& sums, int first, int end) const {
    for (int i = first; i < end; ++i) {
      Values x;
      read(slice.student, i, x);
      sums.student.add(x, sums.scale);
      read(slice.teacher, i, x);
      sums.teacher.add(x, sums.scale);
    }
  }

  GKD_DEVICE void find_sums(Sums& sums, const Row<M>& logits, const D& divergence) const {
    for (int i = 0; i < slice.count; ++i) {
      Values s, t;
      read(slice.student, i, s), read(slice.teacher, i, t);
      add_group(sums, s, t, logits, divergence);
      if constexpr (kExtras) add_extras(sums, slice.group_of(i), s, t, logits);
    }
    team.combine(sums, sums_scratch);
  }
  GKD_DEVICE static void add_group(Sums& sums, const Values& s, const Values& t, const Row<M>& logits,
                                   const D& divergence) {
    float value = 0.0f, first = 0.0f, second = 0.0f;
#pragma unroll
    for (int i = 0; i < kGroup; ++i) {
      const Pair<M> pair = logits.pair(s[i], t[i]);
      value += divergence.value(pair);
      first += divergence.first(pair);
      second += divergence.second(pair);
    }
    sums.sum[kValue] += value;
    if constexpr (D::needs_sums) sums.sum[kFirst] += first, sums.sum[kSecond] += second;
  }
  GKD_DEVICE static float product(float probability, float factor) {  // 0 * inf = 0
    return probability > 0.0f ? probability * factor : 0.0f;
  }
  GKD_DEVICE bool wants_cross() const {
    return job.stats && (job.kind == Kind::forward_kl || job.kind == Kind::reverse_kl) && !job.given_stats;
  }
  // KL(first || second) of this row or shard is cross / (sum of first) + or - the log ratio's offset.
  GKD_DEVICE float cross(float kl, const float (&stats)[kStats], const Row<M>& logits) const {
    const bool forward = job.kind == Kind::forward_kl;
    const float sum = stats[forward ? kTeacherSum : kStudentSum], other = stats[forward ? kStudentSum : kTeacherSum];
    if (sum == 0.0f) return 0.0f;
    return other == 0.0f ? INFINITY : sum * (forward ? kl - logits.offset : kl + logits.offset);
  }
  GKD_DEVICE void add_extras(Sums& sums, int group, const Values& s, const Values& t, const Row<M>& logits) const {
    if (job.byproducts) {
#pragma unroll
      for (int i = 0; i < kGroup; ++i) add_byproducts(sums, slice.geometry.column(group) + i, s[i], t[i], logits);
    }
    if (hard_weight != 0.0f) {
#pragma unroll
      for (int i = 0; i < kGroup; ++i) {
        sums.sum[kSumHard] += M::exp2_nonpositive(s[i] - logits.student_max, float(kLog2E));
      }
    }
  }
  GKD_DEVICE static void add_byproducts(Sums& sums, int column, float s, float t, const Row<M>& logits) {
    const Pair<M> pair = logits.pair(s, t);
    if constexpr (D::kForwardKlSum >= kSums) sums.sum[kSumForwardKl] += product(pair.teacher, pair.log_ratio);
    if constexpr (D::kReverseKlSum >= kSums) sums.sum[kSumReverseKl] -= product(pair.student, pair.log_ratio);
    sums.sum[kSumStudentExponent] += product(pair.student, logits.student_exponent(s));
    sums.sum[kSumTeacherExponent] += product(pair.teacher, logits.teacher_exponent(t));
    const uint32_t key = 2 * uint32_t(column) + (t == logits.teacher_max ? 0 : 1);
    if (s == logits.student_max && key < sums.top1) sums.top1 = key;
  }
  GKD_DEVICE void take_given_sums(Sums& sums) const {
    if (!job.given_sums) return;
    for (int i = 0; i < kSums; ++i) {
      if (i < Sums::kCount) sums.set_word(i, device::bits_of(job.given_sums[row * kSums + i]));
    }
  }

  // The label's part, in the gradient that it is mixed into and in the value.
  GKD_DEVICE void read_label() {
    if (!job.labels || job.labels[row] < 0) return;
    hard_weight = job.hard_weight[row];
    label_logit = -INFINITY;
    if (hard_weight == 0.0f || !first_thread() || job.labels[row] >= slice.geometry.columns) return;
    const Dtype dtype = slice.student.dtype();
    const char* at = row_of(job.student, row) + job.labels[row] * size_of(dtype);
    if (dtype == Dtype::float32) {
      label_logit = device::load<float>(at);
    } else {
      const uint32_t bits = device::load<uint16_t>(at);
      label_logit = dtype == Dtype::bfloat16 ? device::float_of(bits << 16) : device::from_float16(bits);
    }
  }
  GKD_DEVICE float hard_logsumexp(const Sums& sums, const Row<M>& logits) const {
    return logits.student_max + M::log(sums.at(kSumHard));
  }
  GKD_DEVICE float row_scale() const { return job.row_scale ? job.row_scale[row] : 1.0f; }
  // Added to what a row without a distribution must not seem to have.
  GKD_DEVICE static float poison(const Row<M>& logits) { return logits.broken() ? NAN : 0.0f; }
  GKD_DEVICE float gradient_scale(const Row<M>& logits) const {
    return (1.0f - hard_weight) * row_scale() * launch.scale + poison(logits);
  }
  GKD_DEVICE void add_label(Values& gradient, int group, const Values& s, float logsumexp) const {
    const float weight = hard_weight * row_scale();
    const int64_t label = job.labels[row];
#pragma unroll
    for (int i = 0; i < kGroup; ++i) {
      gradient[i] += weight * M::exp2_nonpositive(s[i] - logsumexp, float(kLog2E));
      if (slice.geometry.column(group) + i == label) gradient[i] -= weight;
    }
  }
  GKD_DEVICE void write_gradient(const Sums& sums, const Row<M>& logits, const D& divergence) const {
    if (!job.gradient.data) return;
    const float first = sums.at(kFirst), second = sums.at(kSecond);
    const float logsumexp = kExtras ? hard_logsumexp(sums, logits) : 0.0f;
    write_groups(logits, [&](int group, const Values& s, const Values& t, float scale, Values& gradient) {
#pragma unroll
      for (int k = 0; k < kGroup; ++k) {
        gradient[k] = divergence.gradient(logits.pair(s[k], t[k]), first, second) * scale;
      }
      if (kExtras && hard_weight != 0.0f) add_label(gradient, group, s, logsumexp);
    });
  }
  GKD_DEVICE void find_sums_and_gradient(Sums& sums, const Row<M>& logits, const D& divergence) const {
    write_groups(logits, [&](int, const Values& s, const Values& t, float scale, Values& gradient) {
      float value = 0.0f;
#pragma unroll
      for (int k = 0; k < kGroup; ++k) {
        const Pair<M> pair = logits.pair(s[k], t[k]);
        value += divergence.value(pair);
        gradient[k] = divergence.gradient(pair, 0.0f, 0.0f) * scale;
      }
      sums.sum[kValue] += value;
    });
    team.combine(sums, sums_scratch);
  }
  // Writes what find(group, student, teacher, scale, gradient) finds.
  template <class Find>
  GKD_DEVICE void write_groups(const Row<M>& logits, Find&& find) const {
    const Output<Shape> to(job.gradient, row, slice);
    const float scale = gradient_scale(logits);
    for (int i = 0; i < (kOnChip ? slice.count : slice.iterations); ++i) {
      Values gradient;
      if (i < slice.count) {
        Values s, t;
        read(slice.student, i, s), read(slice.teacher, i, t);
        find(slice.group_of(i), s, t, scale, gradient);
      }
      if constexpr (!kOnChip) device::sync_block();  // the whole block has read its groups: their memory is free
      if (i >= slice.count) continue;
      if (to.is_wide(i, slice)) {
        store_group(to.address(i), to.dtype, gradient);
      } else {
        scatter(to.address(i), to.dtype, gradient, slice.geometry, slice.group_of(i));
      }
    }
    write_padding(job, row, team);
  }

  GKD_DEVICE void write_rows(const float (&stats)[kStats], const Sums& sums, const Row<M>& logits,
                             const D& divergence) const {
    const float poison = RowWork::poison(logits), summed = sums.at(kValue);
    const float value = (job.given_sums ? summed : divergence.total(summed, sums.at(kSecond))) + poison;
    for (int i = 0; job.stats && i < kStats; ++i) job.stats[row * kStats + i] = stats[i];
    if (job.sums) {
      float* out = job.sums + row * kSums;
      out[kValue] = value;
      out[kFirst] = (D::needs_sums ? sums.at(kFirst) : 0.0f) + poison;
      out[kSecond] = (D::needs_sums ? sums.at(kSecond) : 0.0f) + poison;
    }
    if (job.value) job.value[row] = mixed_value(value * float(job.scale), sums, logits) + poison;
    if constexpr (kExtras) {
      if (job.byproducts) write_byproducts(sums, logits, poison);
    }
  }
  GKD_DEVICE float mixed_value(float value, const Sums& sums, const Row<M>& logits) const {
    if (!kExtras || hard_weight == 0.0f) return value;
    const float hard = (hard_logsumexp(sums, logits) - label_logit) * hard_weight;
    return hard_weight == 1.0f ? hard : value * (1.0f - hard_weight) + hard;
  }
  GKD_DEVICE void write_byproducts(const Sums& sums, const Row<M>& logits, float poison) const {
    float* out = job.byproducts + row;
    const int64_t n = job.rows;
    out[kForwardKl * n] = sums.at(D::kForwardKlSum) + poison;
    out[kReverseKl * n] = sums.at(D::kReverseKlSum) + poison;
    out[kStudentEntropy * n] = logits.student_log_sum - sums.at(kSumStudentExponent) + poison;
    out[kTeacherEntropy * n] = logits.teacher_log_sum - sums.at(kSumTeacherExponent) + poison;
    out[kTop1Agreement * n] = (sums.top1 & 1 ? 0.0f : 1.0f) + poison;
  }
};

// A row of weight 0: nothing of it is read.
template <int kThreads>
GKD_DEVICE void ignore_row(const Job<float>& job, int64_t row, int rank, int ranks) {
  if (job.gradient.data) {
    char* to = row_of(job.gradient, row);
    fill_zero(to, to + job.gradient_columns * size_of(job.gradient.dtype),
              int64_t(rank) * kThreads + device::thread_index(), int64_t(ranks) * kThreads);
  }
  if (rank != 0 || device::thread_index() != 0) return;
  if (job.value) job.value[row] = 0.0f;
  for (int i = 0; job.stats && i < kStats; ++i) {
    job.stats[row * kStats + i] = i == kStudentSum || i == kTeacherSum ? 1.0f : 0.0f;
  }
  for (int i = 0; job.sums && i < kSums; ++i) job.sums[row * kSums + i] = 0.0f;
  for (int i = 0; job.byproducts && i < kByproducts; ++i) job.byproducts[i * job.rows + row] = 0.0f;
}

}  // namespace gkd
