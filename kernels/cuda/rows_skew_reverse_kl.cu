#include "launch.cuh"

namespace gkd::cuda {
void run_skew_reverse_kl(const Job<float>& job, void* stream) { run_rows<SkewReverseKl>(job, stream); }
}  // namespace gkd::cuda
