// Depthwise convolution on the float32 pipes: what the forward and the backward kernel share.
#pragma once

#include "depthwise.h"
#include "neighbours.cuh"

namespace cmx {

constexpr int ROWS = FfmaPlan::kRows, COLUMNS = FfmaPlan::kColumns;  // of a thread's patch

// Where a block, and a thread in it, works
struct Place {
  int64_t n;
  int c, channels, y, x;  // first channel, how many of them exist, first row and column of the tile
};

__device__ __forceinline__ Place place_of(int64_t unit, int group, const FfmaPlan& plan, const DepthwiseShape& s) {
  Place at{unit, group * plan.channels, plan.channels, 0, 0};
  if (s.c - at.c < plan.channels) at.channels = s.c - at.c;
  const int tiles = plan.tiles_y * plan.tiles_x;
  if (tiles > 1) {
    at.n = unit / tiles;
    const int tile = static_cast<int>(unit - at.n * tiles), row = tile / plan.tiles_x;
    at.y = row * plan.patches_y * ROWS, at.x = (tile - row * plan.tiles_x) * plan.patches_x * COLUMNS;
  }
  return at;
}

// weight [c][kh][kw] -> weights [channel][kh][weight_pitch], `skip` columns further right and zeros beside.
// FLIP: turned by 180 degrees, for the gradient of the input.
template <class T, bool FLIP = false>
__device__ __forceinline__ void load_weights(float* weights, const void* weight, const Place& at,
                                             const DepthwiseShape& s, const FfmaPlan& plan) {
  const int row = s.kh * plan.weight_pitch;
  const T* const from = static_cast<const T*>(weight) + static_cast<int64_t>(at.c) * s.kh * s.kw;
  for (int ch = 0; ch < at.channels; ++ch)
    for (int i = threadIdx.x; i < row; i += blockDim.x) {
      const int ky = i / plan.weight_pitch, kx = i % plan.weight_pitch - plan.skip;
      const bool inside = kx >= 0 && kx < s.kw;
      const int tap = ky * s.kw + kx, taps = s.kh * s.kw;
      weights[ch * plan.weight_channel_pitch + i] =
          inside ? to_float(from[ch * taps + (FLIP ? taps - 1 - tap : tap)]) : 0.f;
    }
}

// acc[i][j] += sum of weight[ky][kx] * row[i + ky][j + kx + skip], for kernels of width KW with own_width
template <int KW>
__device__ __forceinline__ void convolve_width(float (&acc)[ROWS * COLUMNS], const float* row, const float* weights,
                                               int kh, int pitch) {
  constexpr int SKIP = (4 - (KW - 1) / 2 % 4) % 4, CHUNKS = (SKIP + KW + 3) / 4,
                WEIGHTS = 4 * CHUNKS;  // as in the plan
  constexpr int WINDOW = (COLUMNS + SKIP + KW + 2) / 4 * 4;
  // the next input row adds to the output rows FIRST to LAST; `weights` are at those that it has for output row 0
  const auto next_row = [&]<int FIRST, int LAST>() {
    float v[WINDOW];
#pragma unroll
    for (int j = 0; j < WINDOW; j += 4) load4(v + j, row + j);
#pragma unroll
    for (int i = FIRST; i <= LAST; ++i)
#pragma unroll
      for (int k = 0; k < WEIGHTS; k += 4) {
        float w[4];
        load4(w, weights - i * WEIGHTS + k);
#pragma unroll
        for (int tap = 0; tap < 4; ++tap)
          if (k + tap >= SKIP && k + tap < SKIP + KW) {
#pragma unroll
            for (int j = 0; j < COLUMNS; ++j) acc[i * COLUMNS + j] = fmaf(w[tap], v[k + tap + j], acc[i * COLUMNS + j]);
          }
      }
    row += pitch, weights += WEIGHTS;
  };
  static_assert(ROWS == 4);
  next_row.template operator()<0, 0>();
  next_row.template operator()<0, 1>();
  next_row.template operator()<0, 2>();
  if constexpr (KW == 3) {
#pragma unroll 1
    for (int ky = 3; ky < kh; ++ky) next_row.template operator()<0, 3>();
  } else {
    int ky = 3;
#pragma unroll 1
    do next_row.template operator()<0, 3>();
    while (++ky < kh);
  }
  next_row.template operator()<1, 3>();
  next_row.template operator()<2, 3>();
  next_row.template operator()<3, 3>();
}

// The same for any kernel
__device__ __forceinline__ void convolve_any(float (&acc)[ROWS * COLUMNS], const float* row, const float* weights,
                                             const DepthwiseShape& s, const FfmaPlan& plan) {
  const int first = plan.skip, end = first + s.kw;  // taps of a row, as the weights lie
  for (int r = 0; r < ROWS + s.kh - 1; ++r, row += plan.pitch) {
    float v[COLUMNS + 4];
    load4(v, row);
    load4(v + 4, row + 4);
#pragma unroll
    for (int k = 0; k < end; k += 4) {
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

// Of a kernel of width KW, 0: of any
template <int KW>
__device__ __forceinline__ void convolve(float (&acc)[ROWS * COLUMNS], const float* row, const float* weights,
                                         const DepthwiseShape& s, const FfmaPlan& plan) {
  if constexpr (KW)
    convolve_width<KW>(acc, row, weights, s.kh, plan.pitch);
  else
    convolve_any(acc, row, weights, s, plan);
}

// run<T, KW>() of the shape's dtype and of its kernel's width, 0 where that has no code of its own
template <class T, class F>
cudaError_t dispatch_width(const DepthwiseShape& s, const F& run) {
  switch (own_width(s) ? s.kw : 0) {
    case 3: return run.template operator()<T, 3>();
    case 5: return run.template operator()<T, 5>();
    case 7: return run.template operator()<T, 7>();
    case 9: return run.template operator()<T, 9>();
    default: return run.template operator()<T, 0>();
  }
}

template <class F>
cudaError_t dispatch_ffma(const DepthwiseShape& s, const F& run) {
  switch (s.dtype) {
    case Dtype::float32: return dispatch_width<float>(s, run);
    case Dtype::float16: return dispatch_width<fp16>(s, run);
    case Dtype::bfloat16: return dispatch_width<bf16>(s, run);
  }
  return cudaErrorInvalidValue;
}

}  // namespace cmx
