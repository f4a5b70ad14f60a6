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

// run<T, KW>() of the shape's dtype and of its kernel's width, 0 where that has no code of its own
template <class T, class F>
cudaError_t dispatch_width(const DepthwiseShape& s, const F& run) {
  switch (s.kw) {
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
