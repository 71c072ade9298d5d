// The kernels for a teacher's top k.
#pragma once

#include "../shared/topk.h"

namespace gkd::cuda {

// On the current device and the stream (a cudaStream_t). Raise std::runtime_error.
void run_topk_log_probs(const TopkLogProbs<float>& job, void* stream);
void run_topk_gradient(const TopkGradient<float>& job, void* stream);

}  // namespace gkd::cuda
