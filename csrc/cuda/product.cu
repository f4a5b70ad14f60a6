// pointwise_block and patch_embed: chooses the plan. The choice and its reasons: product_cost.h.
#include "product.h"

#include <atomic>

#include "device.h"
#include "product_cost.h"

static std::atomic<int> only{cmx::kEveryProduct};

// The kernel that all products take from now on, in every thread: a tile, or kProductTileCount for wgmma; kEveryProduct: the
// one that is predicted to be fastest. Says which it was before. For measurements.
extern "C" CMX_EXPORT int cmx_cuda_only_product(int kernel) { return only.exchange(kernel); }

namespace cmx {

namespace {

bool has_wgmma(const Gpu& gpu) { return gpu.arch == 90 && product_wgmma_runs(); }

// run(call, choice) for one launch after the other, each with its images
template <class F>
cudaError_t each_launch(const ProductForward& p, const Gpu& gpu, const F& run) {
  constexpr int64_t kMost = 1 << 30;  // pixels of a launch: they are counted in 32 bits
  const ProductShape& s = p.shape;
  if (s.plane() > kMost || s.k() > INT32_MAX) return cudaErrorInvalidValue;
  const int64_t most = kMost / std::max<int64_t>(s.plane(), 1), element = size_of(s.dtype);
  for (int64_t n = 0; n < s.n; n += most) {
    ProductForward part = p;
    part.shape.n = static_cast<int>(std::min(most, s.n - n));
    part.x = static_cast<const char*>(p.x) + n * p.x_stride.n * element;
    part.y = static_cast<char*>(p.y) + n * p.y_stride.n * element;
    if (p.like) part.like = static_cast<const char*>(p.like) + n * p.y_stride.n * element;
    const ProductMemory m = product_memory_of(part);
    const ProductChoice choice = choose_product(part.shape, m, gpu, p.act, has_wgmma(gpu), p.use(), only);
    if (only != kEveryProduct && !choice.wgmma.blocks && !choice.plan.blocks()) return cudaErrorNotSupported;
    if (cudaError_t error = run(part, choice)) return error;
  }
  return cudaSuccess;
}

int parts_of(const ProductChoice& choice) { return choice.wgmma.blocks ? choice.wgmma.parts : choice.plan.parts(); }

}  // namespace

int64_t product_parts(const ProductForward& p, const Gpu& gpu) {
  int64_t parts = 0;
  each_launch(p, gpu, [&](const ProductForward&, const ProductChoice& choice) {
    parts += parts_of(choice);
    return cudaSuccess;
  });
  return parts;
}

bool product_unfolds(const ProductForward& p, const Gpu& gpu) {
  if (p.shape.ph == 1 && p.shape.pw == 1) return false;
  return choose_patches(p.shape, product_memory_of(p), p.x, p.x_stride, p.y, p.y_stride, gpu, p.act, has_wgmma(gpu),
                        p.use(), only)
      .unfold.blocks;
}

cudaError_t product_fwd(const ProductForward& p, const Gpu& gpu, cudaStream_t stream) {
  float* partials = p.partials;
  return each_launch(p, gpu, [&](ProductForward part, const ProductChoice& choice) {
    part.partials = partials;
    if (partials) partials += int64_t(parts_of(choice)) * p.shape.c_out * (p.like ? 2 : 3);
    return choice.wgmma.blocks ? product_fwd_wgmma(part, choice.wgmma, stream)
                               : product_fwd_mma(part, choice.plan, stream);
  });
}

}  // namespace cmx
