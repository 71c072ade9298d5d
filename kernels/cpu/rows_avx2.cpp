// The row kernels for AVX2 and FMA.
#define GKD_ISA avx2
#define GKD_FLOATS 8
#include "rows.inc"

namespace gkd::avx2 {
void run(const Job<float>& job, int64_t begin, int64_t end) { run_rows<FloatMath>(job, begin, end); }
}  // namespace gkd::avx2
