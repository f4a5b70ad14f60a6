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
#endif

namespace cmx {

using bf16 = __nv_bfloat16;
using fp16 = __half;

}  // namespace cmx
