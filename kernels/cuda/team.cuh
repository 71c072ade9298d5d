// The blocks that own a row, a thread-block cluster or one block, and what they find together.
#pragma once

#include <type_traits>

#include "../shared/spec.h"
#include "device.cuh"

namespace gkd {

constexpr int kMaxCluster = 16;

// Words of scratch that `reduce` needs for values of `words` words.
GKD_INLINE constexpr int scratch_words(int words, int threads, int ranks) {
  return words * (threads / device::kWarp + (ranks > 1 ? ranks : 0));
}

// And `combine`, to share them afterwards.
template <class Value>
GKD_INLINE constexpr int combine_words(int threads, int ranks) {
  return scratch_words(Value::kWords, threads, ranks) + int(sizeof(Value) / 4);
}

template <int kThreads>
struct Team {
  static constexpr int kWarps = kThreads / device::kWarp;
  static_assert(kWarps <= device::kWarp && (kWarps & (kWarps - 1)) == 0 && kMaxCluster <= device::kWarp);
  int rank, ranks;

  GKD_DEVICE static bool in_first_warp() { return device::thread_index() < device::kWarp; }

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
  // The first half of one that only tells that every block has started: nothing that came before it is ordered.
  GKD_DEVICE void announce() const {
    if (ranks > 1) device::cluster_arrive_relaxed();
  }
  GKD_DEVICE void wait_for_start() const {
    if (ranks > 1) device::cluster_wait();
  }

  // Everybody's values reduced to one, always in the same order, in the first warp of every block; what the other warps
  // hold is lost. A Value is `kWords` words with
  //   reduce_warp<kWidth>()  the reduction over kWidth neighbouring lanes, which each of them gets
  // Each call needs scratch of its own, and in a cluster that every block is known to have started.
  template <class Value>
  GKD_DEVICE void reduce(Value& value, uint32_t* scratch) const {
    const int lane = device::thread_index() & (device::kWarp - 1);
    const int warp = int(unsigned(device::thread_index()) / device::kWarp);
    value.template reduce_warp<device::kWarp>();
    if (lane == 0) put(value, scratch + warp * Value::kWords);
    device::sync_block();
    if (in_first_warp()) {
      take(value, scratch + (lane & (kWarps - 1)) * Value::kWords);
      value.template reduce_warp<kWarps>();
    }
    if (ranks == 1) return;
    uint32_t* shares = scratch + kWarps * Value::kWords;
    if (in_first_warp() && lane < ranks) send(value, shares + rank * Value::kWords, lane);
    arrive();
    wait();
    if (!in_first_warp()) return;
    value.clear();
    const int sender = lane & (kMaxCluster - 1);
    if (sender < ranks) take(value, shares + sender * Value::kWords);
    value.template reduce_warp<kMaxCluster>();
  }

  // What the first thread has, for the whole block: plain words, by scratch of their number that nothing else uses.
  template <class Plain>
  GKD_DEVICE static void share(Plain& x, uint32_t* scratch) {
    static_assert(sizeof(Plain) % 4 == 0 && std::is_trivially_copyable_v<Plain>);
    if (device::thread_index() == 0) __builtin_memcpy(scratch, &x, sizeof(Plain));
    device::sync_block();
    __builtin_memcpy(static_cast<void*>(&x), scratch, sizeof(Plain));
  }

  // `reduce`, for everybody; `clear()` makes a value what changes no result.
  template <class Value>
  GKD_DEVICE void combine(Value& value, uint32_t* scratch) const {
    reduce(value, scratch);
    share(value, scratch + scratch_words(Value::kWords, kThreads, ranks));
  }

 private:
  template <class Value>
  GKD_DEVICE static void send(Value& value, uint32_t* to, int rank) {
    if constexpr (Value::kWords == 4) {
      device::store_remote(to, rank, device::Words4{{value.word(0), value.word(1), value.word(2), value.word(3)}});
    } else {
      for (int i = 0; i < Value::kWords; ++i) device::store_remote(to + i, rank, value.word(i));
    }
  }
  template <class Value>
  GKD_DEVICE static void put(Value& value, uint32_t* to) {
    for (int i = 0; i < Value::kWords; ++i) to[i] = value.word(i);
  }
  template <class Value>
  GKD_DEVICE static void take(Value& value, const uint32_t* from) {
    for (int i = 0; i < Value::kWords; ++i) value.set_word(i, from[i]);
  }
};

template <int kWidth>
GKD_DEVICE float lanes_sum(float x) {
#pragma unroll
  for (int mask = 1; mask < kWidth; mask *= 2) x += device::shuffle_xor(x, mask);
  return x;
}
template <int kWidth>
GKD_DEVICE float lanes_max(float x) {
#pragma unroll
  for (int mask = 1; mask < kWidth; mask *= 2) x = fmaxf(x, device::shuffle_xor(x, mask));
  return x;
}
template <int kWidth>
GKD_DEVICE uint32_t lanes_min(uint32_t x) {
#pragma unroll
  for (int mask = 1; mask < kWidth; mask *= 2) {
    const uint32_t other = device::shuffle_xor(x, mask);
    x = other < x ? other : x;
  }
  return x;
}

}  // namespace gkd
