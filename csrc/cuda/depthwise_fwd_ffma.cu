// Depthwise convolution on the float32 pipes: any dtype, kernel, size and strides.
//
// A block owns a tile of outputs of a few channels. It brings the inputs under the tile, as float32 and with zeros
// around the plane, into shared memory; then each thread computes a patch of 4 rows x 8 columns of one channel:
//   acc[i][j] += weight[ky][kx] * tile[i + ky][j + kx]
// For each of the 4 + kh - 1 input rows it slides a window of 12 numbers over the row, four taps at a time, and adds to
// every output row that the input row reaches: 128 FFMA for one new 16-byte load of the row and four of the weights.
#include "depthwise.h"
#include "depthwise_ffma.cuh"
#include "moments.cuh"

namespace cmx {
namespace {

// x' of the tile and its halo -> tile [channel][row][pitch], zeros outside of the plane
template <class T>
__device__ __forceinline__ void load_tile(float* tile, const Place& at, const DepthwiseForward& p,
                                          const FfmaPlan& plan) {
  const DepthwiseShape& s = p.shape;
  const int at_once = plan.channels_first ? plan.channels : 1;  // channels that neighbouring threads take
  const int ch0 = threadIdx.x % at_once, rest = threadIdx.x / at_once;
  const int chunk0 = rest % plan.load_lanes, row0 = rest / plan.load_lanes;
  const int row_step = blockDim.x / (at_once * plan.load_lanes);
  if (row0 >= row_step) return;
  for (int ch = ch0; ch < at.channels; ch += at_once) {
    const T* const plane = static_cast<const T*>(p.x) + at.n * p.x_stride.n + (at.c + ch) * p.x_stride.c;
    const InputAffine affine = affine_of(p.affine, at.c + ch, s.c);
    for (int row = row0; row < plan.tile_rows; row += row_step) {
      const int y = at.y + row - (s.kh - 1) / 2;
      const bool row_inside = y >= 0 && y < s.h;
      for (int chunk = chunk0; chunk * 4 < plan.pitch; chunk += plan.load_lanes) {
        const int x = at.x + chunk * 4 - plan.left;
        float v[4];
        load4_or_zeros(v, plane + y * p.x_stride.h, p.x_stride.w, x, s.w, row_inside, plan.vector_loads);
        if (p.affine) {
          activate<T, 4>(v, p.in_act);
#pragma unroll
          for (int j = 0; j < 4; ++j) v[j] = row_inside && x + j >= 0 && x + j < s.w ? affine(v[j]) : 0.f;
        }
        put(tile + ch * plan.channel_pitch + row * plan.pitch + chunk * 4, make_float4(v[0], v[1], v[2], v[3]));
      }
    }
  }
}

// Moments of act(y) of the threads of each channel -> its part. The tile in shared memory is gone.
__device__ __forceinline__ void store_moments(PartMoments* all, const PartMoments& mine, int ch, int patch, int patches,
                                              const Place& at, int64_t part, const DepthwiseForward& p) {
  __syncthreads();  // the tile has been read
  PartMoments* const here = all + ch * patches + patch;
  *here = mine;
  for (int step = 1; step < patches; step *= 2) {
    __syncthreads();
    if (patch % (2 * step) == 0 && patch + step < patches) *here = merge(*here, here[step]);
  }
  if (patch == 0 && ch < at.channels) store_part(p.partials, part, p.shape.c, at.c + ch, *here);
}

template <class T, int KW>
__global__ void __launch_bounds__(256, 2)
    depthwise_fwd_ffma_kernel(const __grid_constant__ DepthwiseForward p, const __grid_constant__ FfmaPlan plan) {
  CMX_DYNAMIC_SHARED(shared);
  float* const tile = reinterpret_cast<float*>(shared);
  float* const weights = tile + plan.channels * plan.channel_pitch;
  const DepthwiseShape& s = p.shape;

  const int patches = plan.patches_x * plan.patches_y;
  const int ch = plan.channels_first ? threadIdx.x % plan.channels : threadIdx.x / patches;
  const int patch = plan.channels_first ? threadIdx.x / plan.channels : threadIdx.x % patches;
  const int patch_y = patch / plan.patches_x * ROWS, patch_x = patch % plan.patches_x * COLUMNS;

  begin_chained();
  for (int64_t item = blockIdx.x; item < plan.items; item += gridDim.x) {
    const Place at = place_of(item, plan, s);
    load_tile<T>(tile, at, p, plan);
    load_weights<T>(weights, p.weight, at, s, plan);
    __syncthreads();
    const int y = at.y + patch_y, x = at.x + patch_x;
    RunningMoments moments;
    if (ch < at.channels && y < s.h && x < s.w) {
      const int c = at.c + ch;
      const float* const mine = tile + ch * plan.channel_pitch + patch_y * plan.pitch + patch_x;
      float acc[ROWS * COLUMNS];
      const float bias = p.bias ? p.bias[c] : 0.f;
#pragma unroll
      for (int i = 0; i < ROWS * COLUMNS; ++i) acc[i] = bias;
      convolve<KW>(acc, mine, weights + ch * plan.weight_channel_pitch, s, plan);

      const float scale = p.scale ? p.scale[c] : 1.f, shift = p.shift ? p.shift[c] : 0.f;
      T* const to = static_cast<T*>(p.y) + at.n * p.y_stride.n + c * p.y_stride.c;
#pragma unroll
      for (int i = 0; i < ROWS; ++i) {
        if (y + i >= s.h) break;
        float *const v = acc + i * COLUMNS, out[COLUMNS];
        if (!p.partials) activate<T, COLUMNS>(v, p.act);
#pragma unroll
        for (int j = 0; j < COLUMNS; ++j) {
          const float residual = p.residual ? mine[(i + (s.kh - 1) / 2) * plan.pitch + plan.left + j] : 0.f;
          out[j] = fmaf(v[j], scale, shift + residual);
        }
        store8(to + (y + i) * p.y_stride.h, p.y_stride.w, out, x, s.w, plan.vector_stores);
        if (p.partials) {  // of y as it is stored, in float32
#pragma unroll
          for (int j = 0; j < COLUMNS; ++j) v[j] = to_float(from_float<T>(v[j]));
          activate<float, COLUMNS>(v, p.act);
          moments.add<COLUMNS>(v, s.w - x);
        }
      }
    }
    if (p.partials) {
      const int tiles = plan.tiles_y * plan.tiles_x;
      const int64_t part = item / (int64_t(tiles) * plan.groups) * tiles + item % tiles;
      store_moments(reinterpret_cast<PartMoments*>(shared), moments.result(), ch, patch, patches, at, part, p);
    }
    __syncthreads();  // the tile is free
  }
}

}  // namespace

cudaError_t depthwise_fwd_ffma(const DepthwiseForward& p, const FfmaPlan& plan, cudaStream_t stream) {
  return dispatch_ffma(p.shape, [&]<class T, int KW>() {
    const int threads = plan.channels * plan.patches_x * plan.patches_y;
    return launch(depthwise_fwd_ffma_kernel<T, KW>, {plan.blocks, threads, plan.shared_bytes, stream}, p, plan);
  });
}

}  // namespace cmx
