#include "launch.cuh"

namespace gkd::cuda {
void run_alpha(const Job<float>& job, void* stream) { run_rows<Alpha>(job, stream); }
}  // namespace gkd::cuda
