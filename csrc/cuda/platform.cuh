// What a kernel file includes first: the CUDA runtime under nvcc, its emulation on the CPU (tests/emulator) under g++.
#pragma once

#ifdef CMX_EMULATED
#include "emulator.h"
#else
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <atomic>
#include <cstdint>
#include <cstring>

// The shared memory whose size the launch names
#define CMX_DYNAMIC_SHARED(name) extern __shared__ __align__(128) unsigned char name[]
#define CMX_LAUNCH(kernel, grid, block, shared_bytes, stream, ...) \
  kernel<<<grid, block, shared_bytes, stream>>>(__VA_ARGS__)
// A kernel that says begin_chained() (ptx.cuh) before it touches global memory: so it may be
// launched while the kernel before it on the stream still runs ("programmatic dependent launch"). `cluster`: how many blocks
// are one, more than 1 from compute capability 9.0 on.
#define CMX_LAUNCH_CHAINED(kernel, cluster, grid, block, shared_bytes, stream, ...) \
  cmx::launch_chained(kernel, cluster, grid, block, shared_bytes, stream, __VA_ARGS__)

namespace cmx {

// Does begin_chained() do anything on the current device? Not in code compiled from the PTX of an older one. And can graphs
// capture such launches? Not with drivers before CUDA 12.3.
template <class Kernel>
bool is_chained(Kernel* kernel) {
  constexpr int kDevices = 64;
  static std::atomic<signed char> known[kDevices];  // 0: not asked yet
  int device = 0;
  if (cudaGetDevice(&device) || device >= kDevices) return false;
  if (!known[device]) {
    cudaFuncAttributes attributes;
    int driver = 0;
    const bool there = cudaDriverGetVersion(&driver) == cudaSuccess && driver >= 12030 &&
                       cudaFuncGetAttributes(&attributes, kernel) == cudaSuccess && attributes.ptxVersion >= 90;
    known[device] = there ? 1 : -1;
  }
  return known[device] > 0;
}

template <class... Wanted, class... Given>
cudaError_t launch_chained(void (*kernel)(Wanted...), int cluster, dim3 grid, dim3 block, size_t shared_bytes,
                           cudaStream_t stream, const Given&... arguments) {
  cudaLaunchAttribute attributes[2]{};
  cudaLaunchConfig_t config{};
  config.gridDim = grid, config.blockDim = block, config.dynamicSmemBytes = shared_bytes, config.stream = stream;
  config.attrs = attributes;
  if (is_chained(kernel)) {
    attributes[config.numAttrs].id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attributes[config.numAttrs++].val.programmaticStreamSerializationAllowed = 1;
  }
  if (cluster > 1) {
    attributes[config.numAttrs].id = cudaLaunchAttributeClusterDimension;
    attributes[config.numAttrs++].val.clusterDim = {static_cast<unsigned>(cluster), 1, 1};
  }
  return cudaLaunchKernelEx(&config, kernel, arguments...);
}

}  // namespace cmx
#endif

namespace cmx {

using bf16 = __nv_bfloat16;
using fp16 = __half;

// Enqueues a chained kernel whose shared memory may be more than the 48 KB that need no permission
template <class Kernel, class... Arguments>
cudaError_t launch(Kernel kernel, int blocks, int threads, int shared_bytes, cudaStream_t stream,
                   const Arguments&... arguments) {
  if (shared_bytes > 48 << 10)
    if (cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes))
      return error;
  CMX_LAUNCH_CHAINED(kernel, 1, dim3(blocks), dim3(threads), shared_bytes, stream, arguments...);
  return cudaGetLastError();
}

}  // namespace cmx
