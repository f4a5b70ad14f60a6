// CUDA on the CPU, for tests: a .cu file compiled with g++ -DCMX_EMULATED includes this instead of the CUDA runtime.
//
// Every CUDA thread is a fiber that runs until it has to wait for others, so a run is deterministic and sees one thread
// order: forward, reverse, or random. What hardware leaves undefined is made visible:
//   shared memory         all NaN when a block starts; under AddressSanitizer out of bounds is an error with file:line
//   cp.async              arrives as late as its wait allows, or at once, as the caller chooses; so do copies of tensors
//                         (hopper.h)
//   a wait for nobody     ends the kernel with the number of threads at each kind of wait
// Under ThreadSanitizer every fiber is a thread: barriers order memory, shuffles and mma do not, so a missing
// __syncthreads or __syncwarp is a reported race. Blocks run one after the other, or the blocks of a cluster together: races
// between others stay unseen.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime_api.h>
#include <sys/mman.h>
#include <vector_functions.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <exception>
#include <functional>
#include <map>
#include <memory>
#include <random>
#include <stdexcept>
#include <string>
#include <vector>

#include "sanitizers.h"

#undef __global__
#undef __device__
#undef __host__
#undef __forceinline__
#undef __launch_bounds__
#undef __grid_constant__
#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __grid_constant__

inline uint3 threadIdx, blockIdx;
inline dim3 blockDim, gridDim;

namespace cmx::emulator {

// ---- what a thread, and the machine, consists of

struct Copy {
  void* to;
  const void* from;
  size_t bytes, filled;  // `filled` bytes are copied, the rest is zero
};

// What a thread has begun on Hopper and not waited for (hopper.h), in groups; the last one is open.
struct Underway {
  std::vector<std::vector<std::function<void()>>> products{1};  // to be run
  std::vector<std::vector<std::shared_ptr<bool>>> stores{1};    // have they been read?
  bool fenced = false;
};

struct Mbarrier {
  int count, pending;  // arrivals of a phase, and those to come
  int64_t bytes;       // to come
  unsigned phase;
};

struct NamedBarrier {
  int expected, here;
  unsigned uses;
  char edge[2];  // addresses in TSan's eyes
};

enum class Waits { no, for_block, for_warp, for_event, done };

struct Thread {
  void* stack_pointer;
  char* stack;
  uint3 index, block;
  int rank;        // of its block in the cluster
  int lane, warp;  // the warp counts through the cluster
  Waits waits;
  unsigned mask;           // the lanes it waits for
  unsigned char uses[2];   // of the block's and the warp's barrier: their parity names an address for TSan
  std::vector<Copy> open;  // cp.async since the last commit
  std::vector<std::vector<Copy>> groups;  // committed, oldest first
  std::function<bool()> event;            // has what it waits for happened?
  Underway underway;
  void *asan, *tsan;
};

constexpr size_t kStack = 256 << 10, kShared = 227 << 10;  // 227 KB: what a block of an H200 can have
constexpr int kCluster = 2;

struct Machine {
  enum Order { forward, reverse, random } order = forward;
  bool copies_arrive_at_once = false;
  unsigned seed = 1;

