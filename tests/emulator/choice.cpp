// What the launchers choose, for ctypes: depthwise_fwd.cu and product.cu are linked with kernels that only say that they
// were called, and with how many blocks.
#include "cuda/cost.h"
#include "cuda/depthwise.h"
#include "cuda/product.h"

using namespace cmx;

static int kernel, blocks;  // of the last call; `kernel` as in cmx_kernels/cost_model.py
static const float* partials;

static cudaError_t called(int which, int count) {
  kernel = which, blocks = count;
  return cudaSuccess;
}

namespace cmx {

cudaError_t depthwise_fwd_ffma(const DepthwiseForward&, const FfmaPlan& plan, cudaStream_t) {
  return called(0, plan.blocks);
}
cudaError_t depthwise_fwd_mma(const DepthwiseForward&, const MmaPlan& plan, cudaStream_t) {
  return called(1, plan.blocks);
}
cudaError_t depthwise_fwd_mma_plane(const DepthwiseForward&, const MmaPlan& plan, cudaStream_t) {
  return called(2, plan.blocks);
}
cudaError_t depthwise_fwd_mma_last(const DepthwiseForward&, const MmaPlan& plan, cudaStream_t) {
  return called(3, plan.blocks);
}
cudaError_t depthwise_bwd_ffma(const DepthwiseGradients&, const BackwardPlan& plan, cudaStream_t) {
  return called(0, plan.tile.blocks);
}
cudaError_t depthwise_bwd_mma(const DepthwiseGradients&, const MmaPlan& plan, cudaStream_t) {
  return called(1, plan.blocks);
}
cudaError_t product_fwd_mma(const ProductForward& p, const ProductPlan& plan, cudaStream_t) {
  partials = p.partials;
  return called(plan.tile, plan.blocks());
}
cudaError_t product_fwd_wgmma(const ProductForward& p, const WgmmaPlan& plan, cudaStream_t) {
  partials = p.partials;
  return called(kProductTileCount, plan.blocks);
}
bool product_wgmma_runs() { return true; }

}  // namespace cmx

#define CMX_SHOWN extern "C" __attribute__((visibility("default"))) void

// `gpu`: its place in kGpus. `shape`: n c h w kh kw dtype act. `found`: kernel, blocks
CMX_SHOWN cmx_chosen_depthwise(int gpu, const int* shape, bool channels_last, bool backward, int* found) {
  const DepthwiseShape s{shape[0], shape[1], shape[2], shape[3], shape[4], shape[5], static_cast<Dtype>(shape[6])};
  const Strides strides = dense_strides(s.c, s.h, s.w, channels_last);
  DepthwiseForward forward{};
  DepthwiseGradients gradients{};
  forward.shape = gradients.shape = s, forward.act = gradients.act = static_cast<Act>(shape[7]);
  forward.x_stride = forward.y_stride = strides;
  gradients.grad_stride = gradients.a_stride = gradients.x_stride = gradients.dx_stride = strides;
  gradients.need_weight = true;
  alignas(16) static char memory[16];  // dx is wanted, too
  gradients.dx = memory;
  if (depthwise_bwd_wants_planes(gradients, kGpus[gpu].gpu))  // as the binding gives them
    gradients.grad_stride = gradients.a_stride = gradients.x_stride = gradients.dx_stride =
        dense_strides(s.c, s.h, s.w, false);
  backward ? depthwise_bwd(gradients, kGpus[gpu].gpu, nullptr) : depthwise_fwd(forward, kGpus[gpu].gpu, nullptr);
  found[0] = kernel, found[1] = blocks;
}

// `shape`: n c_in c_out h w ph pw dtype act. `use`: as ProductUse, of which only addresses tell. `found`: kernel, blocks;
// `statistics`: parts, and where the last launch writes its own, in numbers from the first
CMX_SHOWN cmx_chosen_product(int gpu, const int* shape, bool channels_last, int use, int* found, int64_t* statistics) {
  alignas(16) static float memory[4];
  ProductForward p{};
  p.partials = use ? memory : nullptr, p.like = use == 2 ? memory : nullptr;
  p.shape = {shape[0], shape[1], shape[2], shape[3], shape[4], shape[5], shape[6], static_cast<Dtype>(shape[7])};
  p.act = static_cast<Act>(shape[8]);
  const int64_t height = int64_t(shape[3]) * shape[5], width = int64_t(shape[4]) * shape[6];
  const bool trains = use && !channels_last;
  p.x_stride = trains ? channels_first(shape[0], height, width) : dense_strides(shape[1], height, width, channels_last);
  p.y_stride = dense_strides(shape[2], shape[3], shape[4], channels_last);
  if (product_unfolds(p, kGpus[gpu].gpu)) {  // as the binding does
    p.shape = unfolded(p.shape);
    p.x_stride = dense_strides(p.shape.c_in, p.shape.h, p.shape.w, channels_last);
  }
  product_fwd(p, kGpus[gpu].gpu, nullptr);
  found[0] = kernel, found[1] = blocks;
  statistics[0] = product_parts(p, kGpus[gpu].gpu), statistics[1] = partials - p.partials;
}
