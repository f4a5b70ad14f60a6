// Mean and variance in float32 that stay right where the mean is large against the deviation, in a fixed order.
//
// A thread sums the deviations from the first value it sees; then pairs (count, mean, sum of squared deviations) merge,
//   d = mean_b - mean_a    mean = mean_a + d n_b / n    m2 = m2_a + m2_b + d^2 n_a n_b / n        (Chan et al. 1983)
// over the threads in the block, and by moments_final over the blocks. Nothing is added atomically.
#pragma once

#include "epilogue.cuh"

namespace cmx {

struct PartMoments {
  float count, mean, m2;
};

__device__ __forceinline__ PartMoments merge(const PartMoments& a, const PartMoments& b) {
  const float n = a.count + b.count;
  if (n == 0) return a;
  const float share = b.count / n, d = b.mean - a.mean;
  return {n, fmaf(d, share, a.mean), a.m2 + b.m2 + d * d * (a.count * share)};
}

// Of one thread
struct RunningMoments {
  float shift = 0, sum = 0, squares = 0;
  int count = 0;

  // The first `valid` of v, at least one
  template <int N>
  __device__ __forceinline__ void add(const float* v, int valid) {
    if (!count) shift = v[0];
    count += valid < N ? valid : N;
#pragma unroll
    for (int i = 0; i < N; ++i) {
      const float d = i < valid ? v[i] - shift : 0.f;
      sum += d, squares = fmaf(d, d, squares);
    }
  }

  __device__ __forceinline__ PartMoments result() const {
    if (!count) return {0.f, 0.f, 0.f};
    const float n = static_cast<float>(count), mean = sum / n;
    const float m2 = fmaf(-sum, mean, squares);
    return {n, shift + mean, m2 < 0 ? 0.f : m2};  // NaN stays NaN
  }
};

__device__ __forceinline__ void store_part(float* partials, int64_t part, int channels, int c, const PartMoments& m) {
  float* const to = partials + (part * channels + c) * 3;
  to[0] = m.count, to[1] = m.mean, to[2] = m.m2;
}

// Lane 0 gets the moments of the warp.
__device__ __forceinline__ PartMoments merge_warp(PartMoments m) {
#pragma unroll
  for (int bits = 16; bits; bits /= 2)
    m = merge(m, {__shfl_xor_sync(0xffffffffu, m.count, bits), __shfl_xor_sync(0xffffffffu, m.mean, bits),
                  __shfl_xor_sync(0xffffffffu, m.m2, bits)});
  return m;
}

// x' = (in_act(x) - mean) * scale + shift of one channel
struct InputAffine {
  float mean, scale, shift;
  __device__ __forceinline__ float operator()(float activated) const { return fmaf(activated - mean, scale, shift); }
};

__device__ __forceinline__ InputAffine affine_of(const float* rows, int c, int channels) {
  if (!rows) return {0.f, 1.f, 0.f};
  return {rows[c], rows[channels + c], rows[2 * channels + c]};
}

// Of the outputs of one channel
struct ChannelConstants {
  float bias, scale, shift;
};

template <class Parameters>
__device__ __forceinline__ ChannelConstants constants_of(const Parameters& p, int c) {
  return {p.bias ? p.bias[c] : 0.f, p.scale ? p.scale[c] : 1.f, p.shift ? p.shift[c] : 0.f};
}

}  // namespace cmx
