// The row kernels for AVX-512 F, BW, DQ and VL.
#define GKD_ISA avx512
#define GKD_FLOATS 16
#include "rows.inc"

namespace gkd::avx512 {
void run(const Job<float>& job, int64_t begin, int64_t end) { run_rows<FloatMath>(job, begin, end); }
}  // namespace gkd::avx512
