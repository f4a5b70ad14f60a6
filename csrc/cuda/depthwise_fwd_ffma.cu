// Depthwise convolution on the float32 pipes: any dtype, kernel, size and strides.
//
// A block owns a tile of outputs of a few channels. It brings the inputs under the tile, as float32 and with zeros
// around the plane, into shared memory; then each thread computes a patch of 4 rows x 8 columns of one channel:
//   acc[i][j] += weight[ky][kx] * tile[i + ky][j + kx]
// For each of the 4 + kh - 1 input rows it slides a window of 12 numbers over the row, four taps at a time, and adds to
// every output row that the input row reaches: 128 FFMA for one new 16-byte load of the row and four of the weights.
#include "depthwise.h"
#include "epilogue.cuh"

namespace cmx {
namespace {

constexpr int ROWS = FfmaPlan::kRows, COLUMNS = FfmaPlan::kColumns;  // of a thread's patch

__device__ __forceinline__ void load4(float* to, const float* from) {
  const float4 v = get<float4>(from);
  to[0] = v.x, to[1] = v.y, to[2] = v.z, to[3] = v.w;
}

// Four neighbours in one access
template <class T>
__device__ __forceinline__ void load4_vector(float* to, const T* from) {
  if constexpr (sizeof(T) == 4) {
    load4(to, from);
  } else {
    const uint2 words = get<uint2>(from);
    const float2 a = unpack<T>(words.x), b = unpack<T>(words.y);
    to[0] = a.x, to[1] = a.y, to[2] = b.x, to[3] = b.y;
  }
}

template <class T>
__device__ __forceinline__ void store8_vector(T* to, const float* v) {
  if constexpr (sizeof(T) == 4) {
    put(to, make_float4(v[0], v[1], v[2], v[3]));
    put(to + 4, make_float4(v[4], v[5], v[6], v[7]));
  } else {
    put(to, make_uint4(pack<T>(v[0], v[1]), pack<T>(v[2], v[3]), pack<T>(v[4], v[5]), pack<T>(v[6], v[7])));
  }
}

// Where a block, and a thread in it, works
struct Place {
  int64_t n;
  int c, channels, y, x;  // first channel, how many of them exist, first row and column of the tile
};

__device__ __forceinline__ Place place_of(int64_t item, const FfmaPlan& plan, const DepthwiseShape& s) {
  Place at;
  at.x = static_cast<int>(item % plan.tiles_x) * plan.patches_x * COLUMNS;
  item /= plan.tiles_x;
  at.y = static_cast<int>(item % plan.tiles_y) * plan.patches_y * ROWS;
  item /= plan.tiles_y;
  at.c = static_cast<int>(item % plan.groups) * plan.channels;
  at.n = item / plan.groups;
  at.channels = s.c - at.c < plan.channels ? s.c - at.c : plan.channels;
  return at;
}

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
    const float in_scale = p.in_scale ? p.in_scale[at.c + ch] : 1.f,
                in_shift = p.in_shift ? p.in_shift[at.c + ch] : 0.f;
    const bool affine = p.in_scale || p.in_shift;
    for (int row = row0; row < plan.tile_rows; row += row_step) {
      const int y = at.y + row - (s.kh - 1) / 2;
      const bool row_inside = y >= 0 && y < s.h;
      for (int chunk = chunk0; chunk * 4 < plan.pitch; chunk += plan.load_lanes) {
        const int x = at.x + chunk * 4 - plan.left;
        const T* const from = plane + y * p.x_stride.h + x * p.x_stride.w;
        float v[4];
        if (plan.vector_loads && row_inside && x >= 0 && x + 4 <= s.w) {
          load4_vector(v, from);
        } else {
#pragma unroll
          for (int j = 0; j < 4; ++j)
            v[j] = row_inside && x + j >= 0 && x + j < s.w ? to_float(from[j * p.x_stride.w]) : 0.f;
        }
        if (affine) {
#pragma unroll
          for (int j = 0; j < 4; ++j)
            if (row_inside && x + j >= 0 && x + j < s.w) v[j] = to_float(from_float<T>(fmaf(v[j], in_scale, in_shift)));
        }
        put(tile + ch * plan.channel_pitch + row * plan.pitch + chunk * 4, make_float4(v[0], v[1], v[2], v[3]));
      }
    }
  }
}

// weight [c][kh][kw] -> weights [channel][kh][weight_pitch], `skip` columns further right and zeros beside
template <class T>
__device__ __forceinline__ void load_weights(float* weights, const Place& at, const DepthwiseForward& p,
                                             const FfmaPlan& plan) {
  const DepthwiseShape& s = p.shape;
  const int row = s.kh * plan.weight_pitch;
  const T* const from = static_cast<const T*>(p.weight) + static_cast<int64_t>(at.c) * s.kh * s.kw;
  for (int ch = 0; ch < at.channels; ++ch)
    for (int i = threadIdx.x; i < row; i += blockDim.x) {
      const int ky = i / plan.weight_pitch, kx = i % plan.weight_pitch - plan.skip;
      const bool inside = kx >= 0 && kx < s.kw;
      weights[ch * plan.weight_channel_pitch + i] = inside ? to_float(from[(ch * s.kh + ky) * s.kw + kx]) : 0.f;
    }
}

