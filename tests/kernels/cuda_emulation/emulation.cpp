#include "emulation.h"

#include <ucontext.h>

#include <algorithm>
#include <cstdlib>
#include <memory>
#include <numeric>
#include <random>
#include <stdexcept>
#include <vector>

#include "device.cuh"

// GKD_UNCHECKED: the machine's own state, which the sanitizer shall not look at.
#if defined(__SANITIZE_THREAD__)
#include <sanitizer/tsan_interface.h>
#define GKD_UNCHECKED __attribute__((no_sanitize("thread")))
#else
#define GKD_UNCHECKED
#define __tsan_release(address) (void)0
#define __tsan_acquire(address) (void)0
#endif

namespace gkd::emulation {
namespace {

constexpr size_t kStack = 256 << 10;
constexpr int kGuard = 64;  // bytes behind the shared memory that nobody may write

struct Barrier {
  int expected = 0, arrived = 0;
  uint64_t generation = 0;
};

struct Copy {
  void* to;
  const void* from;
  int bytes;
};

struct Block {
  int64_t index;
  std::vector<char> memory;
  char* shared;
  Barrier barrier;
  int started = 0, ended = 0;
};

struct Warp {
  Barrier barrier;
  uint32_t slot[2][device::kWarp];
};

struct Fiber {
  ucontext_t context;
  std::unique_ptr<char[]> stack{new char[kStack]};
  void* sanitizer = nullptr;
  Block* block;
  Warp* warp;
  int thread;
  int shuffles;
  Barrier* awaited;  // null: ready to run
  uint64_t phase, cluster_phase;
  bool arrived, ended;

  bool ready() const { return !ended && (!awaited || awaited->generation != phase); }
  std::vector<std::vector<Copy>> groups;  // the last is open
};

struct Machine {
  Grid grid;
  const std::function<void()>* body;
  ucontext_t scheduler;
  void* sanitizer = nullptr;
  std::vector<std::unique_ptr<Fiber>> fibers;
  std::vector<Block> blocks;
  std::vector<Warp> warps;
  Barrier cluster;
  Fiber* current = nullptr;
  std::string error;
};

Machine machine;

GKD_UNCHECKED void fail(const char* what) {
  if (machine.error.empty()) machine.error = what;
}

GKD_UNCHECKED void resume(Fiber& fiber) {
  machine.current = &fiber;
#if defined(__SANITIZE_THREAD__)
  __tsan_switch_to_fiber(fiber.sanitizer, __tsan_switch_to_fiber_no_sync);
#endif
  swapcontext(&machine.scheduler, &fiber.context);
}

GKD_UNCHECKED void yield() {
  Fiber* fiber = machine.current;
#if defined(__SANITIZE_THREAD__)
  __tsan_switch_to_fiber(machine.sanitizer, __tsan_switch_to_fiber_no_sync);
#endif
  swapcontext(&fiber->context, &machine.scheduler);
}

GKD_UNCHECKED uint64_t arrive(Barrier& barrier, bool orders_memory) {
  if (orders_memory) __tsan_release(&barrier);
  const uint64_t phase = barrier.generation;
  if (++barrier.arrived == barrier.expected) barrier.arrived = 0, ++barrier.generation;
  return phase;
}

GKD_UNCHECKED void wait(Barrier& barrier, uint64_t phase, bool orders_memory) {
  Fiber& fiber = *machine.current;
  fiber.awaited = &barrier, fiber.phase = phase;
  if (!fiber.ready()) yield();
  fiber.awaited = nullptr;
  if (orders_memory) __tsan_acquire(&barrier);
}

GKD_UNCHECKED void fiber_main() {
  __tsan_acquire(&machine);
  Fiber& fiber = *machine.current;
  ++fiber.block->started;
  (*machine.body)();
  if (fiber.arrived) fail("a thread ended between the halves of a cluster barrier");
  if (!fiber.groups.back().empty()) fail("copies that were never committed");
  ++fiber.block->ended;
  fiber.ended = true;
  __tsan_release(&machine);
  yield();
}

GKD_UNCHECKED void prepare(Fiber& fiber, int index) {
  fiber.block = &machine.blocks[index / machine.grid.threads];
  fiber.warp = &machine.warps[index / device::kWarp];
  fiber.thread = index % machine.grid.threads;
  fiber.shuffles = 0, fiber.awaited = nullptr, fiber.cluster_phase = 0, fiber.arrived = fiber.ended = false;
  fiber.groups.assign(1, {});
  getcontext(&fiber.context);
  fiber.context.uc_stack.ss_sp = fiber.stack.get();
  fiber.context.uc_stack.ss_size = kStack;
  fiber.context.uc_link = nullptr;
  makecontext(&fiber.context, fiber_main, 0);
}

GKD_UNCHECKED void prepare_cluster(int64_t first_block) {
  const Grid& grid = machine.grid;
  const int threads = grid.cluster * grid.threads;
  machine.blocks.assign(grid.cluster, {});
  machine.warps.assign(threads / device::kWarp, {});
  machine.cluster = {threads, 0, 0};
  for (Warp& warp : machine.warps) warp.barrier.expected = device::kWarp;
  for (int i = 0; i < grid.cluster; ++i) {
    Block& block = machine.blocks[i];
    block.index = first_block + i;
    block.barrier.expected = grid.threads;
    block.memory.assign(grid.shared_bytes + kGuard + 16, char(0xff));
    block.shared = block.memory.data() + (-reinterpret_cast<intptr_t>(block.memory.data()) & 15);
  }
  while (int(machine.fibers.size()) < threads) {
    machine.fibers.push_back(std::make_unique<Fiber>());
#if defined(__SANITIZE_THREAD__)
    machine.fibers.back()->sanitizer = __tsan_create_fiber(0);
#endif
  }
  for (int i = 0; i < threads; ++i) prepare(*machine.fibers[i], i);
}

// Whether a thread of the warp could run. It ran until it had to wait.
GKD_UNCHECKED bool run_warp(int warp, const std::vector<int>& lanes) {
  bool ran = false;
  for (int lane : lanes) {
    Fiber& fiber = *machine.fibers[warp * device::kWarp + lane];
    if (!fiber.ready()) continue;
    resume(fiber);
    ran = true;
  }
  return ran;
}

GKD_UNCHECKED std::vector<int> shuffled(int count, std::mt19937& random) {
  std::vector<int> order(count);
  std::iota(order.begin(), order.end(), 0);
  std::shuffle(order.begin(), order.end(), random);
  return order;
}

// Half of the seeds let a warp, and a block, run ahead of the others as far as it can.
GKD_UNCHECKED void run_cluster(std::mt19937& random) {
  const int warps_per_block = machine.grid.threads / device::kWarp;
  const bool ahead = machine.grid.seed % 2;
  std::vector<int> lanes = shuffled(device::kWarp, random), warps;
  for (int block : shuffled(machine.grid.cluster, random)) {
    for (int warp : shuffled(warps_per_block, random)) warps.push_back(block * warps_per_block + warp);
  }
  __tsan_release(&machine);
  bool ran = true;
  while (ran && machine.error.empty()) {
    ran = false;
    for (int warp : warps) {
      ran = run_warp(warp, lanes) || ran;
      if (ran && ahead) break;
    }
  }
  for (const Block& block : machine.blocks) {
    if (block.ended < machine.grid.threads) fail("a barrier that not every thread reaches");
  }
  __tsan_acquire(&machine);
  for (const Block& block : machine.blocks) {
    for (int i = 0; i < kGuard - 16; ++i) {
      if (block.shared[machine.grid.shared_bytes + i] != char(0xff)) fail("a store behind the shared memory");
    }
  }
}

}  // namespace

std::string run(const Grid& grid, const std::function<void()>& thread) {
  machine.grid = grid, machine.body = &thread, machine.error.clear();
#if defined(__SANITIZE_THREAD__)
  machine.sanitizer = __tsan_get_current_fiber();
#endif
  std::mt19937 random(grid.seed);
  for (int64_t block = 0; block < grid.blocks && machine.error.empty(); block += grid.cluster) {
    prepare_cluster(block);
    run_cluster(random);
  }
  return machine.error;
}

}  // namespace gkd::emulation

