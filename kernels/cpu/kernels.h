// The kernels by instruction set. Each rows_*.cpp compiles rows.inc and topk.inc once, for one of them.
#pragma once

#include "../shared/job.h"
#include "../shared/topk.h"

namespace gkd {

// Each works through the rows [begin, end) of a job.
template <class S>
struct Kernels {
  void (*score_rows)(const Job<S>&, int64_t begin, int64_t end);
  void (*topk_log_probs)(const TopkLogProbs<S>&, int64_t begin, int64_t end);
  void (*topk_gradient)(const TopkGradient<S>&, int64_t begin, int64_t end);
};

namespace avx512 { extern const Kernels<float> float_kernels; }
namespace avx2 { extern const Kernels<float> float_kernels; }
namespace baseline {
extern const Kernels<float> float_kernels;
extern const Kernels<double> double_kernels;
}

}  // namespace gkd
