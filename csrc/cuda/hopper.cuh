// Hopper's asynchronous instructions, as ptx.cuh: mbarriers, named barriers, copies of tensors (TMA), wgmma. 16-bit numbers.
//
// Only code for sm_90a may call them: CMX_HAS_WGMMA tells whether this pass of the compiler makes such code.
// A tile in shared memory starts at a multiple of 1024 bytes and has rows of 64 numbers, 128 bytes; bits 4-6 of a byte address
// are XORed with bits 7-9 (the "128-byte swizzle" of copies and of wgmma).
#pragma once

#include "ptx.cuh"

#ifdef CMX_EMULATED
#include "hopper.h"
#define CMX_HAS_WGMMA 1
#else
#include <cuda.h>  // types only: nothing of the driver is linked
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
#define CMX_HAS_WGMMA 1
#else
#define CMX_HAS_WGMMA 0
#endif
#endif

namespace cmx {

// ---- registers of a thread: four warps together give some back, or take what others gave. Kernels with a
// __launch_bounds__(threads, 1) only, each role one branch of one if.

template <int Registers>
__device__ __forceinline__ void keep_registers() {
#ifndef CMX_EMULATED
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(Registers));
#endif
}
template <int Registers>
__device__ __forceinline__ void take_registers() {
#ifndef CMX_EMULATED
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(Registers));
#endif
}

// ---- mbarriers: a phase ends when all arrivals and all announced bytes are there; phases have parity 0, 1, 0, ...

__device__ __forceinline__ void mbarrier_init(uint64_t* barrier, int arrivals) {
#ifdef CMX_EMULATED
  emulator::init_mbarrier(shared_address(barrier), arrivals);
#else
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(barrier)), "r"(arrivals) : "memory");
#endif
}

// Behind all mbarrier_init, before the barrier that shows them to the others: the copy engine sees them too.
__device__ __forceinline__ void mbarrier_init_done() {
#ifndef CMX_EMULATED
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
#endif
}

__device__ __forceinline__ void mbarrier_arrive(uint64_t* barrier) {
#ifdef CMX_EMULATED
  emulator::arrive_mbarrier(shared_address(barrier), 0, emulator::self().rank);
#else
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(barrier)) : "memory");
#endif
}

// At the mbarrier with this address in another block of the cluster, or in this one. Orders no memory beyond this block: says
// only that products have been waited for, which read a stage. `.release.cluster` would fence the whole GPU, in every step.
__device__ __forceinline__ void mbarrier_arrive_in(uint64_t* barrier, int rank) {
#ifdef CMX_EMULATED
  emulator::arrive_mbarrier(shared_address(barrier), 0, rank);
#else
  asm volatile(
      "{\n.reg .b32 there;\n"
      "mapa.shared::cluster.u32 there, %0, %1;\n"
      "mbarrier.arrive.shared::cluster.b64 _, [there];\n}" ::"r"(shared_address(barrier)),
      "r"(rank)
      : "memory");
#endif
}

// Arrives, and announces bytes that copies will bring.
__device__ __forceinline__ void mbarrier_expect(uint64_t* barrier, int bytes) {
#ifdef CMX_EMULATED
  emulator::arrive_mbarrier(shared_address(barrier), bytes, emulator::self().rank);
#else
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(barrier)), "r"(bytes)
               : "memory");
#endif
}

// Waits for the end of the phase of this parity. Before any phase has ended, one of parity 1 has.
__device__ __forceinline__ void mbarrier_wait(uint64_t* barrier, unsigned parity) {
#ifdef CMX_EMULATED
  emulator::wait_mbarrier(shared_address(barrier), parity);
#else
  unsigned done;
  do {
    asm volatile(
        "{\n.reg .pred p;\n"
        "mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2;\n"
        "selp.u32 %0, 1, 0, p;\n}"
        : "=r"(done)
        : "r"(shared_address(barrier)), "r"(parity)
        : "memory");
  } while (!done);
#endif
}

