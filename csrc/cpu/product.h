// panel [pixel][channel] x weights -> MR pixels by NR vectors of output channels, all sums in registers.
//
// Weights are packed as [panel of NR * VL output channels][input channel][NR * VL], for bfloat16 products as
// [panel][input channel / 2][NR * VL][2]; the last panel is as narrow as what is left. For tiles every VL output channels are
// a panel, of float32 [panel][input channel / 32][third][16][VL][2]. Every output sums over the input channels in order, whatever the tiling.
#pragma once

#include <type_traits>
#include <utility>

#include "layout.h"
#include "triple.h"

namespace cmx::CMX_ISA {

constexpr int64_t MR = 6, NR = VL == 16 ? 4 : 2;  // 24 sums, 4 weights, 1 pixel of 32 registers; 12, 2, 1 of 16

// Calls f(P()), P the element of a panel: bfloat16 where the CPU multiplies it, else float, or triple where it has tiles
template <class F>
CMX_INLINE auto with_panel(Dtype d, F f) {
  if constexpr (kBf16Products)
    if (d == Dtype::bfloat16) return f(bfloat16{});
  if constexpr (kTiles)
    return f(triple{});
  else
    return f(float{});
}

template <class P>
constexpr int64_t kChannelsAtOnce = sizeof(P) == 4 ? 1 : 2;
template <class P>
constexpr int64_t kPieces = std::is_same_v<std::remove_const_t<P>, triple> ? kThirds : 1;

// Whether products of these panels are tiles; they are summed over multiples of kTileDepth channels then.
template <class P>
constexpr bool kTilePanel = kTiles && sizeof(P) == 2;
template <class P>
constexpr int64_t kDepth = kTilePanel<P> ? kTileDepth : VL;
// Blocks of VL output channels: side by side in a packed panel, and of one sweep over the pixels
template <class P>
constexpr int64_t kWide = kTilePanel<P> ? 1 : NR;
template <class P>
constexpr int64_t kSweep = kTilePanel<P> ? 2 : NR;

// Elements of `channels` of a pixel, and the place of a multiple of VL of them
template <class P>
CMX_INLINE int64_t width_of(int64_t channels) {
  return channels * kPieces<P>;
}
template <class P>
CMX_INLINE P* at(P* pixel, int64_t channel) {
  return pixel + channel + (kPieces<P> - 1) * (channel / kTileDepth * kTileDepth);
}

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

constexpr int64_t kRun = 256, kTileRun = 1024 / kTileDepth;

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

#if defined(CMX_TILES)
// As sweep() for at most two panels, f for some pixels of one of them at a time, while the next are multiplied; reads whole
// tiles of pixels. Meanwhile the panels at `next` (or null) are on their way.
template <class P, class F>
CMX_INLINE void tile_sweep(const P* panel, int64_t pitch, int64_t pixels, int64_t channels, const P* weight, int64_t r,
                           const void* next, F f) {
  constexpr int64_t kPixels = 2 * kTile, kSome = 8;  // of a block of tiles, and of a call of f
  constexpr int64_t kRow = kTileDepth * 2, kTileBytes = kTile * kRow;
  constexpr int kOf = kPieces<P>;
  const int64_t steps = channels / kTileDepth, calls_a_step = ceil_div(2 * kPixels / kSome, steps);
  const int64_t block = VL * width_of<P>(channels);  // elements of a packed panel
  alignas(64) float acc[3][2][kPixels * VL];

  const float* sums = nullptr;  // what f has not had: from pixel `done` of block j on
  int64_t m = 0, count = 0, j = 0, done = 0, left = 0;
  auto call = [&]() __attribute__((always_inline)) {
    const int64_t some = least(kSome, count - done);
    float* const at = (float*)sums + (j * kPixels + done) * VL;
    if constexpr (kOf > 1) {
      for (int64_t i = 0; i < some; i++) {
        const vf v = load(at + i * VL);
        if (!has_nan(v)) continue;
        const vf exact = exact_sums(panel + (m + done + i) * pitch, weight + j * block, channels);
        store(at + i * VL, (v == v) ? v : exact);
      }
    }
    f(m + done, some, j, at);
    done += some;
    left -= some;
    if (done == count) j++, done = 0;
  };
  // evenly: the hardware would bring what a block of tiles reads first all at once
  const char *ahead = (const char*)next, *const ahead_end = next ? ahead + r * block * 2 : ahead;
  const int64_t turns = std::size(kFactors<kOf>) * steps * ceil_div(pixels, kPixels);
  const int64_t lines = ceil_div(r * block * 2, 64 * turns);
  auto work = [&](bool last) __attribute__((always_inline)) {
    for (int64_t i = 0; i < lines && ahead < ahead_end; i++, ahead += 64) __builtin_prefetch(ahead, 0, 2);
    if (!last) return;
    for (int64_t i = 0; i < calls_a_step && left; i++) call();
  };
  const bool two = r > 1;
  for (int64_t first = 0, turn = 0; first < pixels; first += kPixels, turn ^= 1) {
    const int64_t there = least(kPixels, pixels - first);
    auto multiply = there > kTile ? two ? tile_block<2, 2, kOf, decltype(work)> : tile_block<2, 1, kOf, decltype(work)>
                    : two         ? tile_block<1, 2, kOf, decltype(work)>
                                  : tile_block<1, 1, kOf, decltype(work)>;
    for (int64_t k = 0; k < steps; k += kTileRun) {
      const Operand a{panel + first * pitch + k * kOf * kTileDepth, pitch * 2, kTile * pitch * 2, kOf * kRow, kRow};
      const Operand b{weight + k * kOf * kTile * kTileDepth, kRow, block * 2, kOf * kTileBytes, kTileBytes};
      float* const to = acc[k ? 2 : turn][0];
      multiply(a, b, least(kTileRun, steps - k), to, VL * 4, sizeof(acc[0][0]), work);
      for (int64_t i = 0; k && i < 2 * kPixels * VL; i += VL)
        store(acc[turn][0] + i, load(acc[turn][0] + i) + load(to + i));
    }
    while (left) call();
    sums = acc[turn][0], m = first, count = there, j = done = 0, left = r * there;
  }
  while (left) call();
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
    for (int64_t block = 0; block < blocks; block += kSweep<P>) {
      const int64_t r = least(kSweep<P>, blocks - block), size = r * VL * width_of<P>(channels);
      const P* weight = (const P*)p.weight + block * VL * width_of<P>(channels);
      const void* next = block + r < blocks ? weight + size : end < pixels ? p.weight : p.next;
      if constexpr (kTilePanel<P>)
        tile_sweep(panel + m0 * pitch, pitch, end - m0, channels, weight, r, next,
                   [&](int64_t m, int64_t count, int64_t j, const float* acc) { f(m0 + m, 1, count, block + j, acc); });
      else
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

// The patch under pixel (y, x) as a row of a panel, zeros behind it. some: patch_scratch<P>(channels) floats
template <class P>
CMX_INLINE int64_t patch_scratch(int64_t channels) {
  return kPieces<P> > 1 ? channels + VL : 0;
}
template <class T, class P>
CMX_INLINE void fill_patch(const View& in, int64_t n, int64_t y, int64_t x, int64_t ph, int64_t pw, int64_t channels,
                           P* pixel, float* some) {
  if constexpr (kPieces<P> > 1) {
    float* to = some + copy_patch<T>(in, n, y, x, ph, pw, some);
    for (; to < some + channels; to += VL) store(to, vf{});
    for (int64_t c = 0; c < channels; c += VL) store(at(pixel, c), load(some + c));
  } else {
    P* to = pixel + copy_patch<T>(in, n, y, x, ph, pw, pixel);
    for (; to < pixel + channels; to += VL) store(to, vf{});
  }
}

template <class P>
static int64_t packed_product_bytes(int64_t c_out, int64_t c_in) {
  return round_up(c_out, VL) * width_of<P>(panel_channels<P>(c_in)) * sizeof(P);
}

static int64_t packed_pointwise_bytes(Dtype dtype, int64_t c_out, int64_t c_in) {
  return with_panel(dtype, [&](auto p) { return packed_product_bytes<decltype(p)>(c_out, c_in); });
}

// Input channels k and k + 1 (of float32: k) of VL output channels, as a product by panels of P reads them
template <class P>
CMX_INLINE void pack_channels(vf first, vf second, float* packed, int64_t k, int64_t width) {
  if constexpr (std::is_same_v<P, float>) {
    store(packed + k * width, first);
  } else if constexpr (std::is_same_v<P, triple>) {
    const Thirds a(first), b(second);
    float* const to = packed + (k / kTileDepth * kThirds * kTileDepth + k % kTileDepth) / 2 * width;
    for (int64_t i = 0; i < kThirds; i++) *(vu*)(to + i * kTileDepth / 2 * width) = pack_pair(a.v[i], b.v[i]);
  } else {
    *(vu*)(packed + k / 2 * width) = pack_pair(first, second);
  }
}

// NR * VL output channels. weight [1, c_out, 1, c_in]: its input channels are the View's pixels.
static void pack_pointwise(const View& weight, int64_t task, void* out) {
  with_panel(weight.dtype, [&](auto p) {
    typedef decltype(p) P;
    constexpr int64_t kStep = 64, S = kChannelsAtOnce<P>;  // input channels at a time, and of a word
    const int64_t c = weight.w, channels = panel_channels<P>(c), blocks = ceil_div(weight.c, VL);
    for (int64_t block = task * NR; block < least((task + 1) * NR, blocks); block++) {
      const int64_t first = block / kWide<P> * kWide<P>, width = least(kWide<P>, blocks - first) * VL;
      float* const to = (float*)out + first * VL * width_of<P>(channels) / S + (block - first) * VL;
      for (int64_t k = 0; k < channels; k += kStep) {
        const int64_t step = least(kStep, channels - k), count = most(0, least(step, c - k));
        float some[kStep * VL];
        if (count) gather(weight, 0, block * VL, 0, k, count, some, VL);
        for (int64_t i = count; i < step; i++) store(some + i * VL, vf{});
        for (int64_t i = 0; i < step; i += S)
          pack_channels<P>(load(some + i * VL), load(some + (i + S - 1) * VL), to, k + i, width);
      }
    }
  });
}

}  // namespace cmx::CMX_ISA
