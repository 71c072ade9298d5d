#include "launch.cuh"

namespace gkd::cuda {
void run_tvd(const Job<float>& job, void* stream) { run_rows<TotalVariation>(job, stream); }
}  // namespace gkd::cuda