// ---- named barriers, 1 to 15 (0 is __syncthreads): `threads` arrive, of which those that sync also wait

__device__ __forceinline__ void barrier_sync(int id, int threads) {
#ifdef CMX_EMULATED
  emulator::sync_named(id, threads);
#else
  asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
#endif
}

__device__ __forceinline__ void barrier_arrive(int id, int threads) {
#ifdef CMX_EMULATED
  emulator::arrive_named(id, threads);
#else
  asm volatile("bar.arrive %0, %1;" ::"r"(id), "r"(threads) : "memory");
#endif
}

// All threads of all blocks of the cluster; memory that they wrote before is visible behind it.
__device__ __forceinline__ void cluster_sync() {
#ifdef CMX_EMULATED
  emulator::sync_cluster();
#else
  asm volatile("barrier.cluster.arrive.release;\nbarrier.cluster.wait.acquire;" ::: "memory");
#endif
}

// ---- copies of tensors of three dimensions, the first without gaps. Outside the tensor, loads give zeros, stores nothing.

#ifdef CMX_EMULATED
using TensorMap = emulator::TensorMap;
#else
using TensorMap = CUtensorMap;
#endif

// As the driver encodes one, through its function as it is found at run time: nothing is linked.
#ifndef CMX_EMULATED
inline auto tensor_map_encoder() {
  static const auto found = [] {
    void* function = nullptr;
    cudaDriverEntryPointQueryResult result = cudaDriverEntryPointSymbolNotFound;
#if CUDART_VERSION >= 12050
    const cudaError_t error =
        cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function, 12000, cudaEnableDefault, &result);
#else
    const cudaError_t error = cudaGetDriverEntryPoint("cuTensorMapEncodeTiled", &function, cudaEnableDefault, &result);
#endif
    const bool there = taken(error) == cudaSuccess && result == cudaDriverEntryPointSuccess;
    return reinterpret_cast<decltype(&cuTensorMapEncodeTiled)>(there ? function : nullptr);  // null without a driver
  }();
  return found;
}
#endif