  std::vector<Thread> threads;
  Thread* current = nullptr;
  int count = 0, alive = 0;
  std::function<void()> body;
  std::exception_ptr failure;
  std::vector<std::function<void()>> loads, stores;        // of tiles, on their way
  std::map<std::pair<int, uint32_t>, Mbarrier> mbarriers;  // by rank and shared address
  NamedBarrier named[kCluster][16], whole;                 // by rank; of the cluster
  std::mt19937 dice;
  void *scheduler = nullptr, *asan = nullptr, *tsan = nullptr;
  const void* stack_bottom = nullptr;
  size_t stack_size = 0;
  unsigned char exchange[32][32][64];                            // [warp][lane]: what the lanes show each other
  char barrier[2][32 + kCluster], block_edge[2];                 // addresses that stand for barriers in TSan's eyes
  alignas(1024) unsigned char arenas[kCluster][kShared + 1024];  // and a red zone
  unsigned char* shared = arenas[0];                             // of the block whose turn it is
};

inline Machine machine;

CMX_NO_TSAN inline Thread& self() { return *machine.current; }

[[noreturn]] inline void fail(const std::string& what) { throw std::runtime_error("emulator: " + what); }

inline void shared_is_readable([[maybe_unused]] size_t bytes) {
#ifdef __SANITIZE_ADDRESS__
  for (auto& arena : machine.arenas) {
    __asan_poison_memory_region(arena, sizeof arena);
    __asan_unpoison_memory_region(arena, bytes);
  }
#endif
}

// ---- fibers

#ifndef __x86_64__
#error "the emulator switches stacks with x86-64 instructions"
#endif
extern "C" void cmx_switch_stack(void** save, void* load);
asm(R"(
.text
.weak cmx_switch_stack
.type cmx_switch_stack, @function
cmx_switch_stack:
  push %rbp
  push %rbx
  push %r12
  push %r13
  push %r14
  push %r15
  mov %rsp, (%rdi)
  mov %rsi, %rsp
  pop %r15
  pop %r14
  pop %r13
  pop %r12
  pop %rbx
  pop %rbp
  ret
.size cmx_switch_stack, .-cmx_switch_stack
)");

CMX_NO_TSAN inline void to_scheduler([[maybe_unused]] bool for_good = false) {
  Thread& me = self();
#ifdef __SANITIZE_ADDRESS__
  __sanitizer_start_switch_fiber(for_good ? nullptr : &me.asan, machine.stack_bottom, machine.stack_size);
#endif
#ifdef __SANITIZE_THREAD__
  __tsan_switch_to_fiber(machine.tsan, 1);
#endif
  cmx_switch_stack(&me.stack_pointer, machine.scheduler);
#ifdef __SANITIZE_ADDRESS__
  __sanitizer_finish_switch_fiber(me.asan, &machine.stack_bottom, &machine.stack_size);
#endif
}

inline void resume(Thread& t) {
  machine.current = &t;
  machine.shared = machine.arenas[t.rank];
  threadIdx = t.index, blockIdx = t.block;
#ifdef __SANITIZE_ADDRESS__
  __sanitizer_start_switch_fiber(&machine.asan, t.stack, kStack);
#endif
#ifdef __SANITIZE_THREAD__
  __tsan_switch_to_fiber(t.tsan, 1);
#endif
  cmx_switch_stack(&machine.scheduler, t.stack_pointer);
#ifdef __SANITIZE_ADDRESS__
  __sanitizer_finish_switch_fiber(machine.asan, nullptr, nullptr);
#endif
  threadIdx = t.index, blockIdx = t.block;
}

// The first and last function on a fiber's stack
inline void run_thread() {
#ifdef __SANITIZE_ADDRESS__
  __sanitizer_finish_switch_fiber(nullptr, &machine.stack_bottom, &machine.stack_size);
#endif
  acquire(&machine.block_edge[0]);
  try {
    machine.body();
  } catch (...) {
    const Invisible _;
    if (!machine.failure) machine.failure = std::current_exception();
  }
  release(&machine.block_edge[1]);
  {
    const Invisible _;
    self().waits = Waits::done;
    --machine.alive;
  }
  to_scheduler(true);
  std::abort();
}

inline void start(Thread& t) {
#ifdef __SANITIZE_ADDRESS__
  __asan_unpoison_memory_region(t.stack, kStack);
#endif
  void** top = reinterpret_cast<void**>(t.stack + kStack - 64);
  *--top = reinterpret_cast<void*>(&std::abort);
  *--top = reinterpret_cast<void*>(&run_thread);
  for (int saved_register = 0; saved_register < 6; ++saved_register) *--top = nullptr;
  t.stack_pointer = top;
  t.waits = Waits::no;
  t.uses[0] = t.uses[1] = 0;
  t.open.clear();
  t.groups.clear();
  t.underway = {};
}

// ---- waiting: each returns when all threads concerned have arrived

inline void sync_block() {
  const Invisible _;
  char* const barrier = &machine.barrier[self().uses[0]++ & 1][32 + self().rank];
  release(barrier);
  self().waits = Waits::for_block;
  to_scheduler();
  acquire(barrier);
}

// Execution only. Shuffles, ldmatrix and mma wait for the lanes but order no memory.
inline void converge(unsigned mask) {
  const Invisible _;
  self().waits = Waits::for_warp;
  self().mask = mask;
  to_scheduler();
}

inline void wait_until(std::function<bool()> event) {
  const Invisible _;
  self().event = std::move(event);
  self().waits = Waits::for_event;
  to_scheduler();
}

inline void sync_warp(unsigned mask) {
  const Invisible _;
  char* const barrier = &machine.barrier[self().uses[1]++ & 1][self().warp];
  release(barrier);
  converge(mask);
  acquire(barrier);
}

// Every lane of the warp sees every lane's value.
template <class V>
void show(const V& mine, V (&all)[32], unsigned mask = ~0u) {
  static_assert(sizeof(V) <= sizeof machine.exchange[0][0]);
  const Invisible _;
  auto& lanes = machine.exchange[self().warp];
  std::memcpy(lanes[self().lane], &mine, sizeof(V));
  converge(mask);
  for (int i = 0; i < 32; ++i) std::memcpy(&all[i], lanes[i], sizeof(V));
  converge(mask);
}

template <class V>
V shuffle(unsigned mask, const V& mine, int lane) {
  if (!(mask >> (lane & 31) & 1)) fail("a shuffle reads lane " + std::to_string(lane) + ", which is not in its mask");
  V all[32];
  show(mine, all, mask);
  return all[lane & 31];
}

// ---- cp.async

inline void arrive(const Copy& c) {
  std::memcpy(c.to, c.from, c.filled);
  std::memset(static_cast<char*>(c.to) + c.filled, 0, c.bytes - c.filled);
}

inline void copy_async(void* to, const void* from, size_t bytes, size_t filled) {
  if (reinterpret_cast<uintptr_t>(to) % bytes || reinterpret_cast<uintptr_t>(from) % bytes)
    fail("cp.async of " + std::to_string(bytes) + " bytes is misaligned");
  if (machine.copies_arrive_at_once) arrive({to, from, bytes, filled});
  const Invisible _;
  self().open.push_back({to, from, bytes, filled});
}

inline void commit_copies() {
  const Invisible _;
  self().groups.push_back(std::move(self().open));
  self().open.clear();
}

inline void wait_for_copies(size_t groups_in_flight) {
  std::vector<Copy> arriving;
  {
    const Invisible _;
    auto& groups = self().groups;
    while (groups.size() > groups_in_flight) {
      arriving.insert(arriving.end(), groups.front().begin(), groups.front().end());
      groups.erase(groups.begin());
    }
  }
  if (!machine.copies_arrive_at_once)
    for (const Copy& c : arriving) arrive(c);
}

// ---- blocks and kernels

inline void release_complete_warps(bool& progress) {
  for (int first = 0; first < machine.count; first += 32) {
    unsigned wanted = 0, here = 0, exited = 0;
    for (int lane = 0; lane < 32; ++lane) {
      if (first + lane >= machine.count) {
        exited |= 1u << lane;
        continue;
      }
      const Thread& t = machine.threads[first + lane];
      if (t.waits == Waits::done) exited |= 1u << lane;
      if (t.waits == Waits::for_warp) here |= 1u << lane, wanted |= t.mask;
    }
    if (!here || (wanted & ~here & ~exited)) continue;
    if (wanted & exited) fail("a warp operation waits for a lane that has exited or does not exist");
    for (int lane = 0; lane < 32; ++lane)
      if (here >> lane & 1) {
        if (machine.threads[first + lane].mask != wanted) fail("the lanes of a warp operation name different masks");
        machine.threads[first + lane].waits = Waits::no;
      }
    progress = true;
  }
}

inline void release_complete_block(int rank, bool& progress) {
  int here = 0, alive = 0, count = 0;
  for (int i = 0; i < machine.count; ++i) {
    const Thread& t = machine.threads[i];
    if (t.rank == rank) ++count, here += t.waits == Waits::for_block, alive += t.waits != Waits::done;
  }
  if (!here || here != alive) return;
  if (alive != count)
    fail("__syncthreads reached by " + std::to_string(here) + " of " + std::to_string(count) +
         " threads: the others have exited");
  for (int i = 0; i < machine.count; ++i)
    if (machine.threads[i].rank == rank) machine.threads[i].waits = Waits::no;
  progress = true;
}

inline void release_events(bool& progress) {
  for (int i = 0; i < machine.count; ++i) {
    Thread& t = machine.threads[i];
    if (t.waits == Waits::for_event && t.event()) t.waits = Waits::no, progress = true;
  }
}

// Copies of tiles land when nothing else can happen, loads before stores: the oldest, the newest, or any.
inline void land_a_copy(bool& progress) {
  const bool any = machine.order == Machine::random, store = any && machine.dice() % 2;
  auto& copies = machine.loads.empty() || (store && !machine.stores.empty()) ? machine.stores : machine.loads;
  if (progress || copies.empty()) return;
  size_t which = machine.order == Machine::reverse ? copies.size() - 1 : 0;
  if (any) which = machine.dice() % copies.size();
  const std::function<void()> land = std::move(copies[which]);
  copies.erase(copies.begin() + which);
  land();
  progress = true;
}

inline void report_deadlock() {
  int at[5] = {};
  for (int i = 0; i < machine.count; ++i) ++at[static_cast<int>(machine.threads[i].waits)];
  fail("deadlock: " + std::to_string(at[int(Waits::for_block)]) + " threads at __syncthreads, " +
       std::to_string(at[int(Waits::for_warp)]) + " at a warp operation, " + std::to_string(at[int(Waits::for_event)]) +
       " at an mbarrier, a named barrier or a store, " + std::to_string(at[int(Waits::done)]) + " exited");
}

inline void run_block(size_t shared_bytes) {
  release(&machine.block_edge[0]);
  shared_is_readable(sizeof machine.arenas[0]);
  const int cluster = machine.threads[machine.count - 1].rank + 1;
  for (int rank = 0; rank < cluster; ++rank)
    std::memset(machine.arenas[rank], 0xff, std::min(shared_bytes + 1024, sizeof machine.arenas[0]));
  shared_is_readable(shared_bytes);
  std::vector<int> turns(machine.count);
  for (int i = 0; i < machine.count; ++i) turns[i] = machine.order == Machine::reverse ? machine.count - 1 - i : i;
  machine.dice.seed(machine.seed);
  machine.loads.clear(), machine.stores.clear(), machine.mbarriers.clear();
  std::memset(machine.named, 0, sizeof machine.named), machine.whole = {};
  for (int i = 0; i < machine.count; ++i) start(machine.threads[i]);
  machine.alive = machine.count;
  int first = turns[0], idle = 0;  // one block goes as far as it can before another has a turn, but for random orders
  while (machine.alive) {
    const bool any = machine.order == Machine::random;
    if (any) std::shuffle(turns.begin(), turns.end(), machine.dice);
    bool progress = false;
    for (const int i : turns) {
      if (machine.threads[i].waits != Waits::no || !(any || machine.threads[i].rank == machine.threads[first].rank))
        continue;
      resume(machine.threads[i]);
      if (machine.failure) std::rethrow_exception(std::exchange(machine.failure, nullptr));
      progress = true;
    }
    release_complete_warps(progress);
    for (int rank = 0; rank < kCluster; ++rank) release_complete_block(rank, progress);
    release_events(progress);
    idle = progress ? 0 : idle + 1;
    first = progress ? first : (first + machine.count / cluster) % machine.count;
    if (idle % cluster) continue;
    land_a_copy(progress);
    if (!progress && machine.alive) report_deadlock();
  }
  acquire(&machine.block_edge[1]);
  if (!machine.loads.empty() || !machine.stores.empty()) fail("a block ends with copies of tensors in flight");
  for (int i = 0; i < machine.count; ++i) {
    const Thread& t = machine.threads[i];
    if (!t.open.empty() || !t.groups.empty()) fail("a thread ends with cp.async in flight");
    if (t.underway.products.size() > 1 || !t.underway.products[0].empty()) fail("a thread ends with wgmma in flight");
  }
}

inline void make_threads(dim3 block, int cluster) {
  const int count = static_cast<int>(block.x * block.y * block.z);
  machine.count = count * cluster;
  if (count < 1 || machine.count > 1024) fail("a block of " + std::to_string(count) + " threads");
  if (cluster < 1 || cluster > kCluster || (cluster > 1 && count % 32)) fail("a cluster that is not modelled");
  machine.threads.reserve(1024);
  while (static_cast<int>(machine.threads.size()) < machine.count) {
    Thread t{};
    t.stack = static_cast<char*>(mmap(nullptr, kStack, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
#ifdef __SANITIZE_THREAD__
    t.tsan = __tsan_create_fiber(0);
#endif
    machine.threads.push_back(std::move(t));
  }
  for (unsigned i = 0; i < static_cast<unsigned>(machine.count); ++i) {
    Thread& t = machine.threads[i];
    t.index = make_uint3(i % count % block.x, i % count / block.x % block.y, i % count / block.x / block.y);
    t.rank = i / count, t.lane = i % 32, t.warp = i / 32;
  }
}

// Clusters consist of neighbours along x.
inline void launch(dim3 grid, dim3 block, size_t shared_bytes, std::function<void()> body, int cluster = 1) {
  const Invisible _;
  if (shared_bytes > kShared) fail("a block wants " + std::to_string(shared_bytes) + " bytes of shared memory");
  if (grid.x % cluster) fail("a grid of " + std::to_string(grid.x) + " blocks is no multiple of the cluster");
#ifdef __SANITIZE_THREAD__
  machine.tsan = __tsan_get_current_fiber();
#endif
  make_threads(block, cluster);
  machine.body = std::move(body);
  blockDim = block, gridDim = grid;
  for (unsigned z = 0; z < grid.z; ++z)
    for (unsigned y = 0; y < grid.y; ++y)
      for (unsigned x = 0; x < grid.x; x += cluster) {
        for (int i = 0; i < machine.count; ++i)
          machine.threads[i].block = make_uint3(x + machine.threads[i].rank, y, z);
        run_block(shared_bytes);
      }
}

}  // namespace cmx::emulator

// ---- CUDA's names

inline void __syncthreads() { cmx::emulator::sync_block(); }
inline void __syncwarp(unsigned mask = ~0u) { cmx::emulator::sync_warp(mask); }
template <class V>
V __shfl_sync(unsigned mask, V v, int lane) {
  return cmx::emulator::shuffle(mask, v, lane);
}
template <class V>
V __shfl_xor_sync(unsigned mask, V v, int bits) {
  return cmx::emulator::shuffle(mask, v, cmx::emulator::self().lane ^ bits);
}
template <class V>
V __ldg(const V* p) {
  return *p;
}

#define CMX_DYNAMIC_SHARED(name) unsigned char* const name = cmx::emulator::machine.shared
#define CMX_LAUNCH(kernel, grid, block, shared_bytes, stream, ...) \
  (static_cast<void>(stream), cmx::emulator::launch(grid, block, shared_bytes, [=] { kernel(__VA_ARGS__); }))
#define CMX_LAUNCH_CHAINED(kernel, cluster, grid, block, shared_bytes, stream, ...) \
  (static_cast<void>(stream), cmx::emulator::launch(grid, block, shared_bytes, [=] { kernel(__VA_ARGS__); }, cluster))
#define cudaGetLastError() cudaSuccess
#define cudaFuncSetAttribute(...) cudaSuccess
