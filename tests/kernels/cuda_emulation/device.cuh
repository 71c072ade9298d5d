// What kernels/cuda/device.cuh offers, on a CPU: every thread of a cluster is a fiber that runs until it waits.
//
// It is stricter than the machine. Shared memory starts as NaN; an asynchronous copy happens when it is waited for, not
// before; threads run one after the other in an order that changes from run to run, so that what is read without a
// barrier has not been written for some of them; misaligned accesses, stores into blocks that have not started or have
// ended, stores beyond the shared memory, and barriers that not everybody reaches are reported. Under ThreadSanitizer
// block and cluster barriers order memory, and nothing else does: shuffles do not, nor a barrier's relaxed half.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#define GKD_DEVICE inline
#define GKD_KERNEL(threads, blocks) void
#define GKD_RARE inline
#define GKD_ARGUMENT const

using std::fmaxf;

namespace gkd::device {

constexpr int kWarp = 32;

struct alignas(16) Words4 {
  uint32_t word[4];
};
struct alignas(8) Words2 {
  uint32_t word[2];
};

// In emulation.cpp.
int thread_index();
int64_t block_index();
int64_t block_count();
char* shared_memory();
void sync_block();
void cluster_arrive();
void cluster_arrive_relaxed();
void cluster_wait();
uint32_t shuffle_xor(uint32_t x, int mask);
void store_remote(uint32_t* to, int rank, uint32_t x);
void copy_async(void* to, const void* from, int bytes);
void commit_copies();
void wait_copies_left(int left);
void check_aligned(const void* address, int bytes);

inline void store_remote(uint32_t* to, int rank, const Words4& x) {
  check_aligned(to, 16);
  for (int i = 0; i < 4; ++i) store_remote(to + i, rank, x.word[i]);
}

inline float float_of(uint32_t bits) {
  float x;
  std::memcpy(&x, &bits, 4);
  return x;
}
inline uint32_t bits_of(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  return bits;
}

inline float shuffle_xor(float x, int mask) { return float_of(shuffle_xor(bits_of(x), mask)); }
inline void copy_async_16(void* to, const void* from) { copy_async(to, from, 16); }
inline void copy_async_8(void* to, const void* from) { copy_async(to, from, 8); }
template <int kLeft>
void wait_copies() {
  wait_copies_left(kLeft);
}

template <class T>
T load(const void* from) {
  check_aligned(from, sizeof(T));
  T x;
  std::memcpy(&x, from, sizeof(T));
  return x;
}
template <class T>
void store(void* to, T x) {
  check_aligned(to, sizeof(T));
  std::memcpy(to, &x, sizeof(T));
}
template <class T>
void store_streaming(void* to, const T& x) {
  store(to, x);
}

inline float from_float16(uint32_t bits) {
  const int exponent = bits >> 10 & 31, fraction = bits & 1023;
  float x = exponent == 31 ? (fraction ? NAN : INFINITY) : std::ldexp(float(exponent ? fraction + 1024 : fraction),
                                                                     (exponent ? exponent : 1) - 25);
  return bits >> 15 & 1 ? -x : x;
}
inline uint32_t to_float16(float x) {
  const uint32_t sign = bits_of(x) >> 16 & 0x8000u;
  if (x != x) return 0x7fffu;
  x = std::fabs(x);
  if (x >= 65520.0f) return sign | 0x7c00u;
  if (x < 6.103515625e-05f) return sign | uint32_t(std::nearbyint(x * 16777216.0f));
  const uint32_t u = bits_of(x);
  return sign | ((u + 0xfffu + (u >> 13 & 1u) - 0x38000000u) >> 13);
}
inline uint32_t to_bfloat16(float x) {
  const uint32_t u = bits_of(x);
  return x == x ? (u + 0x7fffu + (u >> 16 & 1u)) >> 16 : 0x7fffu;
}
inline uint32_t pack_float16(float low, float high) { return to_float16(low) | to_float16(high) << 16; }
inline uint32_t pack_bfloat16(float low, float high) { return to_bfloat16(low) | to_bfloat16(high) << 16; }

template <uint32_t (*kRound)(float), float (*kWiden)(uint32_t)>
uint32_t max_halves(uint32_t a, uint32_t b) {
  const float low = fmaxf(kWiden(a & 0xffffu), kWiden(b & 0xffffu)), high = fmaxf(kWiden(a >> 16), kWiden(b >> 16));
  return kRound(low) | kRound(high) << 16;
}
inline float from_bfloat16(uint32_t bits) { return float_of(bits << 16); }
inline uint32_t max_float16x2(uint32_t a, uint32_t b) { return max_halves<to_float16, from_float16>(a, b); }
inline uint32_t max_bfloat16x2(uint32_t a, uint32_t b) { return max_halves<to_bfloat16, from_bfloat16>(a, b); }

float product(float a, float b);  // elsewhere, so that it is not fused
inline float fused(float a, float b, float c) { return std::fma(a, b, c); }

// As inaccurate as the special-function units may be: off by 2^-22, up or down by the argument.
inline float jitter(float argument) {
  uint32_t hash = bits_of(argument) * 2654435761u;
  return (hash >> 31 ? 1.0f : -1.0f) * 2.3841858e-07f;
}
inline float exp2(float x) {
  const float y = std::exp2(x);
  if (y < 1.17549435e-38f) return 0.0f;
  return x == 0.0f ? 1.0f : y + y * jitter(x);
}
inline float log2(float x) {
  const float y = std::log2(x);
  return x == 1.0f ? 0.0f : std::isfinite(y) ? y + jitter(x) * std::fmax(1.0f, std::fabs(y)) : y;
}

}  // namespace gkd::device
