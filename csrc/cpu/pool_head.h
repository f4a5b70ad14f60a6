// Global average pool and linear layer, both summed in float32.
#pragma once

#include "layout.h"

namespace cmx::CMX_ISA {

constexpr int kChains = 16;  // independent sums: as accurate as pairwise halves, and no chain of dependent additions

CMX_INLINE vf total_of(vf (&sums)[kChains]) {
  for (int half = kChains / 2; half; half /= 2)
    for (int i = 0; i < half; i++) sums[i] += sums[i + half];
  return sums[0];
}

// pooled[n][channel] for kPlanes channels whose pixels follow one another, summed in the order of a block of channels
constexpr int64_t kPlanes = 4;
template <class T>
static void pool_planes(const PoolHead& p, int64_t n, int64_t channel) {
  constexpr int64_t kVectors = kChains / VL;
  const int64_t pixels = p.in.h * p.in.w, planes = least(kPlanes, p.in.c - channel);
  vf sums[kPlanes] = {};
  for (int64_t plane = 0; plane < planes; plane++) {
    const T* const from = address<const T>(p.in, n, channel + plane, 0, 0);
    vf chains[kVectors] = {};
    int64_t i = 0;
    for (; i + kChains <= pixels; i += kChains)
      for (int64_t v = 0; v < kVectors; v++) chains[v] += load(from + i + v * VL);
    for (; i < pixels; i += VL)
      chains[i / VL % kVectors] += i + VL <= pixels ? load(from + i) : load_some(from + i, 1, pixels - i);
    for (int64_t half = kVectors / 2; half; half /= 2)
      for (int64_t v = 0; v < half; v++) chains[v] += chains[v + half];
    sums[plane] = chains[0];
  }
  float lanes[VL];
  store(lanes, totals(sums) / all((float)pixels));
  for (int64_t i = 0; i < planes; i++) p.pooled[n * p.in.c + channel + i] = lanes[i * VL / kPlanes];
}

// The same for some blocks of a channels_last image, whose pixels are then read in pieces of as many lines
template <int64_t kBlocks, class T>
static void pool_pixels(const PoolHead& p, int64_t n, int64_t block) {
  const View& in = p.in;
  vf sums[kBlocks][kChains] = {};
  int64_t chain = 0;
  for (int64_t y = 0; y < in.h; y++)
    for (int64_t x = 0; x < in.w; x++, chain = (chain + 1) % kChains) {
      const T* const from = address<const T>(in, n, block * VL, y, x);
#pragma GCC unroll 8
      for (int64_t b = 0; b < kBlocks; b++) sums[b][chain] += load(from + b * VL);
    }
  for (int64_t b = 0; b < kBlocks; b++)
    store(p.pooled + n * in.c + (block + b) * VL, total_of(sums[b]) / all((float)(in.h * in.w)));
}

// pooled[n][channel] = mean over the pixels, for one block of VL channels
static void pool_block(const PoolHead& p, int64_t n, int64_t block) {
  const View& in = p.in;
  const int64_t pixels = in.h * in.w;
  if (const View plane = as_one_row(in); plane.h == 1 && plane.sw == 1 && !in.blocked) {
    with_dtype(in.dtype, [&](auto t) {
      for (int64_t c = block * VL; c < least((block + 1) * VL, in.c); c += kPlanes) pool_planes<decltype(t)>(p, n, c);
    });
    return;
  }
  vf sums[kChains] = {};
  auto add = [&](const auto* from, int64_t first, int64_t count) {
    for (int64_t i = 0; i < count; i++) sums[(first + i) % kChains] += load(from + i * VL);
  };
  if (in.paired) {
    const vu* from = (const vu*)block_of<const bfloat16>(in, n, block);
    for (int64_t i = 0; i < pixels; i += 2) {
      sums[i % kChains] += low(from[i / 2]);
      sums[(i + 1) % kChains] += high(from[i / 2]);
    }
  } else if (in.blocked) {
    with_dtype(in.dtype, [&](auto t) { add(block_of<const decltype(t)>(in, n, block), 0, pixels); });
  } else {
    constexpr int64_t kStep = 64;
    float some[kStep * VL];
    for_rows(in, 0, in.h, [&](int64_t y, int64_t, int64_t count, int64_t pixels_before) {
      View row = in;
      row.w = count;
      for (int64_t x = 0; x < count; x += kStep) {
        const int64_t step = least(kStep, count - x);
        gather(row, n, block * VL, y, x, step, some, VL);
        add(some, pixels_before + x, step);
      }
    });
  }
  store_some(p.pooled + n * in.c + block * VL, 1, least(VL, in.c - block * VL), total_of(sums) / all((float)pixels));
}

constexpr int64_t kPoolBlocks = 8;  // a task

static void pool_blocks(const PoolHead& p, int64_t n, int64_t block) {
  const int64_t blocks = ceil_div(p.in.c, VL), end = least(block + kPoolBlocks, blocks);
  const int64_t whole = !p.in.blocked && p.in.sc == 1 ? least(end, p.in.c / VL) : 0;
  with_dtype(p.in.dtype, [&](auto t) {
    typedef decltype(t) T;
    for (; block + 8 <= whole; block += 8) pool_pixels<8, T>(p, n, block);
    for (; block + 2 <= whole; block += 2) pool_pixels<2, T>(p, n, block);
  });
  for (; block < end; block++) pool_block(p, n, block);
}

// out[n][class] = sum_c pooled[n][c] weight[class][c] + bias[class], M images by R classes in registers. Every output sums
// its channels in the same order, whatever the tiling.
template <int M, int R, class T>
static void classify_tile(const PoolHead& p, int64_t n, int64_t k) {
  const int64_t c = p.in.c;
  const float* x = p.pooled + n * c;
  const T* w = (const T*)p.weight + k * c;
  vf sums[M][R] = {};
  // one loop with its end in it: behind a loop of their own, compilers round the last products in some tilings only
  auto read = [&](const auto* at, int64_t i)
                  __attribute__((always_inline)) { return i + VL <= c ? load(at + i) : load_some(at + i, 1, c - i); };
  for (int64_t i = 0; i < c; i += VL) {
    vf wv[R];
#pragma GCC unroll 4
    for (int r = 0; r < R; r++) {
      wv[r] = read(w + r * c, i);
      __builtin_prefetch(w + (R + r) * c + i);  // of the next classes: behind a network they come from memory
    }
#pragma GCC unroll 4
    for (int m = 0; m < M; m++) {
      const vf xv = read(x + m * c, i);
#pragma GCC unroll 4
      for (int r = 0; r < R; r++) sums[m][r] += xv * wv[r];
    }
  }
  for (int m = 0; m < M; m++) {
    float lanes[VL], out[VL] = {};
    store(lanes, totals(sums[m]));
    for (int r = 0; r < R; r++) out[r] = lanes[r * VL / R] + (p.bias ? p.bias[k + r] : 0.f);
    store_some((T*)p.out + (n + m) * p.classes + k, 1, R, load(out));
  }
}

static void classify(const PoolHead& p, int64_t class_begin, int64_t class_end) {
  constexpr int kTile = VL == 16 ? 4 : 2;  // 16 sums of 32 registers, 4 of 16
  with_dtype(p.in.dtype, [&](auto t) {
    typedef decltype(t) T;
    for (int64_t k = class_begin; k < class_end;) {
      const bool wide = k + kTile <= class_end;
      for (int64_t n = 0; n < p.in.n;) {
        const bool high = n + kTile <= p.in.n;
        if (high)
          wide ? classify_tile<kTile, kTile, T>(p, n, k) : classify_tile<kTile, 1, T>(p, n, k);
        else
          wide ? classify_tile<1, kTile, T>(p, n, k) : classify_tile<1, 1, T>(p, n, k);
        n += high ? kTile : 1;
      }
      k += wide ? kTile : 1;
    }
  });
}

}  // namespace cmx::CMX_ISA
