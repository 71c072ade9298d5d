// What a teacher's top k needs of whole rows of the student's logits: two ops, and what their kernels are given.
#pragma once

#include <cstdint>

#include "job.h"

namespace gkd {

// Python's side: gkd/ops/native.py. `on_k` is [rows, slots] in both; a negative id is an empty slot, and no other may
// stand twice in a row.
#define GKD_TOPK_LOG_PROBS                                                                                     \
  "topk_log_probs(Tensor student, Tensor ids, float temperature, Tensor(a!) on_k, Tensor(b!) tail, "           \
  "Tensor(c!) logsumexp) -> ()"
#define GKD_TOPK_GRADIENT                                                                                      \
  "topk_gradient(Tensor student, Tensor ids, float temperature, Tensor on_k, Tensor off_k, Tensor logsumexp, " \
  "Tensor(a!) gradient) -> ()"

struct TopkRows {
  Matrix student;
  const int64_t* ids;  // [rows, slots]
  int64_t rows, columns, slots;
  double temperature;
};

// log Q on K, of everything off K, and the logsumexp of the logits over the temperature that both are relative to.
template <class S>
struct TopkLogProbs : TopkRows {
  S *on_k, *tail, *logsumexp;
};

// on_k in the columns of the ids, off_k e^(logit / temperature - logsumexp) in the others.
template <class S>
struct TopkGradient : TopkRows {
  const S *on_k, *off_k, *logsumexp;
  Matrix gradient;  // may be the student's own memory
};

}  // namespace gkd
