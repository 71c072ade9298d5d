// The blocks that own a row, a thread-block cluster or one block, and what they find together.
#pragma once

#include "../shared/spec.h"
#include "device.cuh"

namespace gkd {

constexpr int kMaxCluster = 16;

// Words of scratch that `combine` needs for values of `words` words.
GKD_INLINE constexpr int scratch_words(int words, int threads, int ranks) {
  return words * (threads / device::kWarp + (ranks > 1 ? ranks : 0));
}

template <int kThreads>
struct Team {
  static constexpr int kWarps = kThreads / device::kWarp;
  static_assert(kWarps <= device::kWarp && kMaxCluster <= device::kWarp);
  int rank, ranks;

  // A barrier of everybody, in two halves, to be called in turns.
  GKD_DEVICE void arrive() const {
    if (ranks > 1) device::cluster_arrive();
  }
  GKD_DEVICE void wait() const {
    if (ranks > 1) {
      device::cluster_wait();
    } else {
      device::sync_block();
    }
  }

  // Everybody's values reduced to one, which everybody gets; always in the same order. A Value is `kWords` words with
  //   clear()           becomes what changes no result
  //   reduce_warp()     the reduction over a warp, which every lane gets
  // Each call needs scratch of its own, and in a cluster that every block is known to have started.
  template <class Value>
  GKD_DEVICE void combine(Value& value, uint32_t* scratch) const {
    const int lane = device::thread_index() % device::kWarp, warp = device::thread_index() / device::kWarp;
    value.reduce_warp();
    if (lane == 0) put(value, scratch + warp * Value::kWords);
    device::sync_block();
    if (ranks == 1) {
      take(value, scratch, lane, kWarps);
      value.reduce_warp();
      return;
    }
    uint32_t* shares = scratch + kWarps * Value::kWords;
    if (warp == 0) {
      take(value, scratch, lane, kWarps);
      value.reduce_warp();
      if (lane < ranks) {
        for (int i = 0; i < Value::kWords; ++i) {
          device::store_remote(shares + rank * Value::kWords + i, lane, value.word(i));
        }
      }
    }
    arrive();
    wait();
    take(value, shares, lane, ranks);
    value.reduce_warp();
  }

 private:
  template <class Value>
  GKD_DEVICE static void put(const Value& value, uint32_t* to) {
    for (int i = 0; i < Value::kWords; ++i) to[i] = value.word(i);
  }
  template <class Value>
  GKD_DEVICE static void take(Value& value, const uint32_t* from, int index, int count) {
    value.clear();
    if (index >= count) return;
    for (int i = 0; i < Value::kWords; ++i) value.set_word(i, from[index * Value::kWords + i]);
  }
};

GKD_DEVICE float warp_sum(float x) {
  for (int mask = 1; mask < device::kWarp; mask *= 2) x += device::shuffle_xor(x, mask);
  return x;
}
GKD_DEVICE float warp_max(float x) {
  for (int mask = 1; mask < device::kWarp; mask *= 2) x = fmaxf(x, device::shuffle_xor(x, mask));
  return x;
}
GKD_DEVICE uint32_t warp_min(uint32_t x) {
  for (int mask = 1; mask < device::kWarp; mask *= 2) {
    const uint32_t other = device::shuffle_xor(x, mask);
    x = other < x ? other : x;
  }
  return x;
}

}  // namespace gkd
