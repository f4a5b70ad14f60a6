// What a kernel file includes first: the CUDA runtime under nvcc, its emulation on the CPU (tests/emulator) under g++.
#pragma once

#ifdef CMX_EMULATED
#include "emulator.h"
#else
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

// The shared memory whose size the launch names
#define CMX_DYNAMIC_SHARED(name) extern __shared__ __align__(128) unsigned char name[]
#endif

#include <atomic>
#include <cstdint>
#include <cstring>
#include <map>
#include <mutex>
#include <utility>

namespace cmx {

using bf16 = __nv_bfloat16;
using fp16 = __half;

// An error that is returned, or that means a no: it is not left for the next one who asks for the last error.
inline cudaError_t taken(cudaError_t error) {
  if (error) cudaGetLastError();
  return error;
}

// Lets a kernel have so much shared memory on the current device, where it is more than the 48 KB that need no permission.
// Never less than before: another thread may be about to launch the kernel with that.
inline cudaError_t allow_shared(const void* kernel, int bytes) {
  static std::mutex mutex;
  static std::map<std::pair<int, const void*>, int> allowed;  // by device
  if (bytes <= 48 << 10) return cudaSuccess;
  int device = 0;
  if (cudaError_t error = taken(cudaGetDevice(&device))) return error;
  const std::lock_guard<std::mutex> lock(mutex);
  int& most = allowed[{device, kernel}];
  if (bytes <= most) return cudaSuccess;
  const cudaError_t error = taken(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes));
  if (error == cudaSuccess) most = bytes;
  return error;
}

#ifndef CMX_EMULATED
// Does begin_chained() do anything on the current device? Not in code compiled from the PTX of an older one. And can graphs
// capture such launches? Not with drivers before CUDA 12.3.
template <class Kernel>
bool is_chained(Kernel* kernel) {
  constexpr int kDevices = 64;
  static std::atomic<signed char> known[kDevices];  // 0: not asked yet
  int device = 0;
  if (taken(cudaGetDevice(&device)) || device >= kDevices) return false;
  if (!known[device]) {
    cudaFuncAttributes attributes;
    int driver = 0;
    if (taken(cudaDriverGetVersion(&driver)) || taken(cudaFuncGetAttributes(&attributes, kernel))) return false;
    known[device] = driver >= 12030 && attributes.ptxVersion >= 90 ? 1 : -1;
  }
  return known[device] > 0;
}
#endif

struct Launch {
  dim3 grid;
  int threads, shared_bytes;
  cudaStream_t stream;
  int cluster = 1;  // so many blocks are one: more than 1 from compute capability 9.0 on
  // The kernel says begin_chained() (ptx.cuh) before it touches global memory: it may be launched while the kernel before it
  // on the stream still runs ("programmatic dependent launch").
  bool chained = true;
};

// Enqueues a kernel, or says why not.
template <class... Wanted, class... Given>
cudaError_t launch(void (*kernel)(Wanted...), const Launch& how, const Given&... arguments) {
  const void* const pointer = reinterpret_cast<const void*>(kernel);
  if (cudaError_t error = allow_shared(pointer, how.shared_bytes)) return error;
#ifdef CMX_EMULATED
  const auto body = [=] { kernel(arguments...); };
  return emulator::launch(pointer, how.grid, how.threads, how.shared_bytes, body, how.cluster, how.chained);
#else
  cudaLaunchAttribute attributes[2]{};
  cudaLaunchConfig_t config{};
  config.gridDim = how.grid, config.blockDim = how.threads, config.dynamicSmemBytes = how.shared_bytes;
  config.stream = how.stream, config.attrs = attributes;
  if (how.chained && is_chained(kernel)) {
    attributes[config.numAttrs].id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attributes[config.numAttrs++].val.programmaticStreamSerializationAllowed = 1;
  }
  if (how.cluster > 1) {
    attributes[config.numAttrs].id = cudaLaunchAttributeClusterDimension;
    attributes[config.numAttrs++].val.clusterDim = {static_cast<unsigned>(how.cluster), 1, 1};
  }
  return taken(cudaLaunchKernelEx(&config, kernel, arguments...));
#endif
}

}  // namespace cmx
