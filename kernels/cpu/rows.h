// The row kernels by instruction set. cpu/rows.inc is compiled once for each.
#pragma once

#include "../shared/job.h"

namespace gkd {

// Scores the rows [begin, end) of the job. One definition for each instruction set.
using RunFloat = void (*)(const Job<float>&, int64_t begin, int64_t end);
namespace avx512 { void run(const Job<float>&, int64_t begin, int64_t end); }
namespace avx2 { void run(const Job<float>&, int64_t begin, int64_t end); }
namespace baseline {
void run(const Job<float>&, int64_t begin, int64_t end);
void run(const Job<double>&, int64_t begin, int64_t end);
}

}  // namespace gkd
