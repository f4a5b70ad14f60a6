// Neighbours of a row, between memory and float32: in one access where the plan says that it is aligned, one by one else.
#pragma once

#include "epilogue.cuh"

namespace cmx {

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

// WIDTH neighbours, four or eight of 16 bits, of a row of width w from column x on, zeros beside it
template <int WIDTH, class T>
__device__ __forceinline__ void load_or_zeros(float* v, const T* row, int64_t step, int x, int w, bool row_inside,
                                              bool vector) {
  if (vector && row_inside && x >= 0 && x + WIDTH <= w) {
    if constexpr (WIDTH == 8)
      unpack8<T>(v, get<uint4>(row + x));
    else
      load4_vector(v, row + x);
  } else {
    const T* from = row + x * step;
#pragma unroll
    for (int j = 0; j < WIDTH; ++j, from += step) v[j] = row_inside && x + j >= 0 && x + j < w ? to_float(*from) : 0.f;
  }
}

// The first w - x of eight neighbours
template <class T>
__device__ __forceinline__ void store8(T* row, int64_t step, const float* v, int x, int w, bool vector) {
  if (vector && x + 8 <= w) {
    store8_vector(row + x, v);
  } else {
#pragma unroll
    for (int j = 0; j < 8; ++j)
      if (x + j < w) row[(x + j) * step] = from_float<T>(v[j]);
  }
}

}  // namespace cmx
