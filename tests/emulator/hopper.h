// What sm_90 has besides: mbarriers, named barriers, copies of tensors (TMA) and wgmma. csrc/cuda/hopper.cuh calls these.
//
//   mbarrier           counts arrivals and bytes; one that was not initialised, or gets too many arrivals, is an error
//   copies of tensors  land as late as possible, stores last, or at once; memory outside the tensor is not touched. A store
//                      reads shared memory when it lands. TSan does not see them (a store: reads when it begins).
//   wgmma              multiplies at once where loads are late, else when it is waited for; every bit of the descriptors
//                      counts. It wants a wgmma.fence after every wait: more than the hardware asks of untouched registers.
//   clusters           of two blocks: copies to both, arrivals at the mbarriers of either; a block that has exited takes none
//   fence.proxy.async  a store by TMA of what put() wrote is an error unless the writer has fenced it: before a barrier that it
//                      arrived at, or, if it stores the tile itself, before the store. A fence of the storing thread for
//                      what others wrote does not count: more than the hardware asks.
// Not modelled: fences for wgmma, and for loads by TMA over memory that threads wrote (the stages of the one kernel here belong
// to TMA and wgmma alone); ordinary access to another block's memory.
#pragma once

#include "emulator.h"

namespace cmx::emulator {

// ---- mbarriers

inline Mbarrier& mbarrier_at(uint32_t address, int rank) {
  const auto found = machine.mbarriers.find({rank, address});
  if (found == machine.mbarriers.end()) fail("mbarrier " + std::to_string(address) + " was not initialised");
  return found->second;
}

inline void complete_phase(Mbarrier& b) {
  if (b.pending == 0 && b.bytes == 0) b.pending = b.count, b.phase ^= 1;
}

inline void init_mbarrier(uint32_t address, int count) {
  const Invisible _;
  if (address % 8 || count < 1) fail("mbarrier.init: a misaligned address, or no arrivals");
  machine.mbarriers[{self().rank, address}] = {count, count, 0, 0};
}

// A block of the cluster that has exited takes nothing more.
inline void expect_alive(int rank) {
  for (int i = 0; i < machine.count; ++i)
    if (machine.threads[i].rank == rank && machine.threads[i].waits != Waits::done) return;
  fail("block " + std::to_string(rank) + " of the cluster has exited");
}

inline void arrive_mbarrier(uint32_t address, int64_t bytes, int rank) {
  const Invisible _;
  show_fences();
  expect_alive(rank);
  Mbarrier& b = mbarrier_at(address, rank);
  release(&b);
  if (b.pending == 0) fail("mbarrier " + std::to_string(address) + ": more arrivals than it counts");
  b.bytes += bytes, --b.pending;
  complete_phase(b);
}

inline void wait_mbarrier(uint32_t address, unsigned parity) {
  const Invisible _;
  Mbarrier& b = mbarrier_at(address, self().rank);
  wait_until([&b, parity] { return b.phase != parity; });
  acquire(&b);
}

// ---- named barriers, and the one of the cluster

inline char* arrive_at(NamedBarrier& b, int threads) {
  if (b.here && b.expected != threads) fail("bar: the threads at a barrier name different counts");
  show_fences();
  char* const edge = &b.edge[b.uses & 1];
  release(edge);
  b.expected = threads;
  if (++b.here == threads) b.here = 0, ++b.uses;
  return edge;
}

inline void sync_at(NamedBarrier& b, int threads) {
  const unsigned use = b.uses;
  char* const edge = arrive_at(b, threads);
  wait_until([&b, use] { return b.uses != use; });
  acquire(edge);
}

inline NamedBarrier& named(int id, int threads) {
  if (id < 1 || id > 15 || threads % 32) fail("bar: wanted a barrier from 1 to 15, and whole warps");
  return machine.named[self().rank][id];
}

inline void arrive_named(int id, int threads) {
  const Invisible _;
  arrive_at(named(id, threads), threads);
}

inline void sync_named(int id, int threads) {
  const Invisible _;
  sync_at(named(id, threads), threads);
}

inline void sync_cluster() {
  const Invisible _;
  sync_at(machine.whole, machine.count);
}

// ---- copies of tensors: 16-bit numbers, rows of 64 in the tile, 128-byte swizzle

struct TensorMap {
  unsigned char* base;
  int64_t size[3], stride[3];  // numbers, bytes
  int box[3];
};

// cuTensorMapEncodeTiled, and what it refuses
inline bool encode_tensor_map(TensorMap* map, const void* base, const int64_t* size, const int64_t* stride,
                              const int* box) {
  *map = {static_cast<unsigned char*>(const_cast<void*>(base)), {}, {2}, {}};
  if (reinterpret_cast<uintptr_t>(base) % 16 || box[0] != 64) return false;
  for (int i = 0; i < 3; ++i) {
    map->size[i] = size[i], map->box[i] = box[i];
    if (size[i] < 1 || size[i] > int64_t(1) << 32 || box[i] < 1 || box[i] > 256) return false;
    if (i == 0) continue;
    map->stride[i] = stride[i - 1];
    if (map->stride[i] <= 0 || map->stride[i] % 16 || map->stride[i] >> 40) return false;
    if (map->stride[i] < 2 * size[0] || (i == 2 && map->stride[2] % map->stride[1])) return false;
  }
  return true;
}

inline uint32_t swizzled_address(uint32_t address) { return address ^ (address >> 7 & 7) << 4; }

inline unsigned char* shared_byte(uint32_t address, int rank) {
  if (address >= kShared) fail("shared address out of range");
  return machine.arenas[rank] + address;
}

// run(shared, global, bytes) for every 16 bytes of the tile; `bytes` of them lie inside the tensor
template <class F>
void over_tile(const TensorMap& map, uint32_t shared, int rank, const int* at, const F& run) {
  if (shared % 1024) fail("TMA: a tile does not start where its swizzle does");
  for (int z = 0; z < map.box[2]; ++z)
    for (int y = 0; y < map.box[1]; ++y)
      for (int x = 0; x < map.box[0]; x += 8) {
        const int64_t c[3] = {at[0] + x, at[1] + y, at[2] + z};
        bool inside = c[0] >= 0;  // the rest of a row is cut off below
        for (int i = 1; i < 3; ++i) inside = inside && c[i] >= 0 && c[i] < map.size[i];
        const int64_t count = inside ? std::clamp<int64_t>(map.size[0] - c[0], 0, 8) : 0;
        run(shared_byte(swizzled_address(shared + ((z * map.box[1] + y) * map.box[0] + x) * 2), rank),
            map.base + c[0] * 2 + c[1] * map.stride[1] + c[2] * map.stride[2], 2 * count);
      }
}

// The words of 16 bytes in shared memory, as ordinary writes left them
inline Written* written_at(const unsigned char* bytes, int rank) {
  return machine.written[rank] + (bytes - machine.arenas[rank]) / 4;
}

inline void expect_shown(const unsigned char* from, int rank) {
  for (int i = 0; i < 4; ++i) {
    const Written& w = written_at(from, rank)[i];
    const Thread& writer = machine.threads[w.thread];
    if (w.fences >= (&writer == &self() ? writer.fences : writer.shown))
      fail("TMA stores what a thread wrote without fence.proxy.async before its barrier");
  }
}

inline void begin(std::vector<std::function<void()>>& copies, std::function<void()> land) {
  if (machine.copies_arrive_at_once)
    land();
  else
    copies.push_back(std::move(land));
}

// To the blocks of the cluster that `ranks` has a bit for, at the same address in each; they land one by one.
inline void load_tile(const TensorMap& map, uint32_t shared, int c0, int c1, int c2, uint32_t mbarrier,
                      unsigned ranks) {
  const Invisible _;
  expect_begun("a load by TMA");
  for (int rank = 0; rank < kCluster; ++rank) {
    if (!(ranks >> rank & 1)) continue;
    mbarrier_at(mbarrier, rank);
    begin(machine.loads, [=] {
      expect_alive(rank);
      const int at[3] = {c0, c1, c2};
      over_tile(map, shared, rank, at, [rank](unsigned char* to, const unsigned char* from, size_t bytes) {
        std::memset(to, 0, 16);
        std::fill_n(written_at(to, rank), 4, Written{});
        if (bytes) std::memcpy(to, from, bytes);
      });
      Mbarrier& b = mbarrier_at(mbarrier, rank);
      b.bytes -= 2 * int64_t(map.box[0]) * map.box[1] * map.box[2];
      complete_phase(b);
    });
  }
}

inline void store_tile(const TensorMap& map, uint32_t shared, int c0, int c1, int c2) {
  const int at[3] = {c0, c1, c2}, rank = self().rank;
#ifdef __SANITIZE_THREAD__
  over_tile(map, shared, rank, at, [](const volatile unsigned char* from, unsigned char*, size_t) { *from; });
#endif
  const Invisible _;
  expect_begun("a store by TMA");
  over_tile(map, shared, rank, at, [rank](const unsigned char* from, unsigned char*, size_t bytes) {
    if (bytes) expect_shown(from, rank);
  });
  const auto read = std::make_shared<bool>(false);
  self().underway.stores.back().push_back(read);
  begin(machine.stores, [=] {
    over_tile(map, shared, rank, at, [](const unsigned char* from, unsigned char* to, size_t bytes) {
      if (bytes) std::memcpy(to, from, bytes);
    });
    *read = true;
  });
}

inline void commit_stores() {
  const Invisible _;
  self().underway.stores.emplace_back();
}

inline void wait_for_stores_read(size_t groups_in_flight) {
  const Invisible _;
  auto& stores = self().underway.stores;  // the last group is open
  while (stores.size() - 1 > groups_in_flight) {
    wait_until(
        [group = stores.front()] { return std::all_of(group.begin(), group.end(), [](auto& r) { return *r; }); });
    stores.erase(stores.begin());
  }
}

// ---- wgmma

// Where number (i, k) of an operand lies, i along its rows (M or N). Offsets of the descriptor: K-major, from 8 rows to the
// next (stride). Else (leading) from 64 numbers along i to the next, (stride) from 8 k to the next.
struct Operand {
  uint32_t start, leading, stride;
  bool along_k;
  int rank = self().rank;

