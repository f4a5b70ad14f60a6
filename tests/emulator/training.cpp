// The kernels of training on the CPU, for ctypes.
#include "cuda/training.h"

#include <cmath>
#include <cstdio>
#include <vector>

#include "cuda/depthwise.h"
#include "cuda/platform.cuh"

using namespace cmx;

struct BackwardCall {  // as in tests/emulated_training.py
  DepthwiseGradients p;
  float *dweight, *dbias, *sums;  // or null
  Gpu gpu;
  int order;
  bool tensor_cores;
};

struct RowsCall {
  Rows p;
  float* result;  // moments [2][c], or sums [1 or 2][c]
  Gpu gpu;
  int order;
};

template <class F>
static int guarded(int order, char* message, size_t size, const F& run) {
  emulator::machine.order = static_cast<emulator::Machine::Order>(order % 3);
  emulator::machine.copies_arrive_at_once = order >= 3;
  emulator::machine.seed = order + 1;
  try {
    return run();
  } catch (const std::exception& e) {
    std::snprintf(message, size, "%s", e.what());
    return -2;
  }
}

// 0, a cudaError, -1: no plan, -2: `message` says what the emulator found
#define CMX_SHOWN extern "C" __attribute__((visibility("default"))) int

CMX_SHOWN cmx_emulate_backward(const BackwardCall* call, char* message, size_t size) {
  return guarded(call->order, message, size, [&]() -> int {
    DepthwiseGradients p = call->p;
    const BackwardPlan ffma = depthwise_bwd_ffma_plan(p, call->gpu);
    const MmaPlan mma = depthwise_bwd_mma_plan(p, call->gpu);
    if (call->tensor_cores && !mma.blocks) return -1;
    const int64_t c = p.shape.c, taps = c * p.shape.kh * p.shape.kw;
    const int64_t splits = call->tensor_cores ? mma.splits : ffma.splits;
    std::vector<float> partials(splits * (taps + 3 * c), NAN);
    p.partials = partials.data();
    if (const cudaError_t error =
            call->tensor_cores ? depthwise_bwd_mma(p, mma, nullptr) : depthwise_bwd_ffma(p, ffma, nullptr))
      return error;
    return sums_final({p.partials, splits, {taps, c, 2 * c}, {call->dweight, call->dbias, call->sums}}, nullptr);
  });
}

CMX_SHOWN cmx_emulate_rows(const RowsCall* call, char* message, size_t size) {
  return guarded(call->order, message, size, [&]() -> int {
    Rows p = call->p;
    const RowsPlan plan = rows_plan(p, call->gpu);
    std::vector<float> partials(plan.splits * 3 * int64_t(p.c), NAN);
    p.partials = partials.data();
    if (const cudaError_t error = training_rows(p, plan, nullptr)) return error;
    if (p.mode == RowsMode::sum) return cudaSuccess;
    if (p.mode == RowsMode::moments) return moments_final(p.partials, plan.splits, p.c, call->result, nullptr);
    const int64_t count = p.mode == RowsMode::gradient ? p.c : 2 * p.c;
    return sums_final({p.partials, plan.splits, {count, 0, 0}, {call->result, nullptr, nullptr}}, nullptr);
  });
}

template <class P>
static int channels(const P* p, int order, char* message, size_t size) {
  return guarded(order, message, size, [&]() -> int { return batchnorm_channels(*p, nullptr); });
}

CMX_SHOWN cmx_emulate_batchnorm_rows(const BatchNormRows* p, int order, char* message, size_t size) {
  return channels(p, order, message, size);
}
CMX_SHOWN cmx_emulate_batchnorm_gradients(const BatchNormGradients* p, int order, char* message, size_t size) {
  return channels(p, order, message, size);
}
