// Global average pool and linear layer, both summed in float32.
#pragma once

#include "layout.h"

namespace cmx::CMX_ISA {

constexpr int kChains = 8;  // independent sums: as accurate as pairwise halves, and no chain of dependent additions

CMX_INLINE vf total_of(vf (&sums)[kChains]) {
  for (int half = kChains / 2; half; half /= 2)
    for (int i = 0; i < half; i++) sums[i] += sums[i + half];
  return sums[0];
}

// The sum of one channel whose neighbouring pixels are vectors already
template <class T>
static float plane_sum(const View& in, int64_t n, int64_t c) {
  const View rows = as_one_row(in);
  vf sums[kChains] = {};
  for (int64_t y = 0; y < rows.h; y++) {
    const T* row = address<const T>(rows, n, c, y, 0);
    for (int64_t x = 0; x < rows.w; x += VL)
      sums[x / VL % kChains] += x + VL <= rows.w ? load(row + x) : load_some(row + x, 1, rows.w - x);
  }
  const vf lanes = total_of(sums);
  float total = 0;
  for (int64_t l = 0; l < VL; l++) total += lanes[l];
  return total;
}

// pooled[n][channel] = mean over the pixels, for one block of VL channels
static void pool_block(const PoolHead& p, int64_t n, int64_t block) {
  const View& in = p.in;
  const int64_t pixels = in.h * in.w;
  if (!in.blocked && in.sw == 1) {
    for (int64_t c = block * VL; c < least((block + 1) * VL, in.c); c++)
      p.pooled[n * in.c + c] =
          with_dtype(in.dtype, [&](auto t) { return plane_sum<decltype(t)>(in, n, c); }) / (float)pixels;
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

// out[n][class] = sum_c pooled[n][c] weight[class][c] + bias[class]
static void classify(const PoolHead& p, int64_t class_begin, int64_t class_end) {
  with_dtype(p.in.dtype, [&](auto t) {
    typedef decltype(t) T;
    const int64_t c = p.in.c, whole = c / VL * VL;
    for (int64_t k = class_begin; k < class_end; k++) {
      const T* w = (const T*)p.weight + k * c;
      for (int64_t n = 0; n < p.in.n; n++) {
        const float* x = p.pooled + n * c;
        vf sum[2] = {};
        for (int64_t i = 0; i < whole; i += VL) sum[i / VL % 2] += load(x + i) * load(w + i);
        if (whole < c) sum[0] += load_some(x + whole, 1, c - whole) * load_some(w + whole, 1, c - whole);
        const vf lanes = sum[0] + sum[1];
        float total = p.bias ? p.bias[k] : 0.f;
        for (int64_t l = 0; l < VL; l++) total += lanes[l];
        store_some((T*)p.out + n * p.classes + k, 1, 1, all(total));
      }
    }
  });
}

}  // namespace cmx::CMX_ISA
