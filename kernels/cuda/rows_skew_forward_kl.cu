#include "launch.cuh"

namespace gkd::cuda {
void run_skew_forward_kl(const Job<float>& job, void* stream) { run_rows<SkewForwardKl>(job, stream); }
}  // namespace gkd::cuda
