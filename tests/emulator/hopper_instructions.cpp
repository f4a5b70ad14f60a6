// The functions of csrc/cuda/hopper.cuh on random data, as instructions.cpp: tiles in and out by TMA, wgmma on them; a cluster.
#include <cstdio>
#include <cstring>
#include <random>
#include <vector>

#include "cuda/hopper.cuh"

using namespace cmx;

constexpr int THREADS = 128, TILE = 64 * 64;  // numbers of a tile
// Ragged tensors, smaller than a tile: a [60][56]; b [120][56] along k, or the same numbers [56][120] across k; y as a
constexpr int64_t K = 56, M = 60, N = 120, IMAGES = 2, NUMBERS = IMAGES * K * (2 * M + N), BYTES = 2 * NUMBERS;
constexpr int SUMS = 64 * THREADS, WORDS = 3 * TILE / 2;

struct Maps {
  TensorMap a, b_along_k, b_across_k, y;
};

// which 0, 1: a product with b along or across k, twice, in `sums`. 2: a tile of y, zeros outside it, through shared memory
// to `y`, its swizzled copy in `words`.
template <class T>
__global__ void __launch_bounds__(THREADS)
    hopper_kernel(const __grid_constant__ Maps maps, float* sums, uint32_t* words, int which) {
#if CMX_HAS_WGMMA
  CMX_DYNAMIC_SHARED(unaligned);
  unsigned char* const a = unaligned + (-shared_address(unaligned) & 1023);
  unsigned char* const b = a + 2 * TILE;
  uint64_t* const barrier = reinterpret_cast<uint64_t*>(b + 4 * TILE);
  const int thread = threadIdx.x;
  if (thread == 0) {
    mbarrier_init(barrier, 1 + THREADS / 32);
    mbarrier_init_done();
  }
  __syncthreads();
  if (thread == 0) {
    mbarrier_expect(barrier, 3 * 2 * TILE);
    load_tile(a, which == 2 ? maps.y : maps.a, 0, which == 2 ? 8 : 0, 1, barrier);
    if (which == 0)
      load_tile(b, maps.b_along_k, 0, 0, 1, barrier);
    else
      for (int i = 0; i < 2; ++i) load_tile(b + i * 2 * TILE, maps.b_across_k, 64 * i, 0, 1, barrier);
  }
  if (thread % 32 == 0) mbarrier_arrive(barrier);
  mbarrier_wait(barrier, 0);
  if (which == 2) {
    for (int i = thread; i < WORDS; i += THREADS) words[i] = get<uint32_t>(a + 4 * i);
    barrier_sync(1, THREADS);
    for (int i = thread; i < TILE / 2; i += THREADS) put(a + 4 * i, get<uint32_t>(a + 4 * i) ^ 0x80008000u);
    show_to_copies();
    if (thread >= 32) return barrier_arrive(2, THREADS);
    barrier_sync(2, THREADS);
    if (thread == 0) {
      store_tile(a, maps.y, 0, -8, 0);
      commit_stores();
      wait_for_stores_read();
    }
    return;
  }
  float d[64];
  const uint64_t at_a = operand(shared_address(a), 16, 1024);
  const uint64_t at_b = operand(shared_address(b), which ? 2 * TILE : 16, 1024);
  fence_products();
  for (int k = 0; k < 8; ++k) {
    if (which == 0)
      multiply_async<T, true>(d, at_a + k % 4 * 2, at_b + k % 4 * 2, k > 0);
    else
      multiply_async<T, false>(d, at_a + k % 4 * 2, at_b + k % 4 * 128, k > 0);
  }
  commit_products();
  wait_for_products<0>();
  products_done(d);
  for (int i = 0; i < 64; ++i) sums[thread * 64 + i] = d[i];
#endif
}

// Two blocks, a cluster: each brings a tile to both and, when all warps of both have arrived there, one to the other alone.
// `words`: the three tiles of each block.
__global__ void __launch_bounds__(THREADS) cluster_kernel(const __grid_constant__ Maps maps, uint32_t* words) {
#if CMX_HAS_WGMMA
  CMX_DYNAMIC_SHARED(unaligned);
  unsigned char* const tiles = unaligned + (-shared_address(unaligned) & 1023);
  uint64_t *const full = reinterpret_cast<uint64_t*>(tiles + 3 * 2 * TILE), *const empty = full + 1;
  const int thread = threadIdx.x, rank = blockIdx.x;
  if (thread == 0) {
    mbarrier_init(full, 1), mbarrier_init(empty, 2 * THREADS / 32);
    mbarrier_init_done();
  }
  cluster_sync();
  if (thread == 0) {
    mbarrier_expect(full, 2 * 2 * TILE);
    load_tile<true>(tiles + rank * 2 * TILE, rank ? maps.a : maps.y, 0, 8, 1, full, 3);
  }
  mbarrier_wait(full, 0);
  if (thread % 32 < 2) mbarrier_arrive_in(empty, thread % 32);
  if (thread == 0) {
    mbarrier_wait(empty, 0);
    mbarrier_expect(full, 2 * TILE);
    load_tile<true>(tiles + 2 * 2 * TILE, maps.a, 0, 0, rank, full, rank ? 1 : 2);
  }
  mbarrier_wait(full, 1);
  for (int i = thread; i < WORDS; i += THREADS) words[rank * WORDS + i] = get<uint32_t>(tiles + 4 * i);
  cluster_sync();
#endif
}