// acc[i][j] = sum of weight[ky][kx] * row[i + ky][j + kx + skip]. KW > 0: the kernel's width, else any.
template <int KW>
__device__ __forceinline__ void convolve(float (&acc)[ROWS * COLUMNS], const float* row, const float* weights,
                                         const DepthwiseShape& s, const FfmaPlan& plan) {
  constexpr int SKIP = (4 - (KW - 1) / 2 % 4) % 4;                          // as in the plan
  const int first = KW ? SKIP : plan.skip, end = first + (KW ? KW : s.kw);  // taps of a row, as the weights lie
  for (int r = 0; r < ROWS + s.kh - 1; ++r, row += plan.pitch) {
    float v[COLUMNS + 4];
    load4(v, row);
    load4(v + 4, row + 4);
#pragma unroll
    for (int k = 0; k < (KW ? SKIP + KW : end); k += 4) {
      if (k + 1 < end) load4(v + 8, row + k + 8);
#pragma unroll
      for (int i = 0; i < ROWS; ++i) {
        const int ky = r - i;
        if (ky < 0 || ky >= s.kh) continue;
        float w[4];
        load4(w, weights + ky * plan.weight_pitch + k);
#pragma unroll
        for (int tap = 0; tap < 4; ++tap)
          if (k + tap >= first && k + tap < end) {
#pragma unroll
            for (int j = 0; j < COLUMNS; ++j) acc[i * COLUMNS + j] = fmaf(w[tap], v[tap + j], acc[i * COLUMNS + j]);
          }
      }
#pragma unroll
      for (int j = 0; j < COLUMNS; ++j) v[j] = v[j + 4];
    }
  }
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

  for (int64_t item = blockIdx.x; item < plan.items; item += gridDim.x) {
    const Place at = place_of(item, plan, s);
    load_tile<T>(tile, at, p, plan);
    load_weights<T>(weights, at, p, plan);
    __syncthreads();
    const int y = at.y + patch_y, x = at.x + patch_x;
    if (ch < at.channels && y < s.h && x < s.w) {
      const int c = at.c + ch;
      const float* const mine = tile + ch * plan.channel_pitch + patch_y * plan.pitch + patch_x;
      float acc[ROWS * COLUMNS];
      const float bias = p.bias ? p.bias[c] : 0.f;
#pragma unroll
      for (int i = 0; i < ROWS * COLUMNS; ++i) acc[i] = bias;
      convolve<KW>(acc, mine, weights + ch * plan.weight_channel_pitch, s, plan);
      activate<T, ROWS * COLUMNS>(acc, p.act);

      const float scale = p.scale ? p.scale[c] : 1.f, shift = p.shift ? p.shift[c] : 0.f;
      T* const to = static_cast<T*>(p.y) + at.n * p.y_stride.n + c * p.y_stride.c + x * p.y_stride.w;
#pragma unroll
      for (int i = 0; i < ROWS; ++i) {
        if (y + i >= s.h) break;
        float out[COLUMNS];
#pragma unroll
        for (int j = 0; j < COLUMNS; ++j) {
          const float residual = p.residual ? mine[(i + (s.kh - 1) / 2) * plan.pitch + plan.left + j] : 0.f;
          out[j] = fmaf(acc[i * COLUMNS + j], scale, shift + residual);
        }
        T* const row = to + (y + i) * p.y_stride.h;
        if (plan.vector_stores && x + COLUMNS <= s.w) {
          store8_vector(row, out);
        } else {
#pragma unroll
          for (int j = 0; j < COLUMNS; ++j)
            if (x + j < s.w) row[j * p.y_stride.w] = from_float<T>(out[j]);
        }
      }
    }
    __syncthreads();  // the tile is free
  }
}

template <class T, int KW>
cudaError_t launch(const DepthwiseForward& p, const FfmaPlan& plan, cudaStream_t stream) {
  const auto kernel = depthwise_fwd_ffma_kernel<T, KW>;
  if (plan.shared_bytes > 48 << 10)
    if (cudaError_t error =
            cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, plan.shared_bytes))
      return error;
  const int threads = plan.channels * plan.patches_x * plan.patches_y;
  CMX_LAUNCH(kernel, dim3(plan.blocks), dim3(threads), plan.shared_bytes, stream, p, plan);
  return cudaGetLastError();
}

template <class T>
cudaError_t launch_width(const DepthwiseForward& p, const FfmaPlan& plan, cudaStream_t stream) {
  switch (p.shape.kw) {
    case 3: return launch<T, 3>(p, plan, stream);
    case 5: return launch<T, 5>(p, plan, stream);
    case 7: return launch<T, 7>(p, plan, stream);
    case 9: return launch<T, 9>(p, plan, stream);
    default: return launch<T, 0>(p, plan, stream);
  }
}

}  // namespace

cudaError_t depthwise_fwd_ffma(const DepthwiseForward& p, const FfmaPlan& plan, cudaStream_t stream) {
  switch (p.shape.dtype) {
    case Dtype::float32: return launch_width<float>(p, plan, stream);
    case Dtype::float16: return launch_width<fp16>(p, plan, stream);
    case Dtype::bfloat16: return launch_width<bf16>(p, plan, stream);
  }
  return cudaErrorInvalidValue;
}

}  // namespace cmx
