// The depthwise block: chooses the kernel and its plan. The choice and its reasons: cost.h.
#include "cost.h"
#include "depthwise.h"

namespace cmx {

cudaError_t depthwise_fwd(const DepthwiseForward& p, const Gpu& gpu, cudaStream_t stream) {
  const DepthwiseChoice choice = choose_depthwise(p.shape, memory_of(p.x, p.x_stride, p.y, p.y_stride, p.shape), gpu);
  switch (choice.kernel) {
    case DepthwiseKernel::ffma: return depthwise_fwd_ffma(p, choice.ffma, stream);
    case DepthwiseKernel::mma: return depthwise_fwd_mma(p, choice.mma, stream);
    case DepthwiseKernel::mma_plane: return depthwise_fwd_mma_plane(p, choice.mma, stream);
  }
  return cudaErrorInvalidValue;
}

}  // namespace cmx
