#include "launch.cuh"

namespace gkd::cuda {
void run_forward_kl(const Job<float>& job, void* stream) { run_rows<ForwardKl>(job, stream); }
}  // namespace gkd::cuda
