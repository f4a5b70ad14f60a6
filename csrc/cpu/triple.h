// float32 for tiles: each number as the sum of three bfloat16, each product as the six largest of nine.
//
//     a b = a1 b1 + (a1 b2 + a2 b1) + (a1 b3 + a2 b2 + a3 b1)        left out: at most 2^-22 of |a b|
//
// a1 is cut off and not rounded, so that it does not overflow. Of an infinity or NaN a3 is NaN, and so is every sum that it
// enters: by this it is found, and made again of whole numbers. What is below 2^-126 is 0 to a tile.
#pragma once

#include "tiles.h"

namespace cmx::CMX_ISA {

constexpr int64_t kThirds = 3;

// One of the three. Of kTileDepth channels all first ones lie side by side, then all second, then all third.
struct triple {
  uint16_t bits;
};

struct Thirds {
  vf v[kThirds];
  explicit Thirds(vf x) {
    v[0] = (vf)(bits(x) & 0xffff0000u);
    const vf rest = x - v[0];
    v[1] = (vf)((bits(rest) + 0x8000u) & 0xffff0000u);  // rounded
    v[2] = rest - v[1];
  }
};

CMX_INLINE void store(triple* p, vf x) {
  const Thirds thirds(x);
  for (int64_t i = 0; i < kThirds; i++) *(vh*)(p + i * kTileDepth) = narrow_bf16(thirds.v[i]);
}

CMX_INLINE vf whole(const vf (&v)[kThirds]) { return (v[2] == v[2]) ? v[0] + v[1] + v[2] : v[0]; }

CMX_INLINE vf load(const triple* p) {
  vf v[kThirds];
  for (int64_t i = 0; i < kThirds; i++) v[i] = widen_bf16(*(const vh*)(p + i * kTileDepth));
  return whole(v);
}

#if defined(CMX_TILES)
CMX_INLINE bool has_nan(vf v) { return _mm512_cmp_ps_mask((__m512)v, (__m512)v, _CMP_UNORD_Q); }

// The sums of one pixel for VL output channels. weight: [channel / 32][third][channel % 32 / 2][VL][2]
static __attribute__((noinline)) vf exact_sums(const triple* pixel, const triple* weight, int64_t channels) {
  bool nan = false;
  for (int64_t c = 0; c < channels; c += VL)
    nan |= has_nan(widen_bf16(*(const vh*)(pixel + c / kTileDepth * kThirds * kTileDepth + c % kTileDepth)));
  if (nan) return all(__builtin_nanf(""));  // at once: a network of NaN need not be slow
  vf sum{};
  for (int64_t c = 0; c < channels; c++) {
    const int64_t row = c / kTileDepth * kThirds, k = c % kTileDepth;
    vf x[kThirds], w[kThirds];
    for (int64_t i = 0; i < kThirds; i++) {
      const vu pair = *(const vu*)(weight + ((row + i) * kTileDepth + k - k % 2) * VL);
      x[i] = low(vu{} + pixel[(row + i) * kTileDepth + k].bits);
      w[i] = k % 2 ? high(pair) : low(pair);
    }
    sum += whole(x) * whole(w);
  }
  return sum;
}
#endif

}  // namespace cmx::CMX_ISA
