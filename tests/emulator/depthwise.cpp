// The depthwise kernels on the CPU, for ctypes: one function per kernel would repeat fifteen arguments, so one with a name.
#include <cmath>
#include <cstdio>
#include <cstring>
#include <vector>

#include "cuda/depthwise.h"
#include "cuda/platform.cuh"
#include "cuda/training.h"
#include "launched.h"

using namespace cmx;

struct Call {  // as in tests/emulated.py
  DepthwiseForward p;
  Gpu gpu;
  int kernel;  // 0 ffma, 1 mma, 2 mma_plane, 3 mma_last
  int order;   // 0 forward, 1 reverse, 2 random; + 3: copies arrive at once
  unsigned seed;
  float* moments;  // [2][c] or null
};

// tests/emulated.py asks whether its structs are these.
#define CMX_SHOWN extern "C" __attribute__((visibility("default"))) int
CMX_SHOWN cmx_size_of_gpu() { return sizeof(Gpu); }
CMX_SHOWN cmx_size_of_call() { return sizeof(Call); }

// Starts counting, or stops: {accesses, conflicts} between one __syncthreads and the next, as many as there are, up to
// `count`
CMX_SHOWN cmx_bank_use(bool start, int* found, int count) {
  auto& use = emulator::machine.bank_use;
  emulator::machine.watch_banks = start;
  if (!start) std::memcpy(found, use.data(), std::min<size_t>(count, use.size()) * sizeof use[0]);
  use.clear();
  return 0;
}

// 0, a cudaError, -1: no plan, -2: `message` says what the emulator found
CMX_SHOWN cmx_emulate(const Call* call, char* message, size_t size) {
  emulator::machine.order = static_cast<emulator::Machine::Order>(call->order % 3);
  emulator::machine.copies_arrive_at_once = call->order >= 3;
  emulator::machine.seed = call->seed;
  DepthwiseForward p = call->p;
  std::vector<float> partials;
  const auto parts = [&](int64_t count) {
    if (!call->moments) return;
    partials.assign(count * p.shape.c * 3, NAN);
    p.partials = partials.data();
  };
  const auto final = [&](int64_t count) {
    return call->moments ? moments_final(p.partials, count, p.shape.c, call->moments, nullptr) : cudaSuccess;
  };
  const Memory m = memory_of(p.x, p.x_stride, p.y, p.y_stride, p.shape);
  try {
    if (call->kernel == 0) {
      const FfmaPlan plan = ffma_plan(p.shape, m, call->gpu);
      parts(plan.parts());
      if (const cudaError_t error = depthwise_fwd_ffma(p, plan, nullptr)) return error;
      return final(plan.parts());
    }
    constexpr decltype(&mma_plan) plans[] = {mma_plan, mma_plane_plan, mma_last_plan};
    constexpr decltype(&depthwise_fwd_mma) kernels[] = {depthwise_fwd_mma, depthwise_fwd_mma_plane,
                                                        depthwise_fwd_mma_last};
    const MmaPlan plan = plans[call->kernel - 1](p.shape, m, call->gpu);
    if (!plan.blocks) return -1;
    parts(plan.parts());
    if (const cudaError_t error = kernels[call->kernel - 1](p, plan, nullptr)) return error;
    return final(plan.parts());
  } catch (const std::exception& e) {
    std::snprintf(message, size, "%s", e.what());
    return -2;
  }
}