  Operand(uint64_t bits, bool k_major)
      : start((bits & 0x3fff) << 4),
        leading((bits >> 16 & 0x3fff) << 4),
        stride((bits >> 32 & 0x3fff) << 4),
        along_k(k_major) {
    if (bits & 0x3fffc000c000c000) fail("wgmma: bits of a descriptor that are not modelled");
    if (bits >> 62 != 1) fail("wgmma: only the 128-byte swizzle is modelled");
    if (start % 1024 >= (along_k ? 128 : 16)) fail("wgmma: a tile does not start where its swizzle does");
  }

  uint32_t address(int i, int k) const {
    return swizzled_address(along_k ? start + i / 8 * stride + i % 8 * 128 + k * 2
                                    : start + i / 64 * leading + k / 8 * stride + k % 8 * 128 + i % 64 * 2);
  }

  // out[k] for 16 k; what lies in 16 bytes stays together
  template <class T>
  void row(int i, float* out) const {
    T v[8];
    for (int k = 0; k < 16; k += 8) {
      if (along_k) std::memcpy(v, shared_byte(address(i, k), rank), 16);
      for (int e = 0; e < 8; ++e) {
        if (!along_k) std::memcpy(v + e, shared_byte(address(i, k + e), rank), 2);
        out[k + e] = static_cast<float>(v[e]);
      }
    }
  }
};

// d (+)= A [64][16] B [16][8 J]: warp w of four, lane 4g + t: rows 16w + g and + 8, columns 8j + 2t and + 1
template <class T, int J>
void multiply_async(float* d, uint64_t a_bits, uint64_t b_bits, bool b_along_k, bool add) {
  const Invisible _;
  Thread& me = self();
  if (!me.underway.fenced) fail("wgmma without a wgmma.fence after the start or the last wait");
  const Operand a(a_bits, true), b(b_bits, b_along_k);
  const int g = me.lane / 4, t = me.lane % 4, row = me.warp % 4 * 16 + g;
  auto multiply = [=] {
    float rows[2][16], column[16];
    for (int h = 0; h < 2; ++h) a.template row<T>(row + 8 * h, rows[h]);
    for (int j = 0; j < J; ++j)
      for (int e = 0; e < 2; ++e) {
        float sum[2] = {0.f, 0.f};
        b.template row<T>(8 * j + 2 * t + e, column);
        for (int k = 0; k < 16; ++k) sum[0] += rows[0][k] * column[k], sum[1] += rows[1][k] * column[k];
        for (int h = 0; h < 2; ++h) d[4 * j + 2 * h + e] = (add ? d[4 * j + 2 * h + e] : 0.f) + sum[h];
      }
  };
  if (!machine.copies_arrive_at_once)
    multiply();
  else
    me.underway.products.back().push_back(multiply);
}

inline void fence_products() {
  converge(~0u);
  self().underway.fenced = true;
}

inline void commit_products() {
  const Invisible _;
  self().underway.products.emplace_back();
}

inline void wait_for_products(size_t groups_in_flight) {
  {
    const Invisible _;
    auto& groups = self().underway.products;  // the last group is open
    while (groups.size() - 1 > groups_in_flight) {
      for (const auto& multiply : groups.front()) multiply();
      groups.erase(groups.begin());
    }
    self().underway.fenced = false;
  }
  converge(~0u);  // all lanes have read
}

}  // namespace cmx::emulator
