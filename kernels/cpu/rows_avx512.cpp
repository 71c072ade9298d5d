// The kernels for AVX-512 F, BW, DQ and VL.
#define GKD_ISA avx512
#define GKD_FLOATS 16
#include "rows.inc"
#include "topk.inc"

namespace gkd::avx512 {
const Kernels<float> float_kernels{run_rows<FloatMath>, run_topk_log_probs<FloatMath>, run_topk_gradient<FloatMath>};
}  // namespace gkd::avx512
