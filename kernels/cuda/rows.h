// The row kernels by divergence: run_<kind>. Each is compiled by itself, from rows_kind.cu.
#pragma once

#include "../shared/job.h"

namespace gkd::cuda {

// Scores the rows of the job on the current device and the stream (a cudaStream_t). Raises std::runtime_error.
#define GKD_KIND(name, Struct) void run_##name(const Job<float>& job, void* stream);
GKD_DIVERGENCES(GKD_KIND)
#undef GKD_KIND

}  // namespace gkd::cuda
