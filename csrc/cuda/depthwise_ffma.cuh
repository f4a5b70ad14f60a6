// Depthwise convolution on the float32 pipes: what the forward and the backward kernel share.
#pragma once

#include "depthwise.h"
#include "epilogue.cuh"

namespace cmx {

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

// Four neighbours of a row of width w from column x on, zeros beside it
template <class T>
__device__ __forceinline__ void load4_or_zeros(float* v, const T* row, int64_t step, int x, int w, bool row_inside,
                                               bool vector) {
  if (vector && row_inside && x >= 0 && x + 4 <= w) {
    load4_vector(v, row + x);
  } else {
#pragma unroll
    for (int j = 0; j < 4; ++j) v[j] = row_inside && x + j >= 0 && x + j < w ? to_float(row[(x + j) * step]) : 0.f;
  }
}

// The first w - x of eight neighbours
template <class T>
__device__ __forceinline__ void store8(T* row, int64_t step, const float* v, int x, int w, bool vector) {
  if (vector && x + COLUMNS <= w) {
    store8_vector(row + x, v);
  } else {
#pragma unroll
    for (int j = 0; j < COLUMNS; ++j)
      if (x + j < w) row[(x + j) * step] = from_float<T>(v[j]);
  }
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

}  // namespace cmx
