// Depthwise convolution of one block of VL channels: CB output columns in registers, one row of taps after the other.
//
// Taps that fall outside the image are skipped, not multiplied by zero. Every output sums its taps in the same order,
// whatever the tiling, so results do not depend on bands or threads.
#pragma once

#include "layout.h"
#include "tiles.h"

namespace cmx::CMX_ISA {

constexpr int CB = VL == 16 ? 16 : 8;

constexpr int64_t before(int64_t k) { return (k - 1) / 2; }  // zero "same" padding, the extra one of an even k behind

#define X(k) || kw == k
CMX_INLINE bool unrolled(int64_t kw) { return false CMX_FOR_EACH_KERNEL_WIDTH(X); }
#undef X
// Processors with tiles reach half of the FLOP/s of float32 with pairs (Emerald Rapids).
CMX_INLINE bool pairs_depthwise(Dtype d, int64_t kw) {
  return kBf16Products && !kTiles && d == Dtype::bfloat16 && unrolled(kw);
}

// Cache lines to be asked for, `apart` bytes from one to the next
struct Lines {
  const char* first;
  int64_t count, apart;
};

// What one call of a tap loop needs. `in` points at the first column of the block in the first row of taps.
struct Taps {
  const float* in;      // float32 [VL] a pixel, or bfloat16 pairs [VL][2]
  int64_t pitch;        // floats from row to row
  const float* weight;  // of the first row of taps
  int64_t weight_row;   // vectors
  int64_t rows, kw;
  int64_t lo, hi;  // columns lo <= i < hi around the block lie in the image
  Lines ahead;     // so many a row of taps
};

CMX_INLINE void prefetch(Lines& ahead) {
  for (int64_t i = 0; i < ahead.count; i++, ahead.first += ahead.apart) __builtin_prefetch(ahead.first, 0, 3);
}

template <int B>
CMX_INLINE void store_block(const vf (&acc)[B], float* out) {
#pragma GCC unroll 64
  for (int c = 0; c < B; c++) store(out + c * VL, acc[c]);
}

// acc[c] += sum of x[c + t] w[t], t < T, over those columns that x points at which are `inside` the image
template <int T, int B, class Inside>
CMX_INLINE void tap_row(vf (&acc)[B], const float* x, const float* w, Inside inside) {
  vf wv[T];
#pragma GCC unroll 32
  for (int t = 0; t < T; t++) wv[t] = load(w + t * VL);
#pragma GCC unroll 64
  for (int i = 0; i < B + T - 1; i++) {
    if (!inside(i)) continue;
    const vf v = load(x + i * VL);
#pragma GCC unroll 64
    for (int c = 0; c < B; c++)
      if (i - c >= 0 && i - c < T) acc[c] += v * wv[i - c];
  }
}

// acc[c] = sum of x[c + t - P] w[t], c < B
template <int K, int B>
static __attribute__((noinline)) void float_taps(const Taps& a, float* out) {
  constexpr int P = before(K);
  vf acc[B] = {};
  const float *row = a.in - P * VL, *w = a.weight;
  Lines ahead = a.ahead;
  const int lo = a.lo + P, hi = a.hi + P;
  // one comparison each: of two GCC makes flags in memory before the rows, which took as long as three rows (Zen 5)
  auto inside = [&](int i) { return i < P ? i >= lo : i < hi; };
  for (int64_t r = 0; r < a.rows; r++, row += a.pitch, w += a.weight_row * VL) {
    prefetch(ahead);
    tap_row<K>(acc, row, w, inside);
  }
  store_block(acc, out);
}

// Any width: a row of taps in groups; groups that see nothing but padding are skipped.
template <int B>
static __attribute__((noinline)) void general_taps(const Taps& a, float* out) {
  constexpr int T = 4;
  vf acc[B] = {};
  const int k = a.kw, p = before(k), lo = a.lo + p, hi = a.hi + p;
  const int t0 = most(0, lo - (B + T - 2)) / T * T, t1 = least(k, hi);
  const float *row = a.in - p * VL, *w = a.weight;
  for (int64_t r = 0; r < a.rows; r++, row += a.pitch, w += a.weight_row * VL)
    for (int t = t0; t < t1; t += T) {
      const float *x = row + t * VL, *wt = w + t * VL;
      auto inside = [&](int i) { return i >= lo - t && i < hi - t; };
      switch (least(T, k - t)) {
        case 1: tap_row<1>(acc, x, wt, inside); break;
        case 2: tap_row<2>(acc, x, wt, inside); break;
        case 3: tap_row<3>(acc, x, wt, inside); break;
        default: tap_row<T>(acc, x, wt, inside);
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
  Lines ahead = a.ahead;
  const int lo = a.lo, hi = a.hi;
  for (int64_t r = 0; r < a.rows; r++, row += a.pitch, w += a.weight_row * VL) {
    prefetch(ahead);
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
  const float* first;  // row `top`, column 0
  int64_t pitch;       // floats from row to row
  Lines next;          // the same rows of the next block, if it is known where they lie
};

struct RowPlan {
  bool pairs;
  bool in_place;           // blocks of float32, or of pairs, are read where they are
  int64_t width, at_once;  // of a converted row, in vectors; rows that are gathered before they become pairs
  RowPlan(const View& in, int64_t kw)
      : pairs(pairs_depthwise(in.dtype, kw)),
        in_place(in.blocked && (in.dtype == Dtype::float32 || in.paired)),
        width(pairs ? ceil_div(in.w, 2) : in.w),
        at_once(ceil_div(4 * VL, most(in.w, 1))) {}
  int64_t scratch_vectors(const View& in, int64_t rows, int64_t kh) const {
    return in_place ? 0 : least(in.h, rows + kh - 1) * width + (pairs ? at_once * in.w : 0);
  }
};

template <class T>
CMX_INLINE void convert_row(const T* from, int64_t w, float* to) {
  for (int64_t x = 0; x < w; x++) store(to + x * VL, load(from + x * VL));
}
// Pixels `step` apart
CMX_INLINE void pair_row(const float* from, int64_t step, int64_t w, vu* to) {
  for (int64_t x = 0; x + 1 < w; x += 2) to[x / 2] = pack_pair(load(from + x * step), load(from + (x + 1) * step));
  if (w % 2) to[w / 2] = pack_pair(load(from + (w - 1) * step), vf{});
}
// Neighbouring bfloat16 pixels need no arithmetic to become pairs.
CMX_INLINE void pair_row(const bfloat16* from, int64_t step, int64_t w, vu* to) {
  auto word = [&](int64_t x) { return __builtin_convertvector(*(const vh*)(from + x * step), vu); };
  for (int64_t x = 0; x + 1 < w; x += 2) to[x / 2] = word(x) | word(x + 1) << 16;
  if (w % 2) to[w / 2] = word(w - 1);
}

static Lines rows_of_next_block(const View& in, int64_t n, int64_t block, int64_t top, int64_t end) {
  const int64_t rows = end - top, size = size_of(in.dtype), lines = ceil_div(rows * in.w * VL * size, 64);
  if (++block * VL >= in.c) return {};
  if (in.blocked) {
    const int64_t row = (n * ceil_div(in.c, VL) + block) * in.h + top;
    return {(const char*)in.data + row * in.w * VL * size, lines, 64};
  }
  if (in.n * in.c * in.h * in.w * size < 4 << 20) return {};  // in a near cache: asking would cost small layers 5 %
  const char* const first = (const char*)in.data + (n * in.sn + block * VL * in.sc + top * in.sh) * size;
  if (in.sc == 1 && in.sh == in.w * in.sw) return {first, rows * in.w, in.sw * size};
  const bool planes = in.sw == 1 && in.sh == in.w && in.sc == in.h * in.w;
  return planes && rows == in.h ? Lines{first, lines, 64} : Lines{};
}

static Rows prepare_rows(const View& in, const RowPlan& plan, int64_t n, int64_t block, int64_t top, int64_t end,
                         float* scratch) {
  const Lines next = rows_of_next_block(in, n, block, top, end);
  const int64_t pitch = plan.width * VL, channel = block * VL;
  if (plan.in_place) {
    const int64_t row = (n * ceil_div(in.c, VL) + block) * in.h + top;
    return {(const float*)in.data + row * pitch, pitch, next};
  }
  auto gather_rows = [&](int64_t y, int64_t rows, float* to) {
    for_rows(in, y, rows, [&](int64_t at, int64_t x, int64_t count, int64_t before) {
      gather(in, n, channel, at, x, count, to + before * VL, VL);
    });
  };
  if (!plan.pairs) {
    if (in.blocked)
      with_dtype(in.dtype, [&](auto t) {
        convert_row(block_of<const decltype(t)>(in, n, block) + top * in.w * VL, (end - top) * in.w, scratch);
      });
    else
      gather_rows(top, end - top, scratch);
  } else if (in.blocked || (in.sc == 1 && channel + VL <= in.c)) {
    const auto* from = in.blocked ? block_of<const bfloat16>(in, n, block) + top * in.w * VL
                                  : address<const bfloat16>(in, n, channel, top, 0);
    const int64_t step = in.blocked ? VL : in.sw, row = in.blocked ? in.w * VL : in.sh;
    for (int64_t r = 0; r < end - top; r++) pair_row(from + r * row, step, in.w, (vu*)(scratch + r * pitch));
  } else {
    float* const some = scratch + (end - top) * pitch;
    for (int64_t y = top, rows; y < end; y += rows) {
      rows = least(plan.at_once, end - y);
      gather_rows(y, rows, some);
      for (int64_t r = 0; r < rows; r++)
        pair_row(some + r * in.w * VL, VL, in.w, (vu*)(scratch + (y - top + r) * pitch));
    }
  }
  return {scratch, pitch, next};
}

// Input rows that output rows [y0, y0 + rows) need
struct InputRows {
  int64_t top, end;
  InputRows(const View& in, int64_t kh, int64_t y0, int64_t rows)
      : top(most(y0 - before(kh), 0)), end(least(y0 + rows + kh - 1 - before(kh), in.h)) {}
};

// Output rows [y0, y0 + rows) of one block of channels, from the rows `from` of the input. f(y, x, count, acc, residual)
// gets CB columns of sums at a time, which announce(y, x, count) names before they are computed.
template <class A, class F>
CMX_INLINE void depthwise_rows(const View& in, const Depthwise& d, const RowPlan& plan, int64_t block, int64_t y0,
                               int64_t rows, const Rows& from, A announce, F f) {
  const int64_t up = before(d.kh);
  const auto [top, end] = InputRows(in, d.kh, y0, rows);
  const TapLoop loop = tap_loop<CB>(d.kw, plan.pairs), narrow = tap_loop<CB / 2>(d.kw, plan.pairs);
  Taps taps;
  taps.pitch = from.pitch;
  taps.kw = d.kw;
  taps.weight_row = d.kw + plan.pairs;
  const float* weight = (const float*)d.weight + block * d.kh * taps.weight_row * VL;
  taps.ahead = from.next;  // on its way to L1
  taps.ahead.count = ceil_div(from.next.count, rows * ceil_div(in.w, CB) * d.kh);
  const char* const ahead_end = from.next.first + from.next.count * from.next.apart;
  for (int64_t y = y0; y < y0 + rows; y++) {
    const int64_t t0 = most(up - y, 0), t1 = least(d.kh, in.h - y + up);
    taps.weight = weight + t0 * taps.weight_row * VL;
    taps.rows = t1 - t0;
    for (int64_t x = 0; x < in.w; x += CB) {
      const int64_t column = (plan.pairs ? x / 2 : x) * VL, count = least(CB, in.w - x);
      taps.in = from.first + (y - up + t0 - top) * from.pitch + column;
      taps.lo = -x;
      taps.hi = in.w - x;
      announce(y, x, count);
      alignas(64) float acc[CB * VL];
      (count > CB / 2 ? loop : narrow)(taps, acc);
      if (taps.ahead.first < ahead_end) taps.ahead.first += taps.ahead.count * taps.rows * taps.ahead.apart;
      const float* residual = from.first + (y - top) * from.pitch + column;
      f(y, x, count, acc, d.residual ? residual : nullptr);
    }
  }
}

// act(...) * scale + shift (+ x) of one run of columns, out of the sums of a tap loop
template <bool near = false, class Out>
CMX_INLINE void depthwise_epilogue(const float* acc, int64_t count, const Depthwise& d, int64_t block, Act act,
                                   bool pairs, const float* residual, Out* out, int64_t step) {
  const int64_t channel = block * VL;
  if (!residual) return epilogue<NoResidual, near>(acc, count, d.constants, channel, act, residual, out, step);
  if (kBf16Products && pairs)
    return epilogue<PairResidual, near>(acc, count, d.constants, channel, act, residual, out, step);
  epilogue<FloatResidual, near>(acc, count, d.constants, channel, act, residual, out, step);
}

static int64_t packed_depthwise_bytes(Dtype dtype, int64_t c, int64_t kh, int64_t kw) {
  return round_up(c, VL) * kh * (kw + pairs_depthwise(dtype, kw)) * 4;
}

// weight [1, c, kh, kw] -> [block][kh][kw][VL], or in the layout of pair_taps
static void pack_depthwise(const View& weight, int64_t block, void* out) {
  const int64_t h = weight.h, k = weight.w, channel = block * VL;
  if (!pairs_depthwise(weight.dtype, k))
    return gather(as_one_row(weight), 0, channel, 0, 0, h * k, (float*)out + block * h * k * VL, VL);
  float taps[kMaxKernel * kMaxKernel * VL];
  gather(as_one_row(weight), 0, channel, 0, 0, h * k, taps, VL);
  float* to = (float*)out + block * h * (k + 1) * VL;
  for (int64_t y = 0; y < h; y++, to += (k + 1) * VL) {
    const float* from = taps + y * k * VL;
    for (int64_t t = 0; t + 1 < k; t++) ((vu*)to)[t] = pack_pair(load(from + t * VL), load(from + (t + 1) * VL));
    store(to + (k - 1) * VL, load(from));
    store(to + k * VL, load(from + (k - 1) * VL));
  }
}

}  // namespace cmx::CMX_ISA
