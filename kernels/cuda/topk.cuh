// What a teacher's top k needs of whole rows, on a GPU: one pass for the student's log-probabilities, one for the
// gradient. A block takes a row; the blocks of the grid take turns.
#pragma once

#include <cmath>

#include "../shared/topk.h"
#include "groups.cuh"
#include "sums.cuh"

namespace gkd {

// A bit for each column of K. Thread t writes the words t, t + kThreads ...: nobody else's, so that none is lost.
template <int kThreads>
struct Marks {
  uint32_t* word;

  static GKD_INLINE int words(int64_t columns) { return int((columns + 31) / 32); }

  // Returns, to every thread alike, whether the row has any slot. Followed by a barrier before `has`.
  GKD_DEVICE bool read(const TopkRows& job, const int64_t* ids) {
    const int thread = device::thread_index();
    for (int i = thread; i < words(job.columns); i += kThreads) word[i] = 0;
    bool any = false;
    for (int64_t slot = 0; slot < job.slots; ++slot) {
      const int64_t id = ids[slot];
      if (id < 0 || id >= job.columns) continue;
      any = true;
      if (int(id / 32) % kThreads == thread) word[id / 32] |= 1u << (id % 32);
    }
    return any;
  }
  GKD_DEVICE bool has(int column) const { return word[column / 32] >> (column % 32) & 1u; }
};

// A row of logits as groups of columns, by the widest accesses where they are aligned.
template <int kGroup, int kThreads>
struct RowGroups {
  const Matrix& matrix;
  const char* row;
  Geometry<kGroup> geometry;

  GKD_DEVICE RowGroups(const Matrix& matrix_, int64_t row_, int64_t columns)
      : matrix(matrix_), row(row_of(matrix_, row_)),
        geometry(row, size_of(matrix_.dtype), int(columns), 0, int(columns) + kGroup) {}

