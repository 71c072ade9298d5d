// The row kernels for any processor.
#define GKD_ISA baseline
#define GKD_FLOATS 4
#include "rows.inc"

namespace gkd::baseline {
void run(const Job<float>& job, int64_t begin, int64_t end) { run_rows<FloatMath>(job, begin, end); }
void run(const Job<double>& job, int64_t begin, int64_t end) { run_rows<DoubleMath>(job, begin, end); }
}  // namespace gkd::baseline