#ifdef CMX_EMULATED
#define cudaDeviceSynchronize() cudaSuccess
#endif

static void print(const char* name, const char* type, const void* from, int64_t count) {
  const uint32_t* const words = static_cast<const uint32_t*>(from);
  std::printf("%s %s:", name, type);
  for (int64_t i = 0; i < count; ++i) std::printf(" %08x", words[i]);
  std::printf("\n");
}

template <class T>
static int run(T* numbers, float* sums, uint32_t* words, const char* type) {
  std::mt19937 dice(3);
  for (int64_t i = 0; i < NUMBERS; ++i) numbers[i] = T(static_cast<int>(dice() % 2001) / 500.f - 2);
  T *const b = numbers + IMAGES * K * M, *const y = b + IMAGES * K * N;
  Maps maps;
  const int64_t along_a[] = {K, M, IMAGES}, along_b[] = {K, N, IMAGES}, across[] = {N, K, IMAGES};
  const int64_t stride_a[] = {2 * K, 2 * K * M}, stride_b[] = {2 * K, 2 * K * N}, stride_across[] = {2 * N, 2 * N * K};
  if (encode_tensor_map(&maps.a, numbers, along_a, stride_a, 64) ||
      encode_tensor_map(&maps.b_along_k, b, along_b, stride_b, 128) ||
      encode_tensor_map(&maps.b_across_k, b, across, stride_across, 64) ||
      encode_tensor_map(&maps.y, y, along_a, stride_a, 64)) {
    std::printf("no tensor map\n");
    return 1;
  }
  constexpr int SHARED = 1024 + 6 * TILE + 16;
  const char* names[] = {"wgmma, b along k", "wgmma, b across k"};
  for (int which = 0; which < 3; ++which) {
    const Launch how{.grid = 1, .threads = THREADS, .shared_bytes = SHARED, .chained = false};
    if (cudaError_t error = launch(hopper_kernel<T>, how, maps, sums, words, which)) return std::printf("error %d\n", error), 1;
    if (cudaError_t error = cudaDeviceSynchronize()) return std::printf("error %d\n", error), 1;
    if (which < 2) print(names[which], type, sums, SUMS);
  }
  print("cp.async.bulk.tensor in", type, words, WORDS);
  print("cp.async.bulk.tensor out", type, y, IMAGES * K * M / 2);
  const Launch both{.grid = 2, .threads = THREADS, .shared_bytes = SHARED, .cluster = 2, .chained = false};
  if (cudaError_t error = launch(cluster_kernel, both, maps, words)) return std::printf("error %d\n", error), 1;
  if (cudaError_t error = cudaDeviceSynchronize()) return std::printf("error %d\n", error), 1;
  print("cp.async.bulk.tensor multicast", type, words, 2 * WORDS);
  return 0;
}

int main() {
  void *numbers, *sums, *words;
#ifdef CMX_EMULATED
  std::vector<char> memory(BYTES + 4 * (SUMS + 2 * WORDS) + 16);
  numbers = reinterpret_cast<void*>((reinterpret_cast<uintptr_t>(memory.data()) + 15) & ~uintptr_t(15));
  sums = static_cast<char*>(numbers) + BYTES, words = static_cast<char*>(sums) + 4 * SUMS;
#else
  if (cudaMallocManaged(&numbers, BYTES) || cudaMallocManaged(&sums, 4 * SUMS) ||
      cudaMallocManaged(&words, 4 * 2 * WORDS))
    return std::printf("no memory\n"), 1;
#endif
  float* const s = static_cast<float*>(sums);
  uint32_t* const w = static_cast<uint32_t*>(words);
  return run(static_cast<bf16*>(numbers), s, w, "bf16") + run(static_cast<fp16*>(numbers), s, w, "fp16");
}
