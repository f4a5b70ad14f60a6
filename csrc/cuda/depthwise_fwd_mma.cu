// Depthwise convolution on tensor cores for any size and any kernel up to 31, bf16 and fp16. How: depthwise_mma.cuh.
//
// A block owns one channel and some of its tiles of 32 x 32 outputs (or two images of 16 x 16, for small planes). Its
// filter, expanded to Toeplitz fragments, lies in shared memory once; each warp works through tiles of its own, in a ring
// of stages that cp.async fills ahead, with no barrier between warps.
#include "depthwise_mma.cuh"

namespace cmx {
namespace {

template <class T, class G, int BYTES>
__device__ __forceinline__ void load(unsigned char* stage, const Where& at, const T* channel, const DepthwiseForward& p,
                                     const MmaPlan& plan, int lane) {
  const DepthwiseShape& s = p.shape;
  each_block<G>(stage, at, s, plan, lane, [&](unsigned char* to, int n, int y, int x) {
    const bool row_inside = n < s.n && y >= 0 && y < s.h;
    const T* const row = channel + n * p.x_stride.n + y * p.x_stride.h;
#pragma unroll
    for (int i = 0; i < 16; i += BYTES) {
      const int column = x + i / 2;  // w is a multiple of a piece: all of it is inside, or nothing
      const bool inside = row_inside && column >= 0 && column < s.w;
      if constexpr (BYTES >= 4)
        copy_async<BYTES>(to + i, inside ? row + column : channel, inside);
      else
        put<uint16_t>(to + i, inside ? get<uint16_t>(row + column) : uint16_t(0));
    }
  });
}

template <class T, class G>
__device__ __forceinline__ void load(unsigned char* stage, int unit, const T* channel, const DepthwiseForward& p,
                                     const MmaPlan& plan, int lane) {
  const Where at = where(unit, plan, G::IMAGES, G::ROWS, G::ROWS);
  with_bytes(plan.load_bytes, [&]<int BYTES>() { load<T, G, BYTES>(stage, at, channel, p, plan, lane); });
}

template <class T, int NT, int WINDOW>
__global__ void __launch_bounds__(32 * MmaPlan::kWarps, 4)
    depthwise_fwd_mma_kernel(const __grid_constant__ DepthwiseForward p, const __grid_constant__ MmaPlan plan) {
  using G = Tile<NT, WINDOW>;
  CMX_DYNAMIC_SHARED(shared);
  const DepthwiseShape& s = p.shape;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, warps = blockDim.x / 32;
  const int c = blockIdx.x % s.c, split = blockIdx.x / s.c;
  const int pairs = (s.kh + 1) / 2;
  const T* const channel = static_cast<const T*>(p.x) + c * p.x_stride.c;

  uint2* const filter = reinterpret_cast<uint2*>(shared);  // [pair of filter rows][block][lane]
  unsigned char* const ring = shared + pairs * WINDOW * 256 + warp * (MmaPlan::kStages * plan.stage_bytes);

  const int first = split * warps + warp, step = plan.splits * warps;
  begin_chained();
#pragma unroll 1
  for (int i = 0; i < MmaPlan::kStages; ++i) {
    if (first + i * step < plan.units)
      load<T, G>(ring + i * plan.stage_bytes, first + i * step, channel, p, plan, lane);
    commit_copies();
  }

  const T* const weight = static_cast<const T*>(p.weight) + static_cast<int64_t>(c) * s.kh * s.kw;
  expand_filter<T, WINDOW, false>(filter, weight, s.kh, s.kw, warp, warps, lane);
  __syncthreads();

  const ChannelConstants k = constants_of(p, c);
  const InputAffine affine = affine_of(p.affine, c, p.shape.c);
  RunningMoments moments;

  int stage = 0;
  for (int unit = first; unit < plan.units; unit += step) {
    wait_for_copies<MmaPlan::kStages - 1>();
    unsigned char* const tile = ring + stage * plan.stage_bytes;
    const Where at = where(unit, plan, G::IMAGES, G::ROWS, G::ROWS);
    if (p.affine)  // on the blocks that this lane has loaded itself
      affine_on_tile<T, G>(tile, at, affine, p, plan, lane);
    __syncwarp();
    convolve_tile<T, G>(tile, filter, k, p, plan, lane);
    __syncwarp();

    T* const to = static_cast<T*>(p.y) + c * p.y_stride.c;
    each_result<G>(tile, at, s, plan, lane, [&](const unsigned char* from, int n, int y, int x) {
      const uint4 v = get<uint4>(from);
      store8_words(to + n * p.y_stride.n + y * p.y_stride.h, x, s.w, v, plan.store_bytes);
      if (p.partials && x < s.w) add_moments<T>(moments, v, s.w - x, p.act);
    });
    __syncwarp();  // the stage is free
    if (unit + MmaPlan::kStages * step < plan.units)
      load<T, G>(tile, unit + MmaPlan::kStages * step, channel, p, plan, lane);
    commit_copies();
    stage = stage + 1 == MmaPlan::kStages ? 0 : stage + 1;
  }
  wait_for_copies<0>();
  store_moments(moments, p, split * warps + warp, c, lane);
}

}  // namespace

cudaError_t depthwise_fwd_mma(const DepthwiseForward& p, const MmaPlan& plan, cudaStream_t stream) {
  if (!plan.blocks) return cudaErrorInvalidValue;
  return dispatch_tile(p, plan, [&]<class T, int NT, int WINDOW>() {
    return launch_mma(depthwise_fwd_mma_kernel<T, NT, WINDOW>, p, plan, stream);
  });
}

}  // namespace cmx
