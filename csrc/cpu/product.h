// panel [pixel][channel] x weights -> MR pixels by NR vectors of output channels, all sums in registers.
//
// Weights are packed as [panel of NR * VL output channels][input channel][NR * VL], for bfloat16 products as
// [panel][input channel / 2][NR * VL][2]; the last panel is as narrow as what is left. Every output sums over the input channels in order, whatever the tiling.
#pragma once

#include <type_traits>
#include <utility>

#include "layout.h"
#include "tiles.h"

namespace cmx::CMX_ISA {

constexpr int64_t MR = 6, NR = VL == 16 ? 4 : 2;  // 24 sums, 4 weights, 1 pixel of 32 registers; 12, 2, 1 of 16

// The element of a panel: bfloat16 where the CPU multiplies it, float32 otherwise
template <class P>
constexpr int64_t kChannelsAtOnce = sizeof(P) == 4 ? 1 : 2;

template <class P>
struct Tile {
  const P* panel;
  int64_t pitch;  // elements from pixel to pixel
  const P* weight;
  int64_t channels;   // even
  int64_t run;        // input channels summed in one go; sums of runs are then added: fewer rounding errors
  const char* ahead;  // one line prefetched for every k
  int64_t stride;
};

constexpr int64_t kRun = 256;

template <int64_t M, int64_t R, class P>
static __attribute__((noinline)) void product_tile(const Tile<P>& a, float* out) {
  constexpr int64_t S = kChannelsAtOnce<P>;
  const P *u = a.panel, *w = a.weight;
  const char* ahead = a.ahead;
  const int64_t pitch = a.pitch, stride = a.stride, run = a.run;
  for (int64_t k0 = 0; k0 < a.channels; k0 += run) {
    vf acc[M][R] = {};
    for (int64_t k = k0; k < least(k0 + run, a.channels); k += S, u += S, w += R * VL * S, ahead += stride) {
      __builtin_prefetch(ahead);  // into L1: asked for into L2 alone, lines of pages that the TLB lacks do not come
      vf wv[R];
#pragma GCC unroll 4
      for (int64_t j = 0; j < R; j++) wv[j] = load((const float*)w + j * VL);
#pragma GCC unroll 16
      for (int64_t i = 0; i < M; i++) {
        const vf uv = broadcast((const float*)(u + i * pitch));
#pragma GCC unroll 4
        for (int64_t j = 0; j < R; j++)
          if constexpr (S == 1)
            acc[i][j] += uv * wv[j];
          else
            acc[i][j] = dot(acc[i][j], bits(uv), bits(wv[j]));
      }
    }
#pragma GCC unroll 4
    for (int64_t j = 0; j < R; j++)
#pragma GCC unroll 16
      for (int64_t i = 0; i < M; i++) {
        float* to = out + (j * M + i) * VL;
        store(to, k0 ? load(to) + acc[i][j] : acc[i][j]);
      }
  }
}

template <class P>
using TileLoop = void (*)(const Tile<P>&, float*);

template <class P, int64_t... I>
CMX_INLINE TileLoop<P> tile_loop(int64_t m, int64_t r, std::integer_sequence<int64_t, I...>) {
  static constexpr TileLoop<P> loops[] = {product_tile<I / NR + 1, I % NR + 1, P>...};
  return loops[(m - 1) * NR + r - 1];
}

// f(m, count, acc) gets the sums of `count` pixels for the r blocks of VL output channels of one packed panel of weights.
// Meanwhile the weights at `next` (or null) are on their way: as many bytes as this panel has.
template <class P, class F>
CMX_INLINE void sweep(const P* panel, int64_t pitch, int64_t pixels, int64_t channels, int64_t run, const P* weight,
                      int64_t r, const void* next, F f) {
  const int64_t tiles = ceil_div(pixels, MR), steps = channels / kChannelsAtOnce<P>;
  alignas(64) float acc[MR * NR * VL];
  Tile<P> tile;
  tile.pitch = pitch;
  tile.channels = channels;
  tile.run = run;
  tile.weight = weight;
  tile.stride = next ? ceil_div(channels * r * VL * sizeof(P), tiles * steps) : 0;
  tile.ahead = next ? (const char*)next : (const char*)weight;
  for (int64_t m = 0, i = 0; i < tiles; i++) {
    // as equal as possible, and whole pairs of pixels
    const int64_t count = least(round_up(ceil_div(pixels - m, tiles - i), 2), pixels - m);
    tile.panel = panel + m * pitch;
    tile_loop<P>(count, r, std::make_integer_sequence<int64_t, MR * NR>())(tile, acc);
    tile.ahead += tile.stride * steps;
    f(m, count, acc);
    m += count;
  }
}

// Whether products of these panels are tiles; they are summed over multiples of kTileDepth channels then.
template <class P>
constexpr bool kTilePanel = kTiles && sizeof(P) == 2;
template <class P>
constexpr int64_t kDepth = kTilePanel<P> ? kTileDepth : VL;

#if defined(CMX_TILES)
// As sweep(), f for one block of the r at a time; reads whole tiles of pixels
template <class F>
CMX_INLINE void tile_sweep(const bfloat16* panel, int64_t pitch, int64_t pixels, int64_t channels,
                           const bfloat16* weight, int64_t r, F f) {
  constexpr int64_t kPixels = 2 * kTile;
  alignas(64) float acc[2][kPixels * VL];
  for (int64_t m = 0; m < pixels; m += kPixels)
    for (int64_t j = 0; j < r; j += 2) {
      const int64_t count = least(kPixels, pixels - m), below = kTile * pitch * 2, row = r * VL * 4;
      const Operand a{panel + m * pitch, pitch * 2, below, kTileDepth * 2};
      const Operand b{weight + j * VL * 2, row, VL * 4, kTileDepth / 2 * row};
      const bool two = j + 1 < r, high = count > kTile;
      auto nothing = [](int64_t) {};
      auto multiply = two    ? high ? tile_block<2, 2, decltype(nothing)> : tile_block<1, 2, decltype(nothing)>
                      : high ? tile_block<2, 1, decltype(nothing)>
                             : tile_block<1, 1, decltype(nothing)>;
      multiply(a, b, channels / kTileDepth, acc[0], VL * 4, sizeof(acc[0]), nothing);
      for (int64_t i = 0; i < 1 + two; i++) f(m, count, j + i, acc[i]);
    }
}
#endif

// f(m, step, count, block, acc) gets the sums of `count` pixels, `step` apart, for one block of VL output channels;
// done(m0, m1, block, blocks) says that all pixels of a part have been given for these blocks.
template <class P, class F, class Done>
CMX_INLINE void product(const P* panel, int64_t pitch, int64_t pixels, int64_t channels, int64_t c_out,
                        const Pointwise& p, int64_t part, F f, Done done) {
  const int64_t blocks = ceil_div(c_out, VL);
#if defined(CMX_TILES)
  const std::conditional_t<kTilePanel<P>, Tiles, int> tiles{};
  (void)tiles;
#endif
  for (int64_t m0 = 0; m0 < pixels; m0 += part) {
    const int64_t end = least(m0 + part, pixels);
    for (int64_t block = 0; block < blocks; block += NR) {
      const int64_t r = least(NR, blocks - block);
      const P* weight = (const P*)p.weight + block * VL * channels;
#if defined(CMX_TILES)
      if constexpr (kTilePanel<P>) {
        tile_sweep(panel + m0 * pitch, pitch, end - m0, channels, weight, r,
                   [&](int64_t m, int64_t count, int64_t j, const float* acc) { f(m0 + m, 1, count, block + j, acc); });
        done(m0, end, block, r);
        continue;
      }
#endif
      const void* next = block + r < blocks ? weight + r * VL * channels : end < pixels ? p.weight : p.next;
      sweep(panel + m0 * pitch, pitch, end - m0, channels, kRun, weight, r, next,
            [&](int64_t m, int64_t count, const float* acc) {
              for (int64_t j = 0; j < r; j++) f(m0 + m, 1, count, block + j, acc + j * count * VL);
            });
      done(m0, end, block, r);
    }
  }
}

// Channels of a panel
template <class P>
CMX_INLINE int64_t panel_channels(int64_t c) {
  return round_up(c, kDepth<P>);
}

template <class P>
static int64_t packed_product_bytes(int64_t c_out, int64_t c_in) {
  return round_up(c_out, VL) * panel_channels<P>(c_in) * sizeof(P);
}

static int64_t packed_pointwise_bytes(Dtype dtype, int64_t c_out, int64_t c_in) {
  return dtype == Dtype::bfloat16 && kBf16Products ? packed_product_bytes<bfloat16>(c_out, c_in)
                                                   : packed_product_bytes<float>(c_out, c_in);
}

// One panel of NR * VL output channels. weight [1, c_out, 1, c_in]: its input channels are the View's pixels.
static void pack_pointwise(const View& weight, int64_t panel, void* out) {
  const bool pairs = weight.dtype == Dtype::bfloat16 && kBf16Products;
  const int64_t c = weight.w, first = panel * NR;
  const int64_t channels = pairs ? panel_channels<bfloat16>(c) : panel_channels<float>(c);
  const int64_t width = least(NR, ceil_div(weight.c, VL) - first) * VL;
  constexpr int64_t kStep = 64;  // input channels at a time
  float* const to = (float*)out + first * VL * channels / (1 + pairs);
  for (int64_t j = 0; j < width; j += VL)
    for (int64_t k = 0; k < channels; k += kStep) {
      const int64_t step = least(kStep, channels - k), count = most(0, least(step, c - k));
      float some[kStep * VL];
      if (count) gather(weight, 0, first * VL + j, 0, k, count, some, VL);
      for (int64_t i = count; i < step; i++) store(some + i * VL, vf{});
      for (int64_t i = 0; i < step; i += 1 + pairs) {
        float* at = to + (k + i) * width / (1 + pairs) + j;
        if (pairs)
          *(vu*)at = pack_pair(load(some + i * VL), load(some + (i + 1) * VL));
        else
          store(at, load(some + i * VL));
      }
    }
}

}  // namespace cmx::CMX_ISA
