// The kernels for any processor.
#define GKD_ISA baseline
#define GKD_FLOATS 4
#include "rows.inc"
#include "topk.inc"

namespace gkd::baseline {
const Kernels<float> float_kernels{run_rows<FloatMath>, run_topk_log_probs<FloatMath>, run_topk_gradient<FloatMath>};
const Kernels<double> double_kernels{run_rows<DoubleMath>, run_topk_log_probs<DoubleMath>,
                                     run_topk_gradient<DoubleMath>};
}  // namespace gkd::baseline
