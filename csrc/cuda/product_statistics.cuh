// Statistics of a product's tile, for training: what BatchNorm needs of y, or of y as a gradient, while it is there.
//
//   moments   count, mean and squared deviations of act(y)      y is a pre-activation
//   sums      sum(y), sum(y (act(like) - mean))                 y is the gradient of what stands behind like
//
// The tile lies in shared memory as it is stored, in panels of 64 numbers a row, 128 bytes in the swizzle. A warp has a
// piece of it: eight lanes take 16 bytes each of a row, and load the next ones of `like` meanwhile. Deviations are from one
// of the piece's own numbers, which is at most sqrt(n - 1) deviations from the mean of all n (Samuelson's inequality): squares
// lose at most n ulp, whatever the mean. Lanes add in a fixed order.
#pragma once

#include "moments.cuh"
#include "product.h"

namespace cmx {

// Of an offset in a tile: bits 4-6 are XORed with bits 7-9
__device__ __forceinline__ int swizzled(int offset) { return offset ^ (offset >> 7 & 7) << 4; }

template <class T>
__device__ __forceinline__ void unpack_activated(float* v, const uint4& words, Act act) {
  float slope[8];  // not wanted, and not computed
  unpack8<T>(v, words);
  activate_with_slope<8>(v, slope, act);
}

// Sums of one channel, over what a thread sees
struct ChannelSums {
  float origin, first = 0, second = 0;

  // y or, without `like`, act(y) alone: its deviation d and d^2; v is activated
  __device__ __forceinline__ void add(float y, float v, bool sums) {
    const float d = v - origin, g = sums ? y : d;
    first += g, second = fmaf(g, d, second);
  }
  __device__ __forceinline__ void reduce(int from, int end) {  // over the lanes whose numbers differ in these bits
    for (int bit = from; bit < end; bit *= 2)
      first += __shfl_xor_sync(~0u, first, bit), second += __shfl_xor_sync(~0u, second, bit);
  }
  __device__ __forceinline__ void store(const ProductForward& p, int64_t part, int c, int count) const {
    if (c >= p.shape.c_out) return;
    if (p.like) {
      float* const to = p.partials + (part * p.shape.c_out + c) * 2;
      to[0] = first, to[1] = second;
    } else {
      store_part(p.partials, part, p.shape.c_out, c, RunningMoments{origin, first, second, count}.result());
    }
  }
};

__device__ __forceinline__ float mean_of(const ProductForward& p, int c) { return c < p.shape.c_out ? p.mean[c] : 0.f; }

// Rows are channels, columns pixels. The piece: ROWS rows from `row` on, of PANELS panels `panel_bytes` apart, the first
// of channel c. count(panel, chunk) of eight pixels exist, the very first if any does; like(row, panel, chunk) are theirs.
template <class T, int ROWS, int PANELS, class Count, class Like>
__device__ __forceinline__ void statistics_of_rows(const ProductForward& p, const unsigned char* tile, int panel_bytes,
                                                   int row, int c, int64_t part, int lane, const Count& count,
                                                   const Like& like) {
  const int chunk = lane % 8;
  int valid[PANELS], all = 0;
  uint4 next[PANELS];
#pragma unroll
  for (int i = 0; i < PANELS; ++i) {
    all += valid[i] = count(i, chunk);
    if (p.like) next[i] = like(lane / 8, i, chunk);
  }
#pragma unroll
  for (int bit = 1; bit < 8; bit *= 2) all += __shfl_xor_sync(~0u, all, bit);
#pragma unroll 1
  for (int r = lane / 8; r < ROWS; r += 4) {
    ChannelSums sums{};
#pragma unroll
    for (int i = 0; i < PANELS; ++i) {
      const uint4 words = get<uint4>(tile + i * panel_bytes + swizzled((row + r) * 128 + chunk * 16)),
                  other = p.like ? next[i] : words;
      if (p.like && r + 4 < ROWS) next[i] = like(r + 4, i, chunk);
      float y[8], v[8];
      unpack8<T>(y, words);
      unpack_activated<T>(v, other, p.act);
      if (i == 0) sums.origin = p.like ? mean_of(p, c + r) : __shfl_sync(~0u, v[0], lane & 24);
#pragma unroll
      for (int e = 0; e < 8; ++e)
        if (e < valid[i]) sums.add(y[e], v[e], p.like);
    }
    sums.reduce(1, 8);
    if (chunk == 0) sums.store(p, part, c + r, all);
  }
}

// Rows are pixels, columns channels. The piece: 64 rows from `row` on of one panel, and CHUNKS times eight of its columns
// from chunk `first` on, whose channel is c. exists(row), the first one if any does; like(row, chunk) are eight channels.
template <class T, int CHUNKS, class Exists, class Like>
__device__ __forceinline__ void statistics_of_columns(const ProductForward& p, const unsigned char* panel, int row,
                                                      int first, int c, int64_t part, int lane, const Exists& exists,
                                                      const Like& like) {
  constexpr int ROWS = 64, STEP = 32 / CHUNKS, AT_ONCE = 2;
  const int mine = lane % CHUNKS, chunk = first + mine;
  const auto words_of = [&](int r) { return get<uint4>(panel + swizzled((row + r) * 128 + chunk * 16)); };
  c += 8 * mine;
  uint4 next[AT_ONCE];
  float origin[8];
  ChannelSums sums[8];
  if (!p.like) unpack_activated<T>(origin, words_of(0), p.act);
#pragma unroll
  for (int e = 0; e < 8; ++e) sums[e].origin = p.like ? mean_of(p, c + e) : origin[e];
#pragma unroll
  for (int j = 0; j < AT_ONCE; ++j)
    if (p.like) next[j] = like(lane / CHUNKS + STEP * j, chunk);
  int all = 0;
#pragma unroll 1
  for (int at = lane / CHUNKS; at < ROWS; at += STEP * AT_ONCE) {
#pragma unroll
    for (int j = 0; j < AT_ONCE; ++j) {
      const int r = at + STEP * j;
      const uint4 words = words_of(r), other = p.like ? next[j] : words;
      if (p.like && r + STEP * AT_ONCE < ROWS) next[j] = like(r + STEP * AT_ONCE, chunk);
      if (!exists(r)) continue;
      float y[8], v[8];
      unpack8<T>(y, words);
      unpack_activated<T>(v, other, p.act);
#pragma unroll
      for (int e = 0; e < 8; ++e) sums[e].add(y[e], v[e], p.like);
      ++all;
    }
  }
#pragma unroll
  for (int bit = CHUNKS; bit < 32; bit *= 2) all += __shfl_xor_sync(~0u, all, bit);
#pragma unroll
  for (int e = 0; e < 8; ++e) {
    sums[e].reduce(CHUNKS, 32);
    if (lane < CHUNKS) sums[e].store(p, part, c + e, all);
  }
}

}  // namespace cmx
