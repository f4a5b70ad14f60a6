// The depthwise block on CUDA: its parameters, its kernels, and who chooses among them. No torch, and no CUDA code.
#pragma once

#include <driver_types.h>

#include "../params.h"
#include "plan.h"

namespace cmx {

// y = scale * act(conv(x', weight) + bias) + shift [+ x'],  x' = (in_act(x) - mean) * in_scale + in_shift.
// "same" padding, (k - 1) / 2 before and k / 2 after: zeros beside x', not beside x. Strides in elements.
// x' is x without an affine; with one it is float32 for ffma, rounded to x's dtype for the tensor cores.
// With partials, for training: y = conv(x', weight) + bias, and the moments of act(y), y as it is stored.
struct DepthwiseForward {
  const void *x, *weight;             // [n, c, h, w] in `dtype`; [c, kh, kw] in `dtype`, dense
  void* y;                            // [n, c, h, w] in `dtype`
  const float *bias, *scale, *shift;  // [c] or null
  const float* affine;                // [3][c] mean, in_scale, in_shift of x', or null
  float* partials;                    // [depthwise_fwd_parts][c][3] count, mean, sum of squared deviations, or null
  DepthwiseShape shape;
  Strides x_stride, y_stride;
  Act act, in_act;
  bool residual;
};

// Enqueues on `stream`, on the current device; neither allocates nor waits. cudaErrorInvalidValue: no plan fits.
cudaError_t depthwise_fwd(const DepthwiseForward& p, const Gpu& gpu, cudaStream_t stream);

// How many parts the moments come in, of the kernel that depthwise_fwd takes
int64_t depthwise_fwd_parts(const DepthwiseForward& p, const Gpu& gpu);

// One kernel with a given plan; the emulator's tests call every one of them.
cudaError_t depthwise_fwd_ffma(const DepthwiseForward& p, const FfmaPlan& plan, cudaStream_t stream);
cudaError_t depthwise_fwd_mma(const DepthwiseForward& p, const MmaPlan& plan, cudaStream_t stream);
cudaError_t depthwise_fwd_mma_plane(const DepthwiseForward& p, const MmaPlan& plan, cudaStream_t stream);
cudaError_t depthwise_fwd_mma_last(const DepthwiseForward& p, const MmaPlan& plan, cudaStream_t stream);

// da and x' are float32 for ffma, rounded to `dtype` for the tensor cores; sums are of dx as it is stored, of da in float32.
// With da = (p * grad + q * (act(a) - mean) + r) * act'(a), zero beside the plane, and x' as in the forward pass:
//   dx = conv^T(da, weight) [+ grad]    dweight = x' * da    dbias = sum(da)    sum(dx)    sum(dx * (act(x) - mean'))
struct DepthwiseGradients {
  const void *grad, *a, *x, *weight;  // [n, c, h, w] in `dtype`; [c, kh, kw] in `dtype`, dense
  void* dx;                           // [n, c, h, w] in `dtype`, or null: not wanted
  const float* coefficients;          // [4][c] p, q, r, mean
  const float* affine;                // [3][c] mean', scale, shift, or null: x' = x
  float* partials;                    // [splits][c * (kh * kw + 3)]: dweight [c][kh][kw], dbias [c], sums [2][c]
  DepthwiseShape shape;
  Strides grad_stride, a_stride, x_stride, dx_stride;
  Act act;
  bool residual, need_weight;
};

// As the forward pass: the kernel that is predicted to be fastest, in so many parts; and each kernel by itself, of whose
// plans the second has no blocks where it does not take the shape.
cudaError_t depthwise_bwd(const DepthwiseGradients& p, const Gpu& gpu, cudaStream_t stream);
int64_t depthwise_bwd_parts(const DepthwiseGradients& p, const Gpu& gpu);
bool depthwise_bwd_wants_planes(const DepthwiseGradients& p,
                                const Gpu& gpu);  // copies in NCHW of channels_last tensors
BackwardPlan depthwise_bwd_ffma_plan(const DepthwiseGradients& p, const Gpu& gpu);
MmaPlan depthwise_bwd_mma_plan(const DepthwiseGradients& p, const Gpu& gpu);
cudaError_t depthwise_bwd_ffma(const DepthwiseGradients& p, const BackwardPlan& plan, cudaStream_t stream);
cudaError_t depthwise_bwd_mma(const DepthwiseGradients& p, const MmaPlan& plan, cudaStream_t stream);
cudaError_t depthwise_bwd_mma_large(const DepthwiseGradients& p, const MmaPlan& plan, cudaStream_t stream);  // of those

}  // namespace cmx
