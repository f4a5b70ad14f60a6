// What a kernel file includes first: the CUDA runtime under nvcc, its emulation on the CPU (tests/emulator) under g++.
#pragma once

#ifdef CMX_EMULATED
#include "emulator.h"
#else
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>
#include <cstring>

// The shared memory whose size the launch names
#define CMX_DYNAMIC_SHARED(name) extern __shared__ __align__(128) unsigned char name[]
#define CMX_LAUNCH(kernel, grid, block, shared_bytes, stream, ...) \
  kernel<<<grid, block, shared_bytes, stream>>>(__VA_ARGS__)
// With `cluster` neighbouring blocks on neighbouring multiprocessors; on compute capability 9.0 and later
#define CMX_LAUNCH_CLUSTERS(kernel, cluster, grid, block, shared_bytes, stream, ...) \
  cmx::launch_clusters(kernel, cluster, grid, block, shared_bytes, stream, __VA_ARGS__)

namespace cmx {
template <class... Wanted, class... Given>
cudaError_t launch_clusters(void (*kernel)(Wanted...), int cluster, dim3 grid, dim3 block, size_t shared_bytes,
                            cudaStream_t stream, const Given&... arguments) {
  cudaLaunchAttribute attribute{};
  attribute.id = cudaLaunchAttributeClusterDimension;
  attribute.val.clusterDim = {static_cast<unsigned>(cluster), 1, 1};
  cudaLaunchConfig_t config{};
  config.gridDim = grid, config.blockDim = block, config.dynamicSmemBytes = shared_bytes, config.stream = stream;
  config.attrs = &attribute, config.numAttrs = 1;
  return cudaLaunchKernelEx(&config, kernel, arguments...);
}
}  // namespace cmx
#endif

namespace cmx {

using bf16 = __nv_bfloat16;
using fp16 = __half;

// Enqueues a kernel whose shared memory may be more than the 48 KB that need no permission
template <class Kernel, class... Arguments>
cudaError_t launch(Kernel kernel, int blocks, int threads, int shared_bytes, cudaStream_t stream,
                   const Arguments&... arguments) {
  if (shared_bytes > 48 << 10)
    if (cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes))
      return error;
  CMX_LAUNCH(kernel, dim3(blocks), dim3(threads), shared_bytes, stream, arguments...);
  return cudaGetLastError();
}

}  // namespace cmx
