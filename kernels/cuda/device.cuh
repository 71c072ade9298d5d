// Everything the row kernels ask of the processor, and nothing else does. The tests put their own versions of these
// names in its place and run the kernels on a CPU (tests/kernels/cuda_emulation).
#pragma once

#if defined(GKD_EMULATED_DEVICE)
#include GKD_EMULATED_DEVICE
#else

#include <cstdint>

#define GKD_DEVICE __device__ __forceinline__
#define GKD_KERNEL(threads, blocks) __global__ void __launch_bounds__(threads, blocks)
#define GKD_RARE __device__ __noinline__       // what few rows need, away from the code that all run through
#define GKD_ARGUMENT const __grid_constant__   // of a kernel: its address can be passed on without a copy

namespace gkd::device {

constexpr int kWarp = 32;

// 16 or 8 bytes as the memory system moves them.
struct alignas(16) Words4 {
  uint32_t word[4];
};
struct alignas(8) Words2 {
  uint32_t word[2];
};

GKD_DEVICE int thread_index() { return int(threadIdx.x); }
GKD_DEVICE int64_t block_index() { return int64_t(blockIdx.x); }
GKD_DEVICE int64_t block_count() { return int64_t(gridDim.x); }

GKD_DEVICE char* shared_memory() {
  extern __shared__ __align__(16) char dynamic_shared_memory[];
  return dynamic_shared_memory;
}

GKD_DEVICE void sync_block() { __syncthreads(); }
GKD_DEVICE float shuffle_xor(float x, int mask) { return __shfl_xor_sync(0xffffffffu, x, mask); }
GKD_DEVICE uint32_t shuffle_xor(uint32_t x, int mask) { return __shfl_xor_sync(0xffffffffu, x, mask); }

// The two halves of a barrier of all threads of a cluster, where no warp is parted; also a fence for shared and global
// memory. Before sm_90 there are no clusters and nothing calls these.
GKD_DEVICE void cluster_arrive() {
#if __CUDA_ARCH__ >= 900
  asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory");
#endif
}
// Orders nothing: for a barrier that only tells that every block has started.
GKD_DEVICE void cluster_arrive_relaxed() {
#if __CUDA_ARCH__ >= 900
  asm volatile("barrier.cluster.arrive.relaxed.aligned;" ::: "memory");
#endif
}
GKD_DEVICE void cluster_wait() {
#if __CUDA_ARCH__ >= 900
  asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory");
#endif
}

// *to = x in the shared memory of the cluster's block `rank`; `to` is the address that this block has for it. Four
// words lie aligned to 16 bytes.
GKD_DEVICE void store_remote(uint32_t* to, int rank, uint32_t x) {
#if __CUDA_ARCH__ >= 900
  uint32_t remote;
  const uint32_t local = uint32_t(__cvta_generic_to_shared(to));
  asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(remote) : "r"(local), "r"(rank));
  asm volatile("st.shared::cluster.u32 [%0], %1;" ::"r"(remote), "r"(x) : "memory");
#else
  *to = x;
#endif
}

GKD_DEVICE void store_remote(uint32_t* to, int rank, const Words4& x) {
#if __CUDA_ARCH__ >= 900
  uint32_t remote;
  const uint32_t local = uint32_t(__cvta_generic_to_shared(to));
  asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(remote) : "r"(local), "r"(rank));
  asm volatile("st.shared::cluster.v4.u32 [%0], {%1, %2, %3, %4};" ::"r"(remote), "r"(x.word[0]), "r"(x.word[1]),
               "r"(x.word[2]), "r"(x.word[3])
               : "memory");
#endif
}

// Copies from global to shared memory that pass by the registers. Only the thread that started them sees them done, and
// only after waiting.
GKD_DEVICE void copy_async_16(void* to, const void* from) {
  const uint32_t shared = uint32_t(__cvta_generic_to_shared(to));
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(shared), "l"(from) : "memory");
}
GKD_DEVICE void copy_async_8(void* to, const void* from) {
  const uint32_t shared = uint32_t(__cvta_generic_to_shared(to));
  asm volatile("cp.async.ca.shared.global [%0], [%1], 8;" ::"r"(shared), "l"(from) : "memory");
}
GKD_DEVICE void commit_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }
// Until at most kLeft of the committed groups are under way.
template <int kLeft>
GKD_DEVICE void wait_copies() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kLeft) : "memory");
}

template <class T>
GKD_DEVICE T load(const void* from) {
  return *static_cast<const T*>(from);
}
template <>
GKD_DEVICE Words4 load<Words4>(const void* from) {
  const uint4 x = *static_cast<const uint4*>(from);
  return {{x.x, x.y, x.z, x.w}};
}
template <>
GKD_DEVICE Words2 load<Words2>(const void* from) {
  const uint2 x = *static_cast<const uint2*>(from);
  return {{x.x, x.y}};
}

template <class T>
GKD_DEVICE void store(void* to, T x) {
  *static_cast<T*>(to) = x;
}

// To global memory, where nobody on this chip will read it soon.
GKD_DEVICE void store_streaming(void* to, const Words4& x) {
  __stcs(static_cast<uint4*>(to), make_uint4(x.word[0], x.word[1], x.word[2], x.word[3]));
}
GKD_DEVICE void store_streaming(void* to, const Words2& x) {
  __stcs(static_cast<uint2*>(to), make_uint2(x.word[0], x.word[1]));
}

GKD_DEVICE float float_of(uint32_t bits) { return __uint_as_float(bits); }
GKD_DEVICE uint32_t bits_of(float x) { return __float_as_uint(x); }

GKD_DEVICE float from_float16(uint32_t bits) {
  float x;
  asm("cvt.f32.f16 %0, %1;" : "=f"(x) : "h"(uint16_t(bits)));
  return x;
}
// Two rounded to 16 bits, the first in the low half.
GKD_DEVICE uint32_t pack_float16(float low, float high) {
  uint32_t packed;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(high), "f"(low));
  return packed;
}
GKD_DEVICE uint32_t pack_bfloat16(float low, float high) {
  uint32_t packed;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(high), "f"(low));
  return packed;
}

// The larger of the two in each half. As fmaxf, it passes over NaN.
GKD_DEVICE uint32_t max_float16x2(uint32_t a, uint32_t b) {
  uint32_t most;
  asm("max.f16x2 %0, %1, %2;" : "=r"(most) : "r"(a), "r"(b));
  return most;
}
GKD_DEVICE uint32_t max_bfloat16x2(uint32_t a, uint32_t b) {
  uint32_t most;
  asm("max.bf16x2 %0, %1, %2;" : "=r"(most) : "r"(a), "r"(b));
  return most;
}

// A product that is never fused with a sum that follows, a product and a sum that are rounded once, and the
// special-function units' 2^x and log2 x. Also in host code's half of the shared formulas, which no one runs.
__host__ __device__ __forceinline__ float product(float a, float b) {
#if defined(__CUDA_ARCH__)
  return __fmul_rn(a, b);
#else
  return a * b;
#endif
}
__host__ __device__ __forceinline__ float fused(float a, float b, float c) {
#if defined(__CUDA_ARCH__)
  return __fmaf_rn(a, b, c);
#else
  return a * b + c;
#endif
}
__host__ __device__ __forceinline__ float exp2(float x) {
#if defined(__CUDA_ARCH__)
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
#else
  return x;
#endif
}
__host__ __device__ __forceinline__ float log2(float x) {
#if defined(__CUDA_ARCH__)
  float y;
  asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
#else
  return x;
#endif
}

}  // namespace gkd::device

#endif
