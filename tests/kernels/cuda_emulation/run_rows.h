// The row kernels on the emulated device, by what kernels/cuda/launch.cuh chooses on a real one.
#pragma once

#include "emulation.h"
#include "plan.cuh"
#include "topk.cuh"

namespace gkd::emulation {

constexpr int kThreads = 64;

struct Choice {
  int ranks;   // blocks a row; 0: not on chip
  int blocks;  // of the grid, when not on chip
  uint32_t seed;
};

template <class Shape>
std::string launch(const Job<float>& job, const Choice& choice) {
  const cuda::Plan plan = cuda::plan_of<Shape>(job, Shape::kOnChip ? choice.ranks : 1);
  const Launch launch = launch_of<Shape>(job, plan.ranks, plan.slice);
  const int64_t blocks = Shape::kOnChip ? job.rows * plan.ranks : choice.blocks;
  const Grid grid{blocks, kThreads, plan.ranks, plan.shared_bytes, choice.seed};
  return run(grid, [&] { score_rows_kernel<Shape>(job, launch); });
}

template <template <class> class D>
std::string run_rows(const Job<float>& job, const Choice& choice) {
  if (choice.ranks == 0) return launch<Shape<D, 4, kThreads, false, true>>(job, choice);
  return cuda::with_shape<D, kThreads>(job, [&](auto shape) { return launch<decltype(shape)>(job, choice); });
}

std::string run_rows(const Job<float>& job, const Choice& choice);

// By `blocks` blocks that take turns at the rows.
std::string run_topk_log_probs(const TopkLogProbs<float>& job, int blocks, uint32_t seed);
std::string run_topk_gradient(const TopkGradient<float>& job, int blocks, uint32_t seed);

}  // namespace gkd::emulation