// A tensor of `size` numbers, strides of the second and third dimension in bytes, in boxes of 64 x rows x 1 or 64 x 1 x rows
inline cudaError_t encode_tensor_map(TensorMap* map, const void* base, const int64_t (&size)[3],
                                     const int64_t (&stride)[2], int rows, bool rows_last = false) {
  const int second = rows_last ? 1 : rows, third = rows_last ? rows : 1;
#ifdef CMX_EMULATED
  const int box[3] = {64, second, third};
  return emulator::encode_tensor_map(map, base, size, stride, box) ? cudaSuccess : cudaErrorInvalidValue;
#else
  if (!tensor_map_encoder()) return cudaErrorNotSupported;
  const cuuint64_t sizes[3] = {cuuint64_t(size[0]), cuuint64_t(size[1]), cuuint64_t(size[2])};
  const cuuint64_t strides[2] = {cuuint64_t(stride[0]), cuuint64_t(stride[1])};
  const cuuint32_t box[3] = {64, cuuint32_t(second), cuuint32_t(third)}, every[3] = {1, 1, 1};
  const CUresult result =
      tensor_map_encoder()(map, CU_TENSOR_MAP_DATA_TYPE_UINT16, 3, const_cast<void*>(base), sizes, strides, box, every,
                           CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
                           CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  return result == CUDA_SUCCESS ? cudaSuccess : cudaErrorInvalidValue;
#endif
}

// Brings one box to shared memory and its bytes, all of them, to `barrier`. MULTICAST: to every block of the cluster that
// `ranks` has a bit for, at the same addresses and mbarriers in each; else to this one.
template <bool MULTICAST = false>
__device__ __forceinline__ void load_tile(void* to, const TensorMap& map, int c0, int c1, int c2, uint64_t* barrier,
                                          [[maybe_unused]] unsigned ranks = 0) {
#ifdef CMX_EMULATED
  emulator::load_tile(map, shared_address(to), c0, c1, c2, shared_address(barrier),
                      MULTICAST ? ranks : 1u << emulator::self().rank);
#else
#define CMX_LOAD(form)                                                                                             \
  asm volatile(                                                                                                    \
      "cp.async.bulk.tensor.3d.shared::cluster.global.mbarrier::complete_tx::bytes" form::"r"(shared_address(to)), \
      "l"(&map), "r"(c0), "r"(c1), "r"(c2), "r"(shared_address(barrier)), "h"(static_cast<uint16_t>(ranks))        \
      : "memory")
  if constexpr (MULTICAST)
    CMX_LOAD(".multicast::cluster [%0], [%1, {%2, %3, %4}], [%5], %6;");
  else
    CMX_LOAD(" [%0], [%1, {%2, %3, %4}], [%5];");
#undef CMX_LOAD
#endif
}

// Ordinary writes of this thread to shared memory become visible to store_tile: before the barrier that joins the writers.
__device__ __forceinline__ void show_to_copies() {
#ifdef CMX_EMULATED
  ++emulator::self().fences;
#else
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
#endif
}

__device__ __forceinline__ void store_tile(const void* from, const TensorMap& map, int c0, int c1, int c2) {
#ifdef CMX_EMULATED
  emulator::store_tile(map, shared_address(from), c0, c1, c2);
#else
  asm volatile("cp.async.bulk.tensor.3d.global.shared::cta.bulk_group [%0, {%1, %2, %3}], [%4];" ::"l"(&map), "r"(c0),
               "r"(c1), "r"(c2), "r"(shared_address(from))
               : "memory");
#endif
}

// Ends a group of stores.
__device__ __forceinline__ void commit_stores() {
#ifdef CMX_EMULATED
  emulator::commit_stores();
#else
  asm volatile("cp.async.bulk.commit_group;" ::: "memory");
#endif
}

// Waits until this thread's stores have read shared memory.
__device__ __forceinline__ void wait_for_stores_read() {
#ifdef CMX_EMULATED
  emulator::wait_for_stores_read(0);
#else
  asm volatile("cp.async.bulk.wait_group.read 0;" ::: "memory");
#endif
}

// What all lanes of a warp have, so that the compiler knows it: addresses then live in the warp's own registers, where wgmma
// takes its operands from. From the lanes' registers a step would spend more time on moving them than on its products.
template <class V>
__device__ __forceinline__ V of_warp(V v) {
#ifdef CMX_EMULATED
  return v;
#else
  if constexpr (sizeof(V) == 8)
    return reinterpret_cast<V>(__shfl_sync(~0u, reinterpret_cast<unsigned long long>(v), 0));
  else
    return __shfl_sync(~0u, v, 0);
#endif
}

// ---- wgmma: four warps, the first of which is a multiple of four

// The descriptor of an operand in shared memory, offsets in bytes. `along_k`: its rows of 64 numbers lie along k, and
// `stride` is from 8 rows to the next. Else its rows lie across k: `leading` is from 64 numbers of a row to the next 64,
// `stride` from 8 rows (k) to the next.
__device__ __forceinline__ uint64_t operand(uint32_t address, int leading, int stride) {
  constexpr uint64_t kSwizzle128 = 1;
  return (address & 0x3ffff) >> 4 | uint64_t(leading >> 4) << 16 | uint64_t(stride >> 4) << 32 | kSwizzle128 << 62;
}

// The same operand so many times 16 bytes further: only its lower half changes, which has room for every address
__device__ __forceinline__ uint64_t further(uint64_t operand, uint32_t sixteens) {
  return (operand >> 32) << 32 | (static_cast<uint32_t>(operand) + sixteens);
}

// Before the first product, and after every wait: registers written so far belong to the products.
__device__ __forceinline__ void fence_products() {
#ifdef CMX_EMULATED
  emulator::fence_products();
#else
  asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
#endif
}

__device__ __forceinline__ void commit_products() {
#ifdef CMX_EMULATED
  emulator::commit_products();
#else
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
#endif
}

// Waits until at most `Groups` groups of products are in flight.
template <int Groups>
__device__ __forceinline__ void wait_for_products() {
#ifdef CMX_EMULATED
  emulator::wait_for_products(Groups);
#else
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(Groups) : "memory");
#endif
}

