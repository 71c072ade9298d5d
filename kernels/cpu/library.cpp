// The CPU's half of the ops: schemas, choice of the instruction set, threads over the rows.
#include <cstdlib>
#include <string>

#include "../shared/op.h"
#include "kernels.h"

namespace gkd {
namespace {

const Kernels<float>& widest() {
  const char* asked = std::getenv("GKD_CPU_ISA");  // baseline, avx2 or avx512: for tests
  const std::string at_most = asked ? asked : "avx512";
#if defined(__x86_64__)
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  if (avx512 && at_most == "avx512") return avx512::float_kernels;
  if (avx2 && at_most != "baseline") return avx2::float_kernels;
#endif
  return baseline::float_kernels;
}

template <class S>
const Kernels<S>& kernels() {
  if constexpr (sizeof(S) == 8) {
    return baseline::double_kernels;
  } else {
    static const Kernels<float>& chosen = widest();
    return chosen;
  }
}

std::string kinds() { return kKindNames; }

template <class Rows, class Run>
void run_threads(const Rows& job, Run run) {
  torch::stable::parallel_for(0, job.rows, 1, [&](int64_t begin, int64_t end) { run(job, begin, end); });
}

void score_rows(Tensor student, Tensor teacher, std::string kind, double parameter, double temperature, double scale,
                OptionalTensor alive, OptionalTensor row_scale, OptionalTensor labels, OptionalTensor hard_weight,
                OptionalTensor kl_weights, OptionalTensor given_stats, OptionalTensor given_sums, OptionalTensor stats,
                OptionalTensor sums, OptionalTensor value, OptionalTensor gradient, OptionalTensor byproducts) {
  const Arguments arguments{student,   teacher,     kind,       parameter,   temperature, scale, alive, row_scale, labels,
                            hard_weight, kl_weights, given_stats, given_sums, stats,      sums,  value, gradient,
                            byproducts};
  if (arguments.is_double()) {
    run_threads(arguments.job<double>(), kernels<double>().score_rows);
  } else {
    run_threads(arguments.job<float>(), kernels<float>().score_rows);
  }
}

template <class S>
void find_log_probs(const TopkRows& rows, const Tensor& on_k, const Tensor& tail, const Tensor& logsumexp) {
  const int64_t n = rows.rows;
  const TopkLogProbs<S> job{rows, real_vector<S>(on_k, n * rows.slots), real_vector<S>(tail, n),
                            real_vector<S>(logsumexp, n)};
  run_threads(job, kernels<S>().topk_log_probs);
}

void topk_log_probs(Tensor student, Tensor ids, double temperature, Tensor on_k, Tensor tail, Tensor logsumexp) {
  const TopkRows rows = topk_rows(student, ids, temperature);
  if (rows.student.dtype == Dtype::float64) {
    find_log_probs<double>(rows, on_k, tail, logsumexp);
  } else {
    find_log_probs<float>(rows, on_k, tail, logsumexp);
  }
}

template <class S>
void write_gradient(const TopkRows& rows, const Tensor& on_k, const Tensor& off_k, const Tensor& logsumexp,
                    const Tensor& gradient) {
  const int64_t n = rows.rows;
  const TopkGradient<S> job{rows, real_vector<S>(on_k, n * rows.slots), real_vector<S>(off_k, n),
                            real_vector<S>(logsumexp, n), matrix_of(gradient, n, rows.columns)};
  run_threads(job, kernels<S>().topk_gradient);
}

void topk_gradient(Tensor student, Tensor ids, double temperature, Tensor on_k, Tensor off_k, Tensor logsumexp,
                   Tensor gradient) {
  const TopkRows rows = topk_rows(student, ids, temperature);
  if (rows.student.dtype == Dtype::float64) {
    write_gradient<double>(rows, on_k, off_k, logsumexp, gradient);
  } else {
    write_gradient<float>(rows, on_k, off_k, logsumexp, gradient);
  }
}

}  // namespace

STABLE_TORCH_LIBRARY(gkd, m) {
  m.def(GKD_SCORE_ROWS);
  m.def(GKD_KINDS);
  m.def(GKD_TOPK_LOG_PROBS);
  m.def(GKD_TOPK_GRADIENT);
}
STABLE_TORCH_LIBRARY_IMPL(gkd, CompositeExplicitAutograd, m) { m.impl("kinds", TORCH_BOX(&kinds)); }
STABLE_TORCH_LIBRARY_IMPL(gkd, CPU, m) {
  m.impl("score_rows", TORCH_BOX(&score_rows));
  m.impl("topk_log_probs", TORCH_BOX(&topk_log_probs));
  m.impl("topk_gradient", TORCH_BOX(&topk_gradient));
}

}  // namespace gkd
