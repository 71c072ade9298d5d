// From a job to a launch.
#pragma once

#include <cuda_runtime.h>

#include <cstdlib>
#include <map>
#include <mutex>
#include <stdexcept>
#include <string>
#include <tuple>

#include "plan.cuh"
#include "rows.h"

namespace gkd::cuda {

constexpr int kChipThreads = 256;
constexpr int kMemoryThreads = 512;

inline void check(cudaError_t error, const char* doing) {
  if (error == cudaSuccess) return;
  cudaGetLastError();  // or the next call would find it
  throw std::runtime_error(std::string("gkd: ") + doing + ": " + cudaGetErrorString(error));
}

inline int attribute(cudaDeviceAttr which, int index) {
  int value = 0;
  check(cudaDeviceGetAttribute(&value, which, index), "asking for the device's limits");
  return value;
}

inline Device current_device() {
  static std::mutex mutex;
  static std::map<int, Device> known;
  int index = 0;
  check(cudaGetDevice(&index), "asking for the current device");
  const std::lock_guard<std::mutex> lock(mutex);
  if (!known.count(index)) {
    known[index] = {index,
                    attribute(cudaDevAttrMultiProcessorCount, index),
                    attribute(cudaDevAttrComputeCapabilityMajor, index),
                    attribute(cudaDevAttrMaxSharedMemoryPerMultiprocessor, index),
                    attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin, index),
                    attribute(cudaDevAttrReservedSharedMemoryPerBlock, index),
                    attribute(cudaDevAttrL2CacheSize, index)};
  }
  return known[index];
}

struct Configuration {
  cudaLaunchAttribute cluster[1];
  cudaLaunchConfig_t config{};

  Configuration(int64_t blocks, int threads, const Plan& plan, cudaStream_t stream) {
    config.gridDim = dim3(unsigned(blocks));
    config.blockDim = dim3(unsigned(threads));
    config.dynamicSmemBytes = size_t(plan.shared_bytes);
    config.stream = stream;
    config.attrs = cluster;
    config.numAttrs = plan.ranks > 1 ? 1 : 0;
    cluster[0].id = cudaLaunchAttributeClusterDimension;
    cluster[0].val.clusterDim.x = unsigned(plan.ranks);
    cluster[0].val.clusterDim.y = cluster[0].val.clusterDim.z = 1;
  }
  Configuration(const Configuration&) = delete;  // config points into it
};

template <class Shape>
int resident_blocks(const Device& device, const Plan& plan) {
  auto* kernel = score_rows_kernel<Shape>;
  int found = 0;
  if (plan.ranks == 1) {
    check(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&found, kernel, Shape::kThreads, size_t(plan.shared_bytes)),
          "asking for the occupancy");
    return found * device.processors;
  }
  const Configuration configuration(plan.ranks, Shape::kThreads, plan, nullptr);
  if (cudaOccupancyMaxActiveClusters(&found, kernel, &configuration.config) != cudaSuccess) {
    cudaGetLastError();  // a cluster that this device cannot form
    return 0;
  }
  return found * plan.ranks;
}

// The plan, found once for each device, width and dtypes; also asks the driver for what the kernel needs.
template <class Shape>
Plan cached_plan(const Device& device, const Job<float>& job) {
  static std::mutex mutex;
  static std::map<std::tuple<int, int64_t, int>, Plan> known;
  const std::tuple<int, int64_t, int> key{device.index, job.columns, pair_bytes(job)};
  const std::lock_guard<std::mutex> lock(mutex);
  const auto found = known.find(key);
  if (found != known.end()) return found->second;
  auto* kernel = score_rows_kernel<Shape>;
  check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, device.shared_per_block),
        "asking for shared memory");
  if (device.major >= 9) {
    check(cudaFuncSetAttribute(kernel, cudaFuncAttributeNonPortableClusterSizeAllowed, 1), "asking for clusters of 16");
  }
  static const int asked = asked_ranks(std::getenv("GKD_CUDA_RANKS"));
  if (asked >= 0) return known[key] = asked_plan<Shape>(device, job, asked);
  const auto resident = [&](const Plan& plan) { return resident_blocks<Shape>(device, plan); };
  return known[key] = best_plan<Shape>(device, job, resident);
}

template <class Shape>
void start(const Job<float>& job, int64_t blocks, const Launch& launch, const Plan& plan, cudaStream_t stream) {
  const Configuration configuration(blocks, Shape::kThreads, plan, stream);
  check(cudaLaunchKernelEx(&configuration.config, score_rows_kernel<Shape>, job, launch), "launching");
  check(cudaGetLastError(), "launching");
}

template <class Shape>
void run_on_chip(const Job<float>& job, Launch launch, const Plan& plan, cudaStream_t stream) {
  const int64_t at_once = ((int64_t(1) << 31) - 1) / plan.ranks;  // rows of the largest grid
  for (; launch.first_row < job.rows; launch.first_row += at_once) {
    const int64_t rows = job.rows - launch.first_row < at_once ? job.rows - launch.first_row : at_once;
    start<Shape>(job, rows * plan.ranks, launch, plan, stream);
  }
}

template <template <class> class D>
void run_rows(const Job<float>& job, void* stream_) {
  if (job.rows == 0) return;
  if (job.columns >= (int64_t(1) << 30)) throw std::runtime_error("gkd::score_rows: 2^30 columns or more");
  const auto stream = static_cast<cudaStream_t>(stream_);
  const Device device = current_device();
  with_shape<D, kChipThreads>(job, [&](auto shape) {
    using Chip = decltype(shape);
    const Plan plan = cached_plan<Chip>(device, job);
    if (plan.ranks > 0) return run_on_chip<Chip>(job, launch_of<Chip>(job, plan.ranks, plan.slice), plan, stream);
    using Memory = Shape<D, 4, kMemoryThreads, false, true>;
    const Plan whole = plan_of<Memory>(job, 1);
    start<Memory>(job, memory_blocks(device, job), launch_of<Memory>(job, 1, whole.slice), whole, stream);
  });
}

}  // namespace gkd::cuda
