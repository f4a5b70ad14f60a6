// pool_head: the mean of every plane in float32, then a product with the classes' weights. Two kernels, sums in one order.
//
// Planes: a warp sums one plane. channels_last: a block sums 32 channels side by side, its 8 warps a share of the pixels
// each. Product: a warp takes one class and 8 images, so that a weight is read once for them.
#include "epilogue.cuh"
#include "product.h"

namespace cmx {
namespace {

constexpr int LANES = 32, WARPS = 8, IMAGES = 8;

__device__ __forceinline__ float sum_over_lanes(float v) {
#pragma unroll
  for (int bit = LANES / 2; bit; bit /= 2) v += __shfl_xor_sync(~0u, v, bit);
  return v;
}

template <class T>
__global__ void __launch_bounds__(LANES* WARPS) pool_planes_kernel(const __grid_constant__ PoolHeadForward p) {
  begin_chained();
  const int lane = threadIdx.x % LANES;
  const int64_t plane = static_cast<int64_t>(p.h) * p.w;
  const int64_t i = static_cast<int64_t>(blockIdx.x) * WARPS + threadIdx.x / LANES;
  if (i >= static_cast<int64_t>(p.n) * p.c) return;
  const int64_t n = i / p.c, c = i - n * p.c;
  const T* const x = static_cast<const T*>(p.x) + n * p.x_stride.n + c * p.x_stride.c;
  float sum = 0.f;
  if (p.vector_loads) {
    constexpr int EACH = 16 / sizeof(T);
#pragma unroll 4
    for (int64_t j = lane * EACH; j < plane; j += LANES * EACH) {
      const uint4 v = get<uint4>(x + j);
      const uint32_t word[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
      for (int k = 0; k < 4; ++k) {
        if constexpr (sizeof(T) == 4) {
          float number;
          memcpy(&number, &word[k], 4);
          sum += number;
        } else {
          const float2 pair = unpack<T>(word[k]);
          sum += pair.x + pair.y;
        }
      }
    }
  } else {
    for (int64_t j = lane; j < plane; j += LANES) {
      const int row = static_cast<int>(j / p.w), column = static_cast<int>(j - static_cast<int64_t>(row) * p.w);
      sum += to_float(x[row * p.x_stride.h + column * p.x_stride.w]);
    }
  }
  sum = sum_over_lanes(sum);
  if (lane == 0) p.pooled[i] = sum / plane;
}

template <class T>
__global__ void __launch_bounds__(LANES* WARPS) pool_channels_kernel(const __grid_constant__ PoolHeadForward p) {
  begin_chained();
  CMX_DYNAMIC_SHARED(shared);
  float* const sums = reinterpret_cast<float*>(shared);  // [warp][channel]
  const int lane = threadIdx.x % LANES, warp = threadIdx.x / LANES, groups = (p.c + LANES - 1) / LANES;
  const int n = blockIdx.x / groups, c = blockIdx.x % groups * LANES + lane;
  const int64_t plane = static_cast<int64_t>(p.h) * p.w;
  float sum = 0.f;
  if (c < p.c) {
    const T* const x = static_cast<const T*>(p.x) + n * p.x_stride.n + c * p.x_stride.c;
#pragma unroll 8
    for (int64_t j = warp; j < plane; j += WARPS) sum += to_float(x[j * p.x_stride.w]);
  }
  sums[threadIdx.x] = sum;
  __syncthreads();
  if (warp || c >= p.c) return;
#pragma unroll
  for (int i = 1; i < WARPS; ++i) sum += sums[i * LANES + lane];
  p.pooled[static_cast<int64_t>(n) * p.c + c] = sum / plane;
}

template <class T>
__global__ void __launch_bounds__(LANES* WARPS) head_kernel(const __grid_constant__ PoolHeadForward p) {
  begin_chained();
  const int lane = threadIdx.x % LANES, first = blockIdx.y * IMAGES;
  const int k = blockIdx.x * WARPS + threadIdx.x / LANES;
  if (k >= p.classes) return;
  const T* const weight = static_cast<const T*>(p.weight) + static_cast<int64_t>(k) * p.c;
  const float* const pooled = p.pooled + static_cast<int64_t>(first) * p.c;
  float sum[IMAGES] = {};
#pragma unroll 2
  for (int c = lane; c < p.c; c += LANES) {
    const float w = to_float(weight[c]);
#pragma unroll
    for (int i = 0; i < IMAGES; ++i)
      if (first + i < p.n) sum[i] = fmaf(w, pooled[static_cast<int64_t>(i) * p.c + c], sum[i]);
  }
  const float bias = p.bias ? p.bias[k] : 0.f;
#pragma unroll
  for (int i = 0; i < IMAGES; ++i) {
    const float total = sum_over_lanes(sum[i]) + bias;
    if (lane == i && first + i < p.n)
      static_cast<T*>(p.y)[static_cast<int64_t>(first + i) * p.classes + k] = from_float<T>(total);
  }
}

template <class T>
cudaError_t launch_both(const PoolHeadForward& p, cudaStream_t stream) {
  const Strides& x = p.x_stride;
  const bool linear = x.h == p.w * x.w || p.h == 1, channels = x.c == 1 && x.w != 1 && linear;
  const int threads = LANES * WARPS;
  const int64_t blocks = channels ? p.n * ceil_div(p.c, LANES) : ceil_div(static_cast<int64_t>(p.n) * p.c, WARPS);
  if (blocks > INT32_MAX) return cudaErrorInvalidValue;
  PoolHeadForward pool = p;
  pool.vector_loads =
      linear && x.w == 1 && access_bytes(p.x, {x.n, x.c, static_cast<int64_t>(p.h) * p.w}, sizeof(T)) == 16;
  if (blocks)  // none without channels
    if (cudaError_t error = channels ? launch(pool_channels_kernel<T>, {blocks, threads, threads * 4, stream}, pool)
                                     : launch(pool_planes_kernel<T>, {blocks, threads, 0, stream}, pool))
      return error;
  constexpr int64_t kMost = 65535 * IMAGES;  // images of a launch: the second dimension of a grid ends there
  for (int64_t n = 0; n < p.n; n += kMost) {
    PoolHeadForward part = p;
    part.n = static_cast<int>(std::min(kMost, p.n - n));
    part.pooled = p.pooled + n * p.c;
    part.y = static_cast<T*>(p.y) + n * p.classes;
    const dim3 grid(ceil_div(p.classes, WARPS), ceil_div(part.n, IMAGES));
    if (cudaError_t error = launch(head_kernel<T>, {grid, threads, 0, stream}, part)) return error;
  }
  return cudaSuccess;
}

}  // namespace

cudaError_t pool_head_fwd(const PoolHeadForward& p, cudaStream_t stream) {
  switch (p.dtype) {
    case Dtype::float32: return launch_both<float>(p, stream);
    case Dtype::float16: return launch_both<fp16>(p, stream);
    case Dtype::bfloat16: return launch_both<bf16>(p, stream);
  }
  return cudaErrorInvalidValue;
}

}  // namespace cmx
