#include "launch.cuh"

namespace gkd::cuda {
void run_jsd(const Job<float>& job, void* stream) { run_rows<Jsd>(job, stream); }
}  // namespace gkd::cuda
