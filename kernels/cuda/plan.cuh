// How many blocks share a row: pure arithmetic, so that it can be tested without a device.
#pragma once

#include <stdexcept>
#include <string>

#include "kernel.cuh"

namespace gkd::cuda {

constexpr int kBlocksPerProcessor = 3;  // so that one loads while another computes and a third stores

struct Device {
  int index, processors, major, shared_per_processor, shared_per_block, reserved_per_block, l2_bytes;
};

struct Plan {
  int ranks;  // blocks of a row's team; 0: not on chip
  int slice;  // groups of a block
  int shared_bytes;
};

inline int pair_bytes(const Job<float>& job) { return logit_bytes(job.student) + logit_bytes(job.teacher); }

template <class Shape>
Plan plan_of(const Job<float>& job, int ranks) {
  const int slice = (groups_of(job.columns, Shape::kGroup) + ranks - 1) / ranks;
  const bool hopeless = Shape::kOnChip && slice > (1 << 20);  // and its bytes might overflow
  return {ranks, slice, hopeless ? 1 << 30 : Shape::shared_bytes(job, ranks, slice)};
}

// GKD_CUDA_RANKS, for tuning and tests: how many blocks share a row, 0 for rows from memory. -1 where it is not set.
inline int asked_ranks(const char* text) {
  if (!text || !*text) return -1;
  for (int ranks = 1; ranks <= kMaxCluster; ranks *= 2) {
    if (text == std::to_string(ranks)) return ranks;
  }
  if (text == std::string("0")) return 0;
  throw std::runtime_error(std::string("gkd: GKD_CUDA_RANKS must be 0, 1, 2, 4, 8 or 16, not ") + text);
}

template <class Shape>
Plan asked_plan(const Device& device, const Job<float>& job, int ranks) {
  if (ranks == 0) return {0, 0, 0};
  const Plan plan = plan_of<Shape>(job, ranks);
  const bool forms = ranks == 1 || device.major >= 9;
  if (forms && plan.shared_bytes <= device.shared_per_block) return plan;
  throw std::runtime_error("gkd: GKD_CUDA_RANKS is " + std::to_string(ranks) + ", but " +
                           (forms ? "a row of " + std::to_string(job.columns) + " columns does not fit into so many blocks"
                                  : "this GPU has no clusters of blocks"));
}

// The fewest blocks a row that leave room for kBlocksPerProcessor on a processor; failing that, the number of which
// the device holds most. resident(plan) is how many blocks it holds at once.
template <class Shape, class Resident>
Plan best_plan(const Device& device, const Job<float>& job, Resident&& resident) {
  Plan best{0, 0, 0};
  int most = 0;
  for (int ranks = 1; ranks <= (device.major >= 9 ? kMaxCluster : 1); ranks *= 2) {
    const Plan plan = plan_of<Shape>(job, ranks);
    if (plan.shared_bytes > device.shared_per_block) continue;
    const int blocks = resident(plan);
    const int bytes = plan.shared_bytes + device.reserved_per_block;
    const bool room = kBlocksPerProcessor * bytes <= device.shared_per_processor;
    if (room && blocks * 5 >= 4 * kBlocksPerProcessor * device.processors) return plan;  // clusters leave gaps
    if (blocks > most) best = plan, most = blocks;
  }
  return best;
}

// Blocks that go over the rows from memory: as many as half the cache holds rows for, but no processor idles.
inline int64_t memory_blocks(const Device& device, const Job<float>& job) {
  const int64_t cached = device.l2_bytes / 2 / (job.columns * pair_bytes(job));
  const int64_t blocks = cached > device.processors ? cached : device.processors;
  return blocks < job.rows ? blocks : job.rows;
}

// Whether the kernels for value and gradient at once do the job: half precision, and nothing of a row is given or kept.
inline bool is_whole(const Job<float>& job) {
  if (job.given_stats || job.given_sums || job.stats || job.sums || has_extras(job)) return false;
  return job.gradient.data && job.student.dtype == job.teacher.dtype;
}

// Visits the kernel for a job: visit(shape) with a Shape on chip.
template <template <class> class D, int kThreads, class Visitor>
auto with_shape(const Job<float>& job, Visitor&& visit) {
  using enum Dtype;
  using Form = typename HalfForm<D<CudaMath>>::Type;
  if constexpr (!std::is_void_v<Form>) {
    const auto is = [&](Dtype logits, Dtype gradient) {
      const bool dtypes = job.student.dtype == logits && job.gradient.dtype == gradient;
      return dtypes && is_whole(job) && Form::serves(job.parameter);
    };
    if (is(bfloat16, bfloat16)) return visit(WholeShape<D, bfloat16, bfloat16, kThreads>{});
    if (is(float16, float16)) return visit(WholeShape<D, float16, float16, kThreads>{});
    if (is(float16, float32)) return visit(WholeShape<D, float16, float32, kThreads>{});
  }
  if (has_extras(job)) return visit(Shape<D, 4, kThreads, true, true>{});
  if (has_float(job)) return visit(Shape<D, 4, kThreads, true, false>{});
  return visit(Shape<D, 8, kThreads, true, false>{});
}

}  // namespace gkd::cuda
