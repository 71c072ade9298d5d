// The CUDA half of the op. The CPU library, which is loaded first, defines its schema.
#include "../shared/op.h"

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>

#include "rows.h"
#include "topk.h"

namespace gkd {
namespace {

using Run = void (*)(const Job<float>&, void* stream);

Run run_of(Kind kind) {
#define GKD_KIND(name, Struct) \
  case Kind::name: return cuda::run_##name;
  switch (kind) {
    GKD_DIVERGENCES(GKD_KIND)
    case Kind::count: break;
  }
#undef GKD_KIND
  throw std::runtime_error("gkd::score_rows: an unknown kind");
}

void* current_stream(int32_t device) {
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device, &stream));
  return stream;
}

void score_rows(Tensor student, Tensor teacher, std::string kind, double parameter, double temperature, double scale,
                OptionalTensor alive, OptionalTensor row_scale, OptionalTensor labels, OptionalTensor hard_weight,
                OptionalTensor kl_weights, OptionalTensor given_stats, OptionalTensor given_sums, OptionalTensor stats,
                OptionalTensor sums, OptionalTensor value, OptionalTensor gradient, OptionalTensor byproducts) {
  const Arguments arguments{student,   teacher,     kind,       parameter,   temperature, scale, alive, row_scale, labels,
                            hard_weight, kl_weights, given_stats, given_sums, stats,      sums,  value, gradient,
                            byproducts};
  require(!arguments.is_double() && !(gradient && dtype_of(*gradient) == Dtype::float64),
          "on CUDA logits and gradient must be float16, bfloat16 or float32, not float64");
  const Job<float> job = arguments.job<float>();
  const int32_t device = student.get_device_index();
  const torch::stable::accelerator::DeviceGuard guard(device);
  run_of(job.kind)(job, current_stream(device));
}

void topk_log_probs(Tensor student, Tensor ids, double temperature, Tensor on_k, Tensor tail, Tensor logsumexp) {
  const TopkRows rows = topk_rows(student, ids, temperature);
  require(rows.student.dtype != Dtype::float64, "on CUDA logits must be float16, bfloat16 or float32, not float64");
  const int64_t n = rows.rows;
  const TopkLogProbs<float> job{rows, real_vector<float>(on_k, n * rows.slots), real_vector<float>(tail, n),
                                real_vector<float>(logsumexp, n)};
  const int32_t device = student.get_device_index();
  const torch::stable::accelerator::DeviceGuard guard(device);
  cuda::run_topk_log_probs(job, current_stream(device));
}

void topk_gradient(Tensor student, Tensor ids, double temperature, Tensor on_k, Tensor off_k, Tensor logsumexp,
                   Tensor gradient) {
  const TopkRows rows = topk_rows(student, ids, temperature);
  require(rows.student.dtype != Dtype::float64 && dtype_of(gradient) != Dtype::float64,
          "on CUDA logits and gradient must be float16, bfloat16 or float32, not float64");
  const int64_t n = rows.rows;
  const TopkGradient<float> job{rows, real_vector<float>(on_k, n * rows.slots), real_vector<float>(off_k, n),
                                real_vector<float>(logsumexp, n), matrix_of(gradient, n, rows.columns)};
  const int32_t device = student.get_device_index();
  const torch::stable::accelerator::DeviceGuard guard(device);
  cuda::run_topk_gradient(job, current_stream(device));
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(gkd, CUDA, m) {
  m.impl("score_rows", TORCH_BOX(&score_rows));
  m.impl("topk_log_probs", TORCH_BOX(&topk_log_probs));
  m.impl("topk_gradient", TORCH_BOX(&topk_gradient));
}

}  // namespace gkd
