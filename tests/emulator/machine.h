// The emulated machine: what it and its threads consist of, and the fibers that the threads are. What they do: emulator.h.
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

// A read or write of shared memory, or a __syncthreads: no bytes
struct Access {
  uint32_t at, bytes;
};

struct Thread {
  void* stack_pointer;
  char* stack;
  uint3 index, block;
  int number;      // of all threads of the cluster
  int rank;        // of its block in the cluster
  int lane, warp;  // the warp counts through the cluster
  Waits waits;
  unsigned mask;           // the lanes it waits for
  unsigned char uses[2];   // of the block's and the warp's barrier: their parity names an address for TSan
  std::vector<Copy> open;  // cp.async since the last commit
  std::vector<std::vector<Copy>> groups;  // committed, oldest first
  std::function<bool()> event;            // has what it waits for happened?
  Underway underway;
  std::vector<Access> accesses;  // if banks are watched
  bool has_begun;          // begin_chained: it may touch global memory
  unsigned fences, shown;  // fence.proxy.async: how many, and how many before its last barrier
  void *asan, *tsan;
};

// The last ordinary write of a word of shared memory: by which thread, after how many of its fences
struct Written {
  int thread;
  unsigned fences;
};

// What get() and put() of a warp ask of shared memory: instructions, and cycles beyond those that their bytes take
struct BankUse {
  int accesses, conflicts;
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
  std::map<const void*, int> allowed;                      // shared memory of a kernel beyond 48 KB
  std::map<const void*, unsigned> launched;                // kernels, a bit for each order
  bool chained = false;                                    // the kernel says begin_chained
  NamedBarrier named[kCluster][16], whole;                 // by rank; of the cluster
  std::mt19937 dice;
  void *scheduler = nullptr, *asan = nullptr, *tsan = nullptr;
  const void* stack_bottom = nullptr;
  size_t stack_size = 0;
  unsigned char exchange[32][32][64];                            // [warp][lane]: what the lanes show each other
  char barrier[2][32 + kCluster], block_edge[2];                 // addresses that stand for barriers in TSan's eyes
  alignas(1024) unsigned char arenas[kCluster][kShared + 1024];  // and a red zone
  unsigned char* shared = arenas[0];                             // of the block whose turn it is
  Written written[kCluster][kShared / 4 + 4];                    // by word
  bool watch_banks = false;
  std::vector<BankUse> bank_use;  // between one __syncthreads and the next, of all blocks
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
    if (!self().has_begun) fail("a thread of a chained launch ends without begin_chained");
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
  t.accesses.clear();
  t.has_begun = !machine.chained;
  t.shown = ++t.fences;  // what earlier blocks wrote is none of its business
}

}  // namespace cmx::emulator