  // visit(group, its logits) for the groups of this thread; -inf outside of the row.
  template <class Visitor>
  GKD_DEVICE void for_each(Visitor&& visit) const {
    const int size = size_of(matrix.dtype);
    const bool aligned = geometry.fits(row, size);
    for (int group = device::thread_index(); group < geometry.end; group += kThreads) {
      const char* from = row + int64_t(geometry.column(group)) * size;
      Group<kGroup> bits;
      if (aligned && geometry.whole(group)) {
        bits.load(from, matrix.dtype);
      } else {
        bits.gather(from, matrix.dtype, geometry, group);
      }
      float x[kGroup];
      bits.unpack(x, matrix.dtype);
      visit(group, x);
    }
  }
};

GKD_DEVICE float logit_at(const Matrix& matrix, int64_t row, int64_t column) {
  const char* from = row_of(matrix, row) + column * size_of(matrix.dtype);
  if (matrix.dtype == Dtype::float32) return device::load<float>(from);
  const uint32_t bits = device::load<uint16_t>(from);
  return matrix.dtype == Dtype::bfloat16 ? device::float_of(bits << 16) : device::from_float16(bits);
}

GKD_DEVICE void store_at(const Matrix& matrix, int64_t row, int64_t column, float x) {
  char* to = row_of(matrix, row) + column * size_of(matrix.dtype);
  if (matrix.dtype == Dtype::float32) {
    device::store(to, x);
  } else {
    device::store(to, uint16_t(pack(x, 0.0f, matrix.dtype)));
  }
}

// Of shared memory: the marks, and what `combine` needs.
template <int kThreads>
int topk_shared_bytes(int64_t columns) {
  return 4 * (Marks<kThreads>::words(columns) + combine_words<SoftmaxSums>(kThreads, 1));
}

// A tail of 1 - (the sum over K) would lose a small one, so it has a sum, and a maximum, of its own.
template <int kGroup, int kThreads>
GKD_DEVICE void find_topk_log_probs(const TopkLogProbs<float>& job, int64_t row, const Marks<kThreads>& marks,
                                    uint32_t* scratch) {
  const float scale = float(kLog2E / job.temperature);
  SoftmaxSums sums(scale);
  OnlineSum &off_k = sums.student, &on_k = sums.teacher;
  const RowGroups<kGroup, kThreads> groups(job.student, row, job.columns);
  groups.for_each([&](int group, float(&x)[kGroup]) {
    const int start = groups.geometry.column(group);
#pragma unroll
    for (int i = 0; i < kGroup; ++i) {
      const bool inside = start + i >= 0 && start + i < groups.geometry.columns;
      if (inside && marks.has(start + i)) x[i] = -INFINITY;
    }
    off_k.add(x, scale);
  });
  const int64_t* ids = job.ids + row * job.slots;
  const auto filled = [&](int64_t slot) { return 0 <= ids[slot] && ids[slot] < job.columns; };
  for (int64_t slot = device::thread_index(); slot < job.slots; slot += kThreads) {
    if (!filled(slot)) continue;
    const float x[1] = {logit_at(job.student, row, ids[slot])};
    on_k.add(x, scale);
  }
  Team<kThreads>{0, 1}.combine(sums, scratch);
  const float max = fmaxf(off_k.max, on_k.max);
  const float sum = off_k.sum * device::exp2((off_k.max - max) * scale) + on_k.sum * device::exp2((on_k.max - max) * scale);
  // Rounded before the others are made relative to it: they share what it is off by, and it drops out of the gradient.
  const float logsumexp = float(double(max) / job.temperature + log(double(sum)));
  const float broken = logsumexp * 0.0f;  // 0, or NaN
  for (int64_t slot = device::thread_index(); slot < job.slots; slot += kThreads) {
    float log_prob = -INFINITY;
    if (filled(slot)) {
      const double exponent = double(logit_at(job.student, row, ids[slot])) / job.temperature;
      log_prob = float(exponent - double(logsumexp)) + broken;
    }
    job.on_k[row * job.slots + slot] = log_prob;
  }
  if (device::thread_index() == 0) {
    const double log_tail = double(off_k.max) / job.temperature + log(double(off_k.sum));
    job.tail[row] = float(log_tail - double(logsumexp)) + broken;
    job.logsumexp[row] = logsumexp + broken;
  }
}

// A row without any token of K is not read.
template <int kGroup, int kThreads>
GKD_KERNEL(kThreads, 2)
topk_log_probs_kernel(const TopkLogProbs<float> job) {
  Marks<kThreads> marks{reinterpret_cast<uint32_t*>(device::shared_memory())};
  uint32_t* scratch = marks.word + Marks<kThreads>::words(job.columns);
  for (int64_t row = device::block_index(); row < job.rows; row += device::block_count()) {
    const bool any = marks.read(job, job.ids + row * job.slots);
    device::sync_block();
    if (any) {
      find_topk_log_probs<kGroup, kThreads>(job, row, marks, scratch);
      continue;
    }
    for (int64_t slot = device::thread_index(); slot < job.slots; slot += kThreads) {
      job.on_k[row * job.slots + slot] = -INFINITY;
    }
    if (device::thread_index() == 0) job.tail[row] = job.logsumexp[row] = 0.0f;
  }
}

// Every column as if it were off K, then those of K. Each thread reads a group before it writes it, so that the gradient
// may lie where the student does.
template <int kGroup, int kThreads>
GKD_DEVICE void write_topk_row(const TopkGradient<float>& job, int64_t row) {
  const float factor = job.off_k[row], logsumexp = job.logsumexp[row];
  const float inverse_temperature = float(1 / job.temperature);
  // Both may be large: the logits are taken relative to the one that the logsumexp is nearest to.
  const float origin = float(double(logsumexp) * job.temperature);
  const float rest = float(double(origin) / job.temperature - double(logsumexp));
  const int gradient_size = size_of(job.gradient.dtype);
  const RowGroups<kGroup, kThreads> groups(job.student, row, job.columns);
  char* gradient = row_of(job.gradient, row);
  const bool aligned = groups.geometry.fits(gradient, gradient_size);
  const auto write = [&](int group, const float(&x)[kGroup]) {
    char* to = gradient + int64_t(groups.geometry.column(group)) * gradient_size;
    if (aligned && groups.geometry.whole(group)) {
      store_group(to, job.gradient.dtype, x);
    } else {
      scatter(to, job.gradient.dtype, x, groups.geometry, group);
    }
  };
  if (factor != 0.0f && factor == factor) {
    groups.for_each([&](int group, float(&x)[kGroup]) {
#pragma unroll
      for (int i = 0; i < kGroup; ++i) {
        const float exponent = (x[i] - origin) * inverse_temperature + rest;
        x[i] = device::exp2(exponent * float(kLog2E)) * factor;
      }
      write(group, x);
    });
  } else {  // not read, whatever it holds
    float x[kGroup];
#pragma unroll
    for (int i = 0; i < kGroup; ++i) x[i] = factor;
    for (int group = device::thread_index(); group < groups.geometry.end; group += kThreads) write(group, x);
  }
  device::sync_block();
  const int64_t* ids = job.ids + row * job.slots;
  for (int64_t slot = device::thread_index(); slot < job.slots; slot += kThreads) {
    if (ids[slot] < 0 || ids[slot] >= job.columns) continue;
    store_at(job.gradient, row, ids[slot], job.on_k[row * job.slots + slot]);
  }
}

template <int kGroup, int kThreads>
GKD_KERNEL(kThreads, 2)
topk_gradient_kernel(const TopkGradient<float> job) {
  for (int64_t row = device::block_index(); row < job.rows; row += device::block_count()) {
    write_topk_row<kGroup, kThreads>(job, row);
  }
}

}  // namespace gkd
