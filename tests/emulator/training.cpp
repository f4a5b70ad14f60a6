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

#define CMX_SHOWN extern "C" __attribute__((visibility("default"))) int

CMX_SHOWN cmx_emulate_backward(const BackwardCall* call, char* message, size_t size) {
  return guarded(call->order, message, size, [&]() -> int {
    DepthwiseGradients p = call->p;
    const BackwardPlan plan = depthwise_bwd_plan(p, call->gpu);
    const int64_t c = p.shape.c, taps = c * p.shape.kh * p.shape.kw;
    std::vector<float> partials(plan.splits * (taps + 3 * c), NAN);
    p.partials = partials.data();
    if (const cudaError_t error = depthwise_bwd_ffma(p, plan, nullptr)) return error;
    return sums_final({p.partials, plan.splits, {taps, c, 2 * c}, {call->dweight, call->dbias, call->sums}}, nullptr);
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