namespace gkd::device {

using emulation::fail;
using emulation::machine;

GKD_UNCHECKED int thread_index() { return machine.current->thread; }
GKD_UNCHECKED int64_t block_index() { return machine.current->block->index; }
GKD_UNCHECKED int64_t block_count() { return machine.grid.blocks; }
GKD_UNCHECKED char* shared_memory() { return machine.current->block->shared; }

GKD_UNCHECKED void sync_block() {
  emulation::Barrier& barrier = machine.current->block->barrier;
  emulation::wait(barrier, emulation::arrive(barrier, true), true);
}

GKD_UNCHECKED void arrive_at_cluster(bool orders_memory) {
  if (machine.current->arrived) fail("two arrivals at a cluster barrier without a wait");
  machine.current->arrived = true;
  machine.current->cluster_phase = emulation::arrive(machine.cluster, orders_memory);
}
GKD_UNCHECKED void cluster_arrive() { arrive_at_cluster(true); }
GKD_UNCHECKED void cluster_arrive_relaxed() { arrive_at_cluster(false); }
GKD_UNCHECKED void cluster_wait() {
  if (!machine.current->arrived) return fail("a wait at a cluster barrier without an arrival");
  emulation::wait(machine.cluster, machine.current->cluster_phase, true);
  machine.current->arrived = false;
}

GKD_UNCHECKED uint32_t shuffle_xor(uint32_t x, int mask) {
  emulation::Fiber& fiber = *machine.current;
  emulation::Warp& warp = *fiber.warp;
  const int lane = fiber.thread % kWarp, parity = fiber.shuffles++ % 2;
  warp.slot[parity][lane] = x;
  emulation::wait(warp.barrier, emulation::arrive(warp.barrier, false), false);
  return warp.slot[parity][lane ^ mask];
}

GKD_UNCHECKED void store_remote(uint32_t* to, int rank, uint32_t x) {
  emulation::Block& own = *machine.current->block;
  emulation::Block& other = machine.blocks[rank];
  const int64_t offset = reinterpret_cast<char*>(to) - own.shared;
  if (offset < 0 || offset + 4 > machine.grid.shared_bytes) return fail("a remote store outside of the shared memory");
  if (other.started < machine.grid.threads) return fail("a remote store into a block that has not started");
  if (other.ended > 0) return fail("a remote store into a block that has ended");
  store(other.shared + offset, x);
}

GKD_UNCHECKED void copy_async(void* to, const void* from, int bytes) {
  check_aligned(to, bytes), check_aligned(from, bytes);
  machine.current->groups.back().push_back({to, from, bytes});
}
GKD_UNCHECKED void commit_copies() { machine.current->groups.emplace_back(); }
void wait_copies_left(int left) {
  auto& groups = machine.current->groups;
  while (int(groups.size()) > left + 1) {
    for (const emulation::Copy& copy : groups.front()) std::memcpy(copy.to, copy.from, copy.bytes);
    groups.erase(groups.begin());
  }
}

float product(float a, float b) { return a * b; }

GKD_UNCHECKED void check_aligned(const void* address, int bytes) {
  if (reinterpret_cast<uintptr_t>(address) % uintptr_t(bytes)) fail("a misaligned access");
}

}  // namespace gkd::device
