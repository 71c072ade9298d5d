#include "run_rows.h"

#include <algorithm>

namespace gkd::emulation {

std::string run_rows(const Job<float>& job, const Choice& choice) {
#if defined(__SANITIZE_THREAD__)  // the others differ from these in nothing that threads share
  constexpr auto checked = [](Kind kind) {
    return kind == Kind::forward_kl || kind == Kind::reverse_kl || kind == Kind::jsd || kind == Kind::mixed_kl;
  };
#else
  constexpr auto checked = [](Kind) { return true; };
#endif
#define GKD_KIND(name, Struct)                                                   \
  if constexpr (checked(Kind::name)) {                                           \
    if (job.kind == Kind::name) return run_rows<Struct>(job, choice);            \
  }
  GKD_DIVERGENCES(GKD_KIND)
#undef GKD_KIND
  return "an unknown kind";
}

std::string run_topk_log_probs(const TopkLogProbs<float>& job, int blocks, uint32_t seed) {
  const Grid grid{blocks, kThreads, 1, topk_shared_bytes<kThreads>(job.columns), seed};
  if (job.student.dtype == Dtype::float32) return run(grid, [&] { topk_log_probs_kernel<4, kThreads>(job); });
  return run(grid, [&] { topk_log_probs_kernel<8, kThreads>(job); });
}

std::string run_topk_gradient(const TopkGradient<float>& job, int blocks, uint32_t seed) {
  const Grid grid{blocks, kThreads, 1, 0, seed};
  if (job.student.dtype == Dtype::float32) return run(grid, [&] { topk_gradient_kernel<4, kThreads>(job); });
  return run(grid, [&] { topk_gradient_kernel<8, kThreads>(job); });
}

}  // namespace gkd::emulation

// For ctypes.
extern "C" const char* gkd_run_topk_log_probs(const gkd::TopkLogProbs<float>* job, int blocks, uint32_t seed) {
  static std::string error;
  error = gkd::emulation::run_topk_log_probs(*job, blocks, seed);
  return error.c_str();
}
extern "C" const char* gkd_run_topk_gradient(const gkd::TopkGradient<float>* job, int blocks, uint32_t seed) {
  static std::string error;
  error = gkd::emulation::run_topk_gradient(*job, blocks, seed);
  return error.c_str();
}
extern "C" const char* gkd_kinds() { return gkd::kKindNames; }
extern "C" int gkd_job_bytes() { return int(sizeof(gkd::Job<float>)); }
extern "C" const char* gkd_run_rows(const gkd::Job<float>* job, int ranks, int blocks, uint32_t seed) {
  static std::string error;
  error = gkd::emulation::run_rows(*job, {ranks, blocks, seed});
  return error.c_str();
}

// Whether a job is one for the kernels that find value and gradient at once.
extern "C" bool gkd_is_whole(const gkd::Job<float>* job) {
  using namespace gkd;
  bool whole = false;
#define GKD_KIND(name, Struct)                                                                      \
  if (job->kind == Kind::name) {                                                                    \
    whole = cuda::with_shape<Struct, 256>(*job, [](auto shape) { return decltype(shape)::kDtypesKnown; }); \
  }
  GKD_DIVERGENCES(GKD_KIND)
#undef GKD_KIND
  return whole;
}

// The plan for a device like that, with 256 threads a block of which a processor holds `blocks_per_processor` as far as
// registers go, and in a cluster in groups of `processors_per_gpc` processors; or as GKD_CUDA_RANKS = `asked` has it,
// unless that is null. Plan is 3 ints. Returns what went wrong, or an empty string.
extern "C" const char* gkd_plan(const gkd::Job<float>* job, const gkd::cuda::Device* device, int blocks_per_processor,
                                int processors_per_gpc, const char* asked, gkd::cuda::Plan* plan) {
  using namespace gkd;
  static std::string error;
  error.clear();
  const auto resident = [&](const cuda::Plan& plan) {
    const int room = device->shared_per_processor / (plan.shared_bytes + device->reserved_per_block);
    const int blocks = std::min(room, blocks_per_processor);
    const int in_gpc = blocks * processors_per_gpc / plan.ranks * plan.ranks;
    return in_gpc * (device->processors / processors_per_gpc);
  };
  try {
    const int ranks = cuda::asked_ranks(asked);
    *plan = cuda::with_shape<ForwardKl, 256>(*job, [&](auto shape) {
      using Chosen = decltype(shape);
      return ranks < 0 ? cuda::best_plan<Chosen>(*device, *job, resident)
                       : cuda::asked_plan<Chosen>(*device, *job, ranks);
    });
  } catch (const std::runtime_error& refused) {
    error = refused.what();
  }
  return error.c_str();
}
