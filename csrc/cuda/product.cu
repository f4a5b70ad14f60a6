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

cudaError_t product_fwd(const ProductForward& p, const Gpu& gpu, cudaStream_t stream) {
  constexpr int64_t kMost = 1 << 30;  // pixels of a launch: they are counted in 32 bits
  const ProductShape& s = p.shape;
  if (s.plane() > kMost || s.k() > INT32_MAX) return cudaErrorInvalidValue;
  const int64_t most = kMost / std::max<int64_t>(s.plane(), 1);
  for (int64_t n = 0; n < s.n; n += most) {
    ProductForward part = p;
    part.shape.n = static_cast<int>(std::min(most, s.n - n));
    const int64_t element = size_of(s.dtype);
    part.x = static_cast<const char*>(p.x) + n * p.x_stride.n * element;
    part.y = static_cast<char*>(p.y) + n * p.y_stride.n * element;
    const ProductMemory m = product_memory_of(part.x, p.x_stride, p.weight, part.y, p.y_stride, part.shape);
    const bool has_wgmma = gpu.arch == 90 && product_wgmma_runs();
    const ProductChoice choice = choose_product(part.shape, m, gpu, p.act, has_wgmma, only);
    if (only != kEveryProduct && !choice.wgmma.blocks && !choice.plan.blocks()) return cudaErrorNotSupported;
    if (cudaError_t error = choice.wgmma.blocks ? product_fwd_wgmma(part, choice.wgmma, stream)
                                                : product_fwd_mma(part, choice.plan, stream))
      return error;
  }
  return cudaSuccess;
}

}  // namespace cmx