// Behind the wait for their products: the compiler reads these registers no earlier. No instruction.
template <int N>
__device__ __forceinline__ void products_done([[maybe_unused]] float (&d)[N]) {
#ifndef CMX_EMULATED
#pragma unroll
  for (int i = 0; i < N; ++i) asm volatile("" : "+f"(d[i])::"memory");
#endif
}

// d = a b, plus d where `add`: a [64][16] along k, b [16][128]. Warp w of the four, lane 4g + t, holds rows 16w + g and + 8,
// columns 8j + 2t and + 1: d[4j..] = (g, 2t), (g, 2t+1), (g+8, 2t), (g+8, 2t+1). d is not touched before the wait.
template <class T, bool B_ALONG_K>
__device__ __forceinline__ void multiply_async(float (&d)[64], uint64_t a, uint64_t b, bool add) {
#ifdef CMX_EMULATED
  emulator::multiply_async<T, 16>(d, a, b, B_ALONG_K, add);
#else
#define CMX_MULTIPLY(type)                                                                                          \
  asm volatile(                                                                                                     \
      "{\n.reg .pred p;\nsetp.ne.b32 p, %66, 0;\n"                                                                  \
      "wgmma.mma_async.sync.aligned.m64n128k16.f32." type "." type                                                  \
      " {"                                                                                                          \
      "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "                                      \
      "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, "                            \
      "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, "                            \
      "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"                              \
      "}, %64, %65, p, 1, 1, 0, %67;\n}"                                                                            \
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]), "+f"(d[4]), "+f"(d[5]), "+f"(d[6]), "+f"(d[7]), "+f"(d[8]), \
        "+f"(d[9]), "+f"(d[10]), "+f"(d[11]), "+f"(d[12]), "+f"(d[13]), "+f"(d[14]), "+f"(d[15]), "+f"(d[16]),      \
        "+f"(d[17]), "+f"(d[18]), "+f"(d[19]), "+f"(d[20]), "+f"(d[21]), "+f"(d[22]), "+f"(d[23]), "+f"(d[24]),     \
        "+f"(d[25]), "+f"(d[26]), "+f"(d[27]), "+f"(d[28]), "+f"(d[29]), "+f"(d[30]), "+f"(d[31]), "+f"(d[32]),     \
        "+f"(d[33]), "+f"(d[34]), "+f"(d[35]), "+f"(d[36]), "+f"(d[37]), "+f"(d[38]), "+f"(d[39]), "+f"(d[40]),     \
        "+f"(d[41]), "+f"(d[42]), "+f"(d[43]), "+f"(d[44]), "+f"(d[45]), "+f"(d[46]), "+f"(d[47]), "+f"(d[48]),     \
        "+f"(d[49]), "+f"(d[50]), "+f"(d[51]), "+f"(d[52]), "+f"(d[53]), "+f"(d[54]), "+f"(d[55]), "+f"(d[56]),     \
        "+f"(d[57]), "+f"(d[58]), "+f"(d[59]), "+f"(d[60]), "+f"(d[61]), "+f"(d[62]), "+f"(d[63])                   \
      : "l"(a), "l"(b), "r"(int(add)), "n"(B_ALONG_K ? 0 : 1))
  if constexpr (is_bf16<T>)
    CMX_MULTIPLY("bf16");
  else
    CMX_MULTIPLY("f16");
#undef CMX_MULTIPLY
#endif
}

}  // namespace cmx
