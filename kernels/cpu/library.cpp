// The CPU's half of the op: schema, choice of the instruction set, threads over the rows.
#include <cstdlib>
#include <string>

#include "../shared/op.h"
#include "rows.h"

namespace gkd {
namespace {

RunFloat widest() {
  const char* asked = std::getenv("GKD_CPU_ISA");  // baseline, avx2 or avx512: for tests
  const std::string at_most = asked ? asked : "avx512";
#if defined(__x86_64__)
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  if (avx512 && at_most == "avx512") return avx512::run;
  if (avx2 && at_most != "baseline") return avx2::run;
#endif
  return baseline::run;
}

template <class S, class Run>
void run_threads(const Job<S>& job, Run run) {
  torch::stable::parallel_for(0, job.rows, 1, [&](int64_t begin, int64_t end) { run(job, begin, end); });
}

void score_rows(Tensor student, Tensor teacher, int64_t kind, double parameter, double temperature, double scale,
                OptionalTensor alive, OptionalTensor row_scale, OptionalTensor labels, OptionalTensor hard_weight,
                OptionalTensor given_stats, OptionalTensor given_sums, OptionalTensor stats, OptionalTensor sums,
                OptionalTensor value, OptionalTensor gradient, OptionalTensor byproducts) {
  const Arguments arguments{student,     teacher,    kind,  parameter, temperature, scale,    alive,     row_scale, labels,
                            hard_weight, given_stats, given_sums, stats, sums,      value,       gradient, byproducts};
  static const RunFloat run_float = widest();
  if (arguments.is_double()) {
    run_threads(arguments.job<double>(), static_cast<void (*)(const Job<double>&, int64_t, int64_t)>(baseline::run));
  } else {
    run_threads(arguments.job<float>(), run_float);
  }
}

}  // namespace

STABLE_TORCH_LIBRARY(gkd, m) { m.def(GKD_SCORE_ROWS); }
STABLE_TORCH_LIBRARY_IMPL(gkd, CPU, m) { m.impl("score_rows", TORCH_BOX(&score_rows)); }

}  // namespace gkd
