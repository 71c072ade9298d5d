// Runs a grid of the emulated device.
#pragma once

#include <cstdint>
#include <functional>
#include <string>

namespace gkd::emulation {

struct Grid {
  int64_t blocks;
  int threads, cluster, shared_bytes;
  uint32_t seed;  // of the order in which threads run
};

// Calls `thread` as every thread of the grid. Returns what went wrong, or an empty string.
std::string run(const Grid& grid, const std::function<void()>& thread);

}  // namespace gkd::emulation
