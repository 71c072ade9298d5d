// The row kernels of one divergence: kernels/building/kernels.py compiles this for each entry of the list in spec.h, with its
// GKD_NAME and GKD_STRUCT.
#include "launch.cuh"

#define GKD_RUN(name) GKD_PASTE(run_, name)
#define GKD_PASTE(a, b) a##b

namespace gkd::cuda {
void GKD_RUN(GKD_NAME)(const Job<float>& job, void* stream) { run_rows<GKD_STRUCT>(job, stream); }
}  // namespace gkd::cuda
