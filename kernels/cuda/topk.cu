#include "topk.cuh"

#include "launch.cuh"
#include "topk.h"

namespace gkd::cuda {
namespace {

constexpr int kTopkThreads = 512;

template <class Job>
using Kernel = void (*)(Job);

template <class Job>
void start(Kernel<Job> kernel, const Job& job, int shared_bytes, void* stream) {
  if (job.rows == 0) return;
  if (job.columns >= (int64_t(1) << 30)) throw std::runtime_error("gkd: 2^30 columns or more");
  const Device device = current_device();
  if (shared_bytes > device.shared_per_block) {
    throw std::runtime_error("gkd: a vocabulary of " + std::to_string(job.columns) + " columns is too large for top k");
  }
  check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, device.shared_per_block),
        "asking for shared memory");
  const int64_t most = (int64_t(1) << 31) - 1;  // blocks of a grid
  const unsigned blocks = unsigned(job.rows < most ? job.rows : most);
  kernel<<<blocks, kTopkThreads, size_t(shared_bytes), static_cast<cudaStream_t>(stream)>>>(job);
  check(cudaGetLastError(), "launching");
}

}  // namespace

void run_topk_log_probs(const TopkLogProbs<float>& job, void* stream) {
  const bool wide = job.student.dtype != Dtype::float32;
  start<TopkLogProbs<float>>(
      wide ? topk_log_probs_kernel<8, kTopkThreads> : topk_log_probs_kernel<4, kTopkThreads>, job,
      topk_shared_bytes<kTopkThreads>(job.columns), stream);
}

void run_topk_gradient(const TopkGradient<float>& job, void* stream) {
  const bool wide = job.student.dtype != Dtype::float32;
  start<TopkGradient<float>>(wide ? topk_gradient_kernel<8, kTopkThreads> : topk_gradient_kernel<4, kTopkThreads>, job,
                             0, stream);
}

}  // namespace gkd::cuda
