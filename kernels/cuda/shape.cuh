// What host and kernel agree on: which kernel, how many blocks share a row, how they use their shared memory.
#pragma once

#include "groups.cuh"
#include "sums.cuh"

namespace gkd {

// What the host works out once.
struct Launch {
  int64_t first_row, end_row;
  int ranks;       // blocks of a team, a power of 2 ...
  int rank_shift;  // ... and which
  int slice;       // groups of a block
  int stats_words, scratch_bytes;  // of shared memory: scratch of pass 1, and all that lies before the slices
  float temperature, inverse_temperature;
  float scale;  // of the gradient: the job's, over the temperature
};

template <class Shape>
Launch launch_of(const Job<float>& job, int ranks, int slice) {
  return {0,
          job.rows,
          ranks,
          __builtin_ctz(unsigned(ranks)),
          slice,
          Shape::stats_words(ranks),
          Shape::scratch_bytes(ranks),
          float(job.temperature),
          float(1 / job.temperature),
          float(job.scale / job.temperature)};
}

// The groups that a row can have, wherever it starts.
constexpr int groups_of(int64_t columns, int group) { return int((columns + 2 * (group - 1)) / group); }

// Of one side on chip, so that the other starts aligned.
GKD_INLINE constexpr int slice_bytes(int groups, int group_bytes) { return (groups * group_bytes + 15) / 16 * 16; }

inline bool has_float(const Job<float>& job) {
  return job.student.dtype == Dtype::float32 || job.teacher.dtype == Dtype::float32;
}
inline int logit_bytes(const Matrix& matrix) { return matrix.dtype == Dtype::float32 ? 4 : 2; }
inline bool has_extras(const Job<float>& job) { return job.byproducts || job.labels; }

// What the passes after the first need of a row: the statistics and what follows from them.
template <class M>
struct RowFacts {
  float stats[kStats];
  Row<M> logits;
};

// Which kernel: D the divergence, kExtras by-products and hard labels.
template <template <class> class D_, int kGroup_, int kThreads_, bool kOnChip_, bool kExtras_>
struct Shape {
  using D = D_<CudaMath>;
  static constexpr int kGroup = kGroup_, kThreads = kThreads_;
  static constexpr bool kOnChip = kOnChip_, kExtras = kExtras_;
  static constexpr bool kDtypesKnown = false;
  static constexpr Dtype kLogits{}, kGradient{};  // where they are
  using Sums = RowSums<kExtras ? int(kAllSums) : D::needs_sums ? int(kSums) : 1, kExtras>;
  // Of shared memory: in all, and before the slices.
  static int shared_bytes(const Job<float>& job, int ranks, int slice) {
    if (!kOnChip) return scratch_bytes(ranks);
    return scratch_bytes(ranks) + slice_bytes(slice, kGroup * logit_bytes(job.student)) +
           slice_bytes(slice, kGroup * logit_bytes(job.teacher));
  }
  static GKD_INLINE int scratch_bytes(int ranks) {
    return (4 * (stats_words(ranks) + sums_words(ranks)) + 15) / 16 * 16;
  }
  static GKD_INLINE int stats_words(int ranks) {
    return scratch_words(SoftmaxSums::kWords, kThreads, ranks) + int(sizeof(RowFacts<CudaMath>) / 4);
  }
  static GKD_INLINE int sums_words(int ranks) { return combine_words<Sums>(kThreads, ranks); }
};

}  // namespace gkd
