// CUDA on the CPU, for tests: a .cu file compiled with g++ -DCMX_EMULATED includes this instead of the CUDA runtime.
//
// Every CUDA thread is a fiber that runs until it has to wait for others, so a run is deterministic and sees one thread
// order: forward, reverse, or random. What hardware leaves undefined is made visible:
//   shared memory         all NaN when a block starts; under AddressSanitizer out of bounds is an error with file:line
//   cp.async              arrives as late as its wait allows, or at once, as the caller chooses; so do copies of tensors
//                         (hopper.h)
//   a wait for nobody     ends the kernel with the number of threads at each kind of wait
//   chained launches      a thread that copies from or to global memory, or ends, before it says begin_chained is an error;
//                         its plain loads and stores are not seen
// Under ThreadSanitizer every fiber is a thread: barriers order memory, shuffles and mma do not, so a missing
// __syncthreads or __syncwarp is a reported race. Blocks run one after the other, or the blocks of a cluster together: races
// between others stay unseen.
#pragma once

#include "banks.h"

namespace cmx::emulator {

// ---- what a thread owes before it touches global memory, and before copies of tensors read what it wrote

inline void begin_chained() { self().has_begun = true; }

inline void expect_begun(const char* what) {
  if (!self().has_begun) fail(std::string(what) + " before begin_chained");
}

CMX_NO_TSAN inline void note_access(const void* p, size_t bytes) {
  if (!machine.watch_banks) return;
  const size_t at = reinterpret_cast<uintptr_t>(p) - reinterpret_cast<uintptr_t>(machine.shared);
  if (at < kShared) self().accesses.push_back({static_cast<uint32_t>(at), static_cast<uint32_t>(bytes)});
}

CMX_NO_TSAN inline void note_write(const void* p, size_t bytes) {
  note_access(p, bytes);
  const Thread& me = self();
  const size_t at = reinterpret_cast<uintptr_t>(p) - reinterpret_cast<uintptr_t>(machine.shared);
  if (at >= kShared) return;
  for (size_t word = at / 4; 4 * word < at + bytes; ++word) machine.written[me.rank][word] = {me.number, me.fences};
}

// At every barrier: whoever passes it may rely on this thread's fences so far.
inline void show_fences() { self().shown = self().fences; }

// ---- waiting: each returns when all threads concerned have arrived

inline void sync_block() {
  const Invisible _;
  show_fences();
  if (machine.watch_banks) self().accesses.push_back({0, 0});
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
  show_fences();
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
  expect_begun("cp.async");
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
  if (machine.watch_banks) count_bank_use();
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
    t.number = i, t.rank = i / count, t.lane = i % 32, t.warp = i / 32;
  }
}

// cudaFuncSetAttribute. The hardware allows it to fall, but another thread may be about to launch with what was.
inline cudaError_t allow_shared(const void* kernel, int bytes) {
  int& allowed = machine.allowed[kernel];
  if (bytes < allowed) fail("a kernel that was allowed " + std::to_string(allowed) + " bytes of shared memory loses some");
  allowed = bytes;
  return cudaSuccess;
}

// Clusters consist of neighbours along x.
inline cudaError_t launch(const void* kernel, dim3 grid, dim3 block, size_t shared_bytes, std::function<void()> body,
                          int cluster, bool chained) {
  const Invisible _;
  if (!grid.x || !grid.y || !grid.z) return cudaErrorInvalidConfiguration;
  if (shared_bytes > 48 << 10 && shared_bytes > size_t(machine.allowed[kernel])) return cudaErrorInvalidValue;
  if (shared_bytes > kShared) fail("a block wants " + std::to_string(shared_bytes) + " bytes of shared memory");
  if (grid.x % cluster) fail("a grid of " + std::to_string(grid.x) + " blocks is no multiple of the cluster");
#ifdef __SANITIZE_THREAD__
  machine.tsan = __tsan_get_current_fiber();
#endif
  make_threads(block, cluster);
  machine.body = std::move(body);
  machine.chained = chained;
  machine.launched[kernel] |= 1u << machine.order;
  blockDim = block, gridDim = grid;
  for (unsigned z = 0; z < grid.z; ++z)
    for (unsigned y = 0; y < grid.y; ++y)
      for (unsigned x = 0; x < grid.x; x += cluster) {
        for (int i = 0; i < machine.count; ++i)
          machine.threads[i].block = make_uint3(x + machine.threads[i].rank, y, z);
        run_block(shared_bytes);
      }
  return cudaSuccess;
}

}  // namespace cmx::emulator

// ---- CUDA's names

inline void __syncthreads() { cmx::emulator::sync_block(); }
inline void __threadfence() {}  // blocks run one after the other
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
#define cudaGetDevice(device) (*(device) = 0, cudaSuccess)
#define cudaGetLastError() cudaSuccess
#define cudaFuncSetAttribute(kernel, what, bytes) cmx::emulator::allow_shared(kernel, bytes)
