#include "launch.cuh"

namespace gkd::cuda {
void run_reverse_kl(const Job<float>& job, void* stream) { run_rows<ReverseKl>(job, stream); }
}  // namespace gkd::cuda
