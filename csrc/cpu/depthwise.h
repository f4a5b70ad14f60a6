// Depthwise convolution of one block of VL channels: CB output columns in registers, one row of taps after the other.
//
// Taps that fall outside the image are skipped, not multiplied by zero. Every output sums its taps in the same order,
// whatever the tiling, so results do not depend on bands or threads.
#pragma once

#include "layout.h"

namespace cmx::CMX_ISA {

constexpr int CB = VL == 16 ? 16 : 8;

constexpr int64_t before(int64_t k) { return (k - 1) / 2; }  // zero "same" padding, the extra one of an even k behind

#define X(k) || kw == k
CMX_INLINE bool unrolled(int64_t kw) { return false CMX_FOR_EACH_KERNEL_WIDTH(X); }
#undef X
CMX_INLINE bool pairs_depthwise(Dtype d, int64_t kw) { return kBf16Products && d == Dtype::bfloat16 && unrolled(kw); }

// What one call of a tap loop needs. `in` points at the first column of the block in the first row of taps.
struct Taps {
  const float* in;      // float32 [VL] a pixel, or bfloat16 pairs [VL][2]
  int64_t step, pitch;  // floats from pixel (or pair) to pixel, from row to row
  const float* weight;  // of the first row of taps
  int64_t weight_row;   // vectors
  int64_t rows, kw;
  int64_t lo, hi;     // columns lo <= i < hi around the block lie in the image
  const char* ahead;  // to be prefetched, `lines` cache lines a row
  int64_t lines;
};

CMX_INLINE const char* prefetch(const char* ahead, int64_t lines) {
  for (int64_t i = 0; i < lines; i++) __builtin_prefetch(ahead + 64 * i, 0, 3);
  return ahead + 64 * lines;
}

template <int B>
CMX_INLINE void store_block(const vf (&acc)[B], float* out) {
#pragma GCC unroll 64
  for (int c = 0; c < B; c++) store(out + c * VL, acc[c]);
}

// acc[c] = sum of x[c + t - P] w[t], c < B
template <int K, int B>
static __attribute__((noinline)) void float_taps(const Taps& a, float* out) {
  constexpr int P = before(K);
  vf acc[B] = {};
  const float *row = a.in, *w = a.weight;
  const char* ahead = a.ahead;
  const int lo = a.lo, hi = a.hi;
  for (int64_t r = 0; r < a.rows; r++, row += a.pitch, w += a.weight_row * VL) {
    ahead = prefetch(ahead, a.lines);
    vf wv[K];
#pragma GCC unroll 32
    for (int t = 0; t < K; t++) wv[t] = load(w + t * VL);
    const float* at = row - P * a.step;
#pragma GCC unroll 64
    for (int i = -P; i < B + K - 1 - P; i++, at += a.step) {
      if (i < 0 ? i < lo : i >= hi) continue;
      const vf x = load(at);
#pragma GCC unroll 64
      for (int c = 0; c < B; c++)
        if (i - c + P >= 0 && i - c + P < K) acc[c] += x * wv[i - c + P];
    }
  }
  store_block(acc, out);
}

// The same on pairs: weights are the pairs (w[t], w[t + 1]) for t < K - 1, then w[0] and w[K - 1] as float32.
template <int K, int B>
static __attribute__((noinline)) void pair_taps(const Taps& a, float* out) {
  constexpr int P = before(K);
  vf acc[B] = {};
  const float *row = a.in, *w = a.weight;
  const char* ahead = a.ahead;
  const int lo = a.lo, hi = a.hi;
  for (int64_t r = 0; r < a.rows; r++, row += a.pitch, w += a.weight_row * VL) {
    ahead = prefetch(ahead, a.lines);
    vu pair[K - 1];
#pragma GCC unroll 32
    for (int t = 0; t < K - 1; t++) pair[t] = ((const vu*)w)[t];
    const vf first = load(w + (K - 1) * VL), last = load(w + K * VL);
#pragma GCC unroll 64
    for (int q = -((P + 1) / 2); q < (B + K - P) / 2; q++) {
      if (q < 0 ? 2 * q < lo - 1 : 2 * q >= hi) continue;
      const vu x = ((const vu*)row)[q];
#pragma GCC unroll 64
      for (int c = 0; c < B; c++) {
        const int t = 2 * q - c + P;
        if (t >= 0 && t + 1 < K) acc[c] = dot(acc[c], x, pair[t]);
        if (t == -1) acc[c] += high(x) * first;
        if (t == K - 1) acc[c] += low(x) * last;
      }
    }
  }
  store_block(acc, out);
}

// Any width, on rows that are padded with zeros; taps that see nothing but padding are skipped.
template <int B>
static __attribute__((noinline)) void general_taps(const Taps& a, float* out) {
  const int64_t p = before(a.kw), t0 = most(0, a.lo + p - (B - 1)), t1 = least(a.kw, a.hi + p);
  vf acc[B] = {};
  const float *row = a.in - p * VL, *w = a.weight;
  for (int64_t r = 0; r < a.rows; r++, row += a.pitch, w += a.weight_row * VL)
    for (int64_t t = t0; t < t1; t++) {
      const vf wv = load(w + t * VL);
#pragma GCC unroll 64
      for (int c = 0; c < B; c++) acc[c] += load(row + (t + c) * VL) * wv;
    }
  store_block(acc, out);
}

typedef void (*TapLoop)(const Taps&, float*);
template <int B>
CMX_INLINE TapLoop tap_loop(int64_t kw, bool pairs) {
#define X(k) \
  if (kw == k) return kBf16Products && pairs ? pair_taps<k, B> : float_taps<k, B>;
  CMX_FOR_EACH_KERNEL_WIDTH(X)
#undef X
  return general_taps<B>;
}

// Rows [top, end) of one block of channels in the form that the tap loop reads
struct Rows {
  const float* first;   // row `top`, column 0
  int64_t step, pitch;  // floats
};

struct RowPlan {
  bool pairs, general;
  bool float_vectors;     // whole vectors of float32 channels lie side by side: most blocks are read where they are
  int64_t margin, width;  // of a converted row, in vectors
  RowPlan(const View& in, int64_t kw)
      : pairs(pairs_depthwise(in.dtype, kw)),
        general(!unrolled(kw)),
        float_vectors(in.dtype == Dtype::float32 && !general && (in.blocked || in.sc == 1)),
        margin(general ? before(kw) : 0),
        width(general ? round_up(in.w, CB) + kw - 1
              : pairs ? ceil_div(in.w, 2)
                      : in.w) {}
  bool direct(const View& in, int64_t block) const { return float_vectors && (in.blocked || (block + 1) * VL <= in.c); }
  int64_t scratch_vectors(const View& in, int64_t rows, int64_t kh) const {
    return float_vectors && in.blocked ? 0 : least(in.h, rows + kh - 1) * width + (pairs ? in.w + 1 : 0);
  }
};

template <class T>
CMX_INLINE void convert_row(const T* from, int64_t w, float* to) {
  for (int64_t x = 0; x < w; x++) store(to + x * VL, load(from + x * VL));
}
template <class T>
CMX_INLINE void pair_row(const T* from, int64_t w, vu* to) {
  for (int64_t x = 0; x + 1 < w; x += 2) to[x / 2] = pack_pair(load(from + x * VL), load(from + (x + 1) * VL));
  if (w % 2) to[w / 2] = pack_pair(load(from + (w - 1) * VL), vf{});
}
// Neighbouring bfloat16 pixels need no arithmetic to become pairs.
CMX_INLINE void pair_row(const bfloat16* from, int64_t w, vu* to) {
  auto word = [&](int64_t x) { return __builtin_convertvector(*(const vh*)(from + x * VL), vu); };
  for (int64_t x = 0; x + 1 < w; x += 2) to[x / 2] = word(x) | word(x + 1) << 16;
  if (w % 2) to[w / 2] = word(w - 1);
}

static Rows prepare_rows(const View& in, const RowPlan& plan, int64_t n, int64_t block, int64_t top, int64_t end,
                         float* scratch) {
  if (plan.direct(in, block))
    return in.blocked ? Rows{block_of<const float>(in, n, block) + top * in.w * VL, VL, in.w * VL}
                      : Rows{address<const float>(in, n, block * VL, top, 0), in.sw, in.sh};
  const int64_t pitch = plan.width * VL;
  float* const first = scratch + plan.margin * VL;
  float* const row_scratch = scratch + (end - top) * pitch;
  for (int64_t y = top; y < end; y++) {
    float* to = first + (y - top) * pitch;
    if (plan.general) {
      for (int64_t i = -plan.margin; i < 0; i++) store(to + i * VL, vf{});
      for (int64_t i = in.w; i < plan.width - plan.margin; i++) store(to + i * VL, vf{});
    }
    if (in.blocked) {
      with_dtype(in.dtype, [&](auto t) {
        const auto* from = block_of<const decltype(t)>(in, n, block) + y * in.w * VL;
        plan.pairs ? pair_row(from, in.w, (vu*)to) : convert_row(from, in.w, to);
      });
    } else if (plan.pairs) {
      gather(in, n, block * VL, y, 0, in.w, row_scratch, VL);
      pair_row(row_scratch, in.w, (vu*)to);
    } else {
      gather(in, n, block * VL, y, 0, in.w, to, VL);
    }
  }
  return {first, VL, pitch};
}

// Output rows [y0, y0 + rows) of one block of channels. f(y, x, count, acc, residual, its step) gets CB columns of
// sums at a time.
template <class F>
CMX_INLINE void depthwise_rows(const View& in, const Depthwise& d, int64_t n, int64_t block, int64_t y0, int64_t rows,
                               float* scratch, F f) {
  const RowPlan plan(in, d.kw);
  const int64_t up = before(d.kh), down = d.kh - 1 - up;
  const int64_t top = most(y0 - up, 0), end = least(y0 + rows + down, in.h);
  const Rows from = prepare_rows(in, plan, n, block, top, end, scratch);
  const TapLoop loop = tap_loop<CB>(d.kw, plan.pairs), narrow = tap_loop<CB / 2>(d.kw, plan.pairs);
  Taps taps;
  taps.step = from.step;
  taps.pitch = from.pitch;
  taps.kw = d.kw;
  taps.weight_row = d.kw + plan.pairs;
  const float* weight = (const float*)d.weight + block * d.kh * taps.weight_row * VL;
  const bool more = in.blocked && plan.float_vectors && (block + 1) * VL < in.c;  // the next block, on its way to L1
  taps.ahead = (const char*)(from.first + in.h * in.w * VL);
  taps.lines = more ? ceil_div((end - top) * in.w * VL * 4 / 64, rows * ceil_div(in.w, CB) * d.kh) : 0;
  const char* const ahead_end = taps.ahead + (end - top) * in.w * VL * 4;
  for (int64_t y = y0; y < y0 + rows; y++) {
    const int64_t t0 = most(up - y, 0), t1 = least(d.kh, in.h - y + up);
    taps.weight = weight + t0 * taps.weight_row * VL;
    taps.rows = t1 - t0;
    for (int64_t x = 0; x < in.w; x += CB) {
      const int64_t column = plan.pairs ? x / 2 * VL : x * from.step, count = least(CB, in.w - x);
      taps.in = from.first + (y - up + t0 - top) * from.pitch + column;
      taps.lo = -x;
      taps.hi = in.w - x;
      alignas(64) float acc[CB * VL];
      (count > CB / 2 ? loop : narrow)(taps, acc);
      if (taps.ahead < ahead_end) taps.ahead += taps.lines * taps.rows * 64;
      const float* residual = from.first + (y - top) * from.pitch + column;
      f(y, x, count, acc, d.residual ? residual : nullptr, from.step);
    }
  }
}

// act(...) * scale + shift (+ x) of one run of columns, out of the sums of a tap loop
template <class Out>
CMX_INLINE void depthwise_epilogue(const float* acc, int64_t count, const Depthwise& d, int64_t block, Act act,
                                   bool pairs, const float* residual, int64_t residual_step, Out* out, int64_t step) {
  const int64_t channel = block * VL;
  if (!residual) return epilogue<NoResidual>(acc, count, d.constants, channel, act, residual, 0, out, step);
  if (kBf16Products && pairs)
    return epilogue<PairResidual>(acc, count, d.constants, channel, act, residual, VL, out, step);
  epilogue<FloatResidual>(acc, count, d.constants, channel, act, residual, residual_step, out, step);
}

static int64_t packed_depthwise_bytes(Dtype dtype, int64_t c, int64_t kh, int64_t kw) {
  return round_up(c, VL) * kh * (kw + pairs_depthwise(dtype, kw)) * 4;
}

// weight [1, c, kh, kw] -> [block][kh][kw][VL], or in the layout of pair_taps
static void pack_depthwise(const View& weight, int64_t block, void* out) {
  const bool pairs = pairs_depthwise(weight.dtype, weight.w);
  const int64_t k = weight.w, row = (k + pairs) * VL;
  float* to = (float*)out + block * weight.h * row;
  for (int64_t y = 0; y < weight.h; y++, to += row) {
    float taps[kMaxKernel * VL];
    gather(weight, 0, block * VL, y, 0, k, taps, VL);
    if (!pairs) {
      memcpy(to, taps, k * VL * 4);
      continue;
    }
    for (int64_t t = 0; t + 1 < k; t++) ((vu*)to)[t] = pack_pair(load(taps + t * VL), load(taps + (t + 1) * VL));
    store(to + (k - 1) * VL, load(taps));
    store(to + k * VL, load(taps + (k - 1) * VL));
  }
}

}  // namespace cmx::CMX_ISA
