// What a row kernel is given, whatever the device.
#pragma once

#include <cstdint>

#include "spec.h"

namespace gkd {

struct Matrix {
  char* data = nullptr;
  Dtype dtype = Dtype::float32;
  int64_t row_stride = 0;  // in elements; columns are adjacent
};

// S is float, or double where the logits are. Every pointer may be null unless marked.
template <class S>
struct Job {
  Matrix student, teacher;  // required
  Matrix gradient;          // may be the student's own memory, also as a narrower dtype
  int64_t rows, columns, gradient_columns;  // gradient columns beyond `columns` get 0
  Kind kind;
  double parameter, temperature, scale;
  const bool* alive;
  const S* row_scale;      // multiplies the rows of the gradient
  const int64_t* labels;   // with hard_weight; negative: none
  const S* hard_weight;
  const S* kl_weights;     // [2, rows]: the forward and the reverse KL's, of mixed_kl and required there
  const S* given_stats;    // [rows, kStats]: skip the pass that finds them
  const S* given_sums;     // [rows, kSums]: likewise
  S* stats;                // [rows, kStats]
  S* sums;                 // [rows, kSums]
  S* value;                // [rows]
  S* byproducts;           // [kByproducts, rows]

  GKD_INLINE bool stats_only() const { return !(sums || value || byproducts || gradient.data); }
};

}  // namespace gkd
