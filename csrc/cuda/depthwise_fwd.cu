// The depthwise block: chooses the kernel and its plan. The choice and its reasons: cost.h.
#include "cost.h"
#include "depthwise.h"

namespace cmx {
namespace {

DepthwiseChoice choice_of(const DepthwiseForward& p, const Gpu& gpu) {
  return choose_depthwise(p.shape, memory_of(p.x, p.x_stride, p.y, p.y_stride, p.shape), gpu, p.act);
}

// Of the input and its gradient
Memory input_memory(const DepthwiseGradients& p) {
  return memory_of(p.x, p.x_stride, p.dx ? p.dx : p.x, p.dx ? p.dx_stride : p.x_stride, p.shape);
}

// Of the gradient that comes in and the pre-activation
Memory gradient_memory(const DepthwiseGradients& p) {
  return memory_of(p.grad, p.grad_stride, p.a, p.a_stride, p.shape);
}

BackwardChoice choice_of(const DepthwiseGradients& p, const Gpu& gpu) {
  return choose_backward(p.shape, input_memory(p), gradient_memory(p), gpu, p.act);
}

}  // namespace

int64_t depthwise_fwd_parts(const DepthwiseForward& p, const Gpu& gpu) {
  const DepthwiseChoice choice = choice_of(p, gpu);
  return choice.kernel == DepthwiseKernel::ffma ? choice.ffma.parts() : choice.mma.parts();
}

cudaError_t depthwise_fwd(const DepthwiseForward& p, const Gpu& gpu, cudaStream_t stream) {
  const DepthwiseChoice choice = choice_of(p, gpu);
  switch (choice.kernel) {
    case DepthwiseKernel::ffma: return depthwise_fwd_ffma(p, choice.ffma, stream);
    case DepthwiseKernel::mma: return depthwise_fwd_mma(p, choice.mma, stream);
    case DepthwiseKernel::mma_plane: return depthwise_fwd_mma_plane(p, choice.mma, stream);
    case DepthwiseKernel::mma_last: return depthwise_fwd_mma_last(p, choice.mma, stream);
  }
  return cudaErrorInvalidValue;
}

BackwardPlan depthwise_bwd_ffma_plan(const DepthwiseGradients& p, const Gpu& gpu) {
  return backward_plan(p.shape, input_memory(p), gradient_memory(p), gpu);
}

MmaPlan depthwise_bwd_mma_plan(const DepthwiseGradients& p, const Gpu& gpu) {
  return mma_backward_plan(p.shape, input_memory(p), gradient_memory(p), gpu);
}

int64_t depthwise_bwd_parts(const DepthwiseGradients& p, const Gpu& gpu) {
  const BackwardChoice choice = choice_of(p, gpu);
  return choice.kernel == DepthwiseKernel::ffma ? choice.ffma.splits : choice.mma.splits;
}

bool depthwise_bwd_wants_planes(const DepthwiseGradients& p, const Gpu& gpu) {
  const int copies = 2 + (p.need_weight || p.affine) + (p.dx != nullptr);
  return choose_planes(p.shape, input_memory(p), gradient_memory(p), gpu, p.act, copies).pays;
}

cudaError_t depthwise_bwd(const DepthwiseGradients& p, const Gpu& gpu, cudaStream_t stream) {
  const BackwardChoice choice = choice_of(p, gpu);
  return choice.kernel == DepthwiseKernel::ffma ? depthwise_bwd_ffma(p, choice.ffma, stream)
                                                : depthwise_bwd_mma(p, choice.mma, stream);
}

}  // namespace cmx
