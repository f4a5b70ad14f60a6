// The depthwise block on CUDA: its parameters, its kernels, and who chooses among them. No torch, and no CUDA code.
#pragma once

#include <driver_types.h>

#include "../params.h"
#include "plan.h"

namespace cmx {

// y = scale * act(conv(x', weight) + bias) + shift [+ x'],  x' = in_scale * x + in_shift, rounded to x's dtype.
// "same" padding, (k - 1) / 2 before and k / 2 after: zeros beside x', not beside x. Strides in elements.
struct DepthwiseForward {
  const void *x, *weight;             // [n, c, h, w] in `dtype`; [c, kh, kw] in `dtype`, dense
  void* y;                            // [n, c, h, w] in `dtype`
  const float *bias, *scale, *shift;  // [c] or null
  const float *in_scale, *in_shift;   // [c] or null
  DepthwiseShape shape;
  Strides x_stride, y_stride;
  Act act;
  bool residual;
};

// Enqueues on `stream`, on the current device; neither allocates nor waits. cudaErrorInvalidValue: no plan fits.
cudaError_t depthwise_fwd(const DepthwiseForward& p, const Gpu& gpu, cudaStream_t stream);

// One kernel with a given plan; the emulator's tests call every one of them.
cudaError_t depthwise_fwd_ffma(const DepthwiseForward& p, const FfmaPlan& plan, cudaStream_t stream);
cudaError_t depthwise_fwd_mma(const DepthwiseForward& p, const MmaPlan& plan, cudaStream_t stream);
cudaError_t depthwise_fwd_mma_plane(const DepthwiseForward& p, const MmaPlan& plan, cudaStream_t stream);

}  // namespace cmx
