// The op's arguments, from tensors to a Job: for every device, by the stable ABI.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/macros.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <stdexcept>
#include <string>

#include "job.h"
#include "topk.h"

namespace gkd {

using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;
using torch::headeronly::ScalarType;

// Everything that one call can compute; what is not given is not computed. Python checks and allocates
// (gkd/ops/native.py); here only what would write out of bounds is refused.
#define GKD_SCORE_ROWS                                                                                      \
  "score_rows(Tensor student, Tensor teacher, str kind, float parameter, float temperature, float scale, "  \
  "Tensor? alive, Tensor? row_scale, Tensor? labels, Tensor? hard_weight, Tensor? kl_weights, "             \
  "Tensor? given_stats, Tensor? given_sums, Tensor(a!)? stats, Tensor(b!)? sums, Tensor(c!)? value, "       \
  "Tensor(d!)? gradient, Tensor(e!)? byproducts) -> ()"

// kKindNames, for Python.
#define GKD_KINDS "kinds() -> str"

inline void require(bool condition, const char* what) {
  if (!condition) throw std::runtime_error(std::string("gkd::score_rows: ") + what);
}

inline Kind kind_of(const std::string& name) {
#define GKD_KIND(kind, Struct) \
  if (name == #kind) return Kind::kind;
  GKD_DIVERGENCES(GKD_KIND)
#undef GKD_KIND
  throw std::runtime_error("gkd::score_rows: no kernel of the name " + name);
}

inline Dtype dtype_of(const Tensor& tensor) {
  switch (tensor.scalar_type()) {
    case ScalarType::Half: return Dtype::float16;
    case ScalarType::BFloat16: return Dtype::bfloat16;
    case ScalarType::Float: return Dtype::float32;
    case ScalarType::Double: return Dtype::float64;
    default: throw std::runtime_error("gkd::score_rows: logits must be float16, bfloat16, float32 or float64");
  }
}

inline Matrix matrix_of(const Tensor& tensor, int64_t rows, int64_t columns) {
  require(tensor.dim() == 2 && tensor.size(0) == rows && tensor.size(1) >= columns, "a matrix of another shape");
  require(tensor.size(1) == 1 || tensor.stride(1) == 1, "columns must be adjacent");
  return {static_cast<char*>(tensor.data_ptr()), dtype_of(tensor), tensor.stride(0)};
}

// The memory of a contiguous tensor of `count` elements of T, or null.
template <class T>
T* vector_of(const OptionalTensor& tensor, int64_t count, ScalarType dtype) {
  if (!tensor) return nullptr;
  require(tensor->numel() == count && tensor->is_contiguous(), "a vector of another size or not contiguous");
  require(tensor->scalar_type() == dtype, "a vector of another dtype");
  return static_cast<T*>(tensor->data_ptr());
}

struct Arguments {
  Tensor student, teacher;
  std::string kind;
  double parameter, temperature, scale;
  OptionalTensor alive, row_scale, labels, hard_weight, kl_weights, given_stats, given_sums, stats, sums, value,
      gradient, byproducts;

  bool is_double() const {
    return dtype_of(student) == Dtype::float64 || dtype_of(teacher) == Dtype::float64;
  }

  template <class S>
  Job<S> job() const {
    const ScalarType real = sizeof(S) == 8 ? ScalarType::Double : ScalarType::Float;
    const int64_t n = student.size(0), columns = student.size(1);
    require(columns > 0, "an empty vocabulary");
    Job<S> job{};
    job.student = matrix_of(student, n, columns);
    job.teacher = matrix_of(teacher, n, columns);
    job.rows = n, job.columns = columns;
    if (gradient) {
      job.gradient = matrix_of(*gradient, n, columns);
      job.gradient_columns = gradient->size(1);
    }
    job.kind = kind_of(kind), job.parameter = parameter, job.temperature = temperature, job.scale = scale;
    job.alive = vector_of<bool>(alive, n, ScalarType::Bool);
    job.row_scale = vector_of<S>(row_scale, n, real);
    job.labels = vector_of<int64_t>(labels, n, ScalarType::Long);
    job.hard_weight = vector_of<S>(hard_weight, n, real);
    require(!job.labels == !job.hard_weight, "labels and hard_weight belong together");
    job.kl_weights = vector_of<S>(kl_weights, 2 * n, real);
    require(kl_weights.has_value() == (job.kind == Kind::mixed_kl), "kl_weights belong to mixed_kl");
    require(!(given_sums && byproducts), "by-products need the pass that given sums save");
    job.given_stats = vector_of<S>(given_stats, n * kStats, real);
    job.given_sums = vector_of<S>(given_sums, n * kSums, real);
    job.stats = vector_of<S>(stats, n * kStats, real);
    job.sums = vector_of<S>(sums, n * kSums, real);
    job.value = vector_of<S>(value, n, real);
    job.byproducts = vector_of<S>(byproducts, n * kByproducts, real);
    return job;
  }
};

inline TopkRows topk_rows(const Tensor& student, const Tensor& ids, double temperature) {
  const int64_t rows = student.size(0), columns = student.size(1);
  require(columns > 0, "an empty vocabulary");
  require(ids.dim() == 2, "ids must be [rows, slots]");
  const int64_t slots = ids.size(1);
  const int64_t* memory = vector_of<int64_t>(ids, rows * slots, ScalarType::Long);
  return {matrix_of(student, rows, columns), memory, rows, columns, slots, temperature};
}

template <class S>
S* real_vector(const Tensor& tensor, int64_t count) {
  return vector_of<S>(tensor, count, sizeof(S) == 8 ? ScalarType::Double : ScalarType::Float);
}

}  // namespace gkd
