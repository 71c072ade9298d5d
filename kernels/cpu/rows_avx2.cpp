// The kernels for AVX2 and FMA.
#define GKD_ISA avx2
#define GKD_FLOATS 8
#include "rows.inc"
#include "topk.inc"

namespace gkd::avx2 {
const Kernels<float> float_kernels{run_rows<FloatMath>, run_topk_log_probs<FloatMath>, run_topk_gradient<FloatMath>};
}  // namespace gkd::avx2
