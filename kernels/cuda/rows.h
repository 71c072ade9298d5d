// The row kernels by divergence. Each is compiled in a file of its own: rows_<kind>.cu.
#pragma once

#include "../shared/job.h"

namespace gkd::cuda {

// Scores the rows of the job on the current device and the stream (a cudaStream_t). Raises std::runtime_error.
void run_forward_kl(const Job<float>& job, void* stream);
void run_reverse_kl(const Job<float>& job, void* stream);
void run_jsd(const Job<float>& job, void* stream);
void run_skew_forward_kl(const Job<float>& job, void* stream);
void run_skew_reverse_kl(const Job<float>& job, void* stream);
void run_tvd(const Job<float>& job, void* stream);
void run_alpha(const Job<float>& job, void* stream);

}  // namespace gkd::cuda
