// Training, the depthwise half: forward into pre-activations with moments, and all gradients of one plane in one pass.
//
// Rows are float32 and padded with zeros to both sides, so that every tap of every column reads something.
#pragma once

#include "depthwise.h"
#include "train_runs.h"

namespace cmx::CMX_ISA {

// Rows [top, end) of a plane, each [margin | w, rounded up to CB | rest], in vectors
struct PaddedRows {
  int64_t w, margin, pitch, top;  // pitch in floats
  float* first;                   // column 0 of row `top`

  PaddedRows(float* memory, int64_t w, int64_t kw, int64_t top)
      : w(w), margin(before(kw)), pitch(pitch_of(w, kw)), top(top), first(memory + margin * VL) {}
  static int64_t pitch_of(int64_t w, int64_t kw) { return (round_up(w, CB) + kw - 1) * VL; }
  float* row(int64_t y) const { return first + (y - top) * pitch; }

  template <class F>
  void fill(int64_t end, F f) const {  // f(y, column 0)
    for (int64_t y = top; y < end; y++) {
      clear(row(y) - margin * VL, margin);
      clear(row(y) + w * VL, pitch / VL - margin - w);
      f(y, row(y));
    }
  }
};

// f(y, x, count, sums) for the output rows [y0, y0 + rows): CB columns of sums of taps at a time
template <class F>
CMX_INLINE void convolve(const PaddedRows& in, int64_t h, const float* weight, int64_t kh, int64_t kw, int64_t y0,
                         int64_t rows, F f) {
  const int64_t up = before(kh);
  const TapLoop loop = tap_loop<CB>(kw, false), narrow = tap_loop<CB / 2>(kw, false);
  Taps taps{};
  taps.pitch = in.pitch;
  taps.kw = taps.weight_row = kw;
  for (int64_t y = y0; y < y0 + rows; y++) {
    const int64_t t0 = most(up - y, 0), t1 = least(kh, h - y + up);
    taps.weight = weight + t0 * kw * VL;
    taps.rows = t1 - t0;
    for (int64_t x = 0; x < in.w; x += CB) {
      const int64_t count = least(CB, in.w - x);
      taps.in = in.row(y - up + t0) + x * VL;
      taps.lo = -x;
      taps.hi = in.w - x;
      alignas(64) float acc[CB * VL];
      (count > CB / 2 ? loop : narrow)(taps, acc);
      f(y, x, count, acc);
    }
  }
}

static int64_t depthwise_train_scratch_bytes(const DepthwiseTrain& s) {
  return (least(s.a.h, s.rows + s.kh - 1) * PaddedRows::pitch_of(s.a.w, s.kw) + s.a.w * VL) * 4 + 64;
}

// Rows [y0, y0 + s.rows) of one block of channels
static void depthwise_train_band(const DepthwiseTrain& s, int64_t n, int64_t block, int64_t y0, char* scratch) {
  const int64_t h = s.a.h, w = s.a.w, rows = least(s.rows, h - y0), up = before(s.kh);
  const int64_t top = most(0, y0 - up), end = least(h, y0 + rows + s.kh - 1 - up);
  float* const run = (float*)scratch;
  const PaddedRows in(run + w * VL, w, s.kw, top);
  in.fill(end, [&](int64_t y, float* to) { value_run(s.in, s.act, {n, block, y, 0, w}, to); });
  const vf bias = load(s.bias + block * VL);
  const float* weight = (const float*)s.weight + block * s.kh * s.kw * VL;
  convolve(in, h, weight, s.kh, s.kw, y0, rows, [&](int64_t y, int64_t x, int64_t count, const float* acc) {
    for (int64_t i = 0; i < count; i++) store(run + (x + i) * VL, load(acc + i * VL) + bias);
    if (x + count < w) return;
    const Run r{n, block, y, 0, w};
    round_run(s.a.dtype, run, w);
    scatter_run(s.a, r, run);
    moments_run(run, w, s.act, s.moments + ((n * ceil_div(s.a.c, VL) + block) * h + y) * kMomentPieces * VL);
  });
}

// acc[t] += sum_c x[c + t] da[c], c < w; both rows padded with zeros
constexpr int64_t kTapsAtOnce = 9;
template <int T>
static __attribute__((noinline)) void tap_gradients(const float* x, const float* da, int64_t w, float* acc) {
  constexpr int B = CB / 2;
  vf sums[T] = {};
  for (int64_t c0 = 0; c0 < w; c0 += B, x += B * VL, da += B * VL) {
    vf d[B];
#pragma GCC unroll 32
    for (int c = 0; c < B; c++) d[c] = load(da + c * VL);
#pragma GCC unroll 32
    for (int i = 0; i < B + T - 1; i++) {
      const vf xv = load(x + i * VL);
#pragma GCC unroll 32
      for (int c = 0; c < B; c++)
        if (i - c >= 0 && i - c < T) sums[i - c] += xv * d[c];
    }
  }
#pragma GCC unroll 32
  for (int t = 0; t < T; t++) store(acc + t * VL, load(acc + t * VL) + sums[t]);
}

typedef void (*TapGradients)(const float*, const float*, int64_t, float*);
template <int... T>
CMX_INLINE TapGradients tap_gradients_of(int64_t taps, std::integer_sequence<int, T...>) {
  static constexpr TapGradients loops[] = {tap_gradients<T + 1>...};
  return loops[taps - 1];
}

static int64_t depthwise_backward_scratch_bytes(const DepthwiseBackward& s) {
  const int64_t w = s.dx.w, rows = least(s.dx.h, s.rows + s.kh);
  return (rows * (PaddedRows::pitch_of(w, s.kw | 1) + PaddedRows::pitch_of(w, s.kw)) + 2 * w * VL) * 4 + 64;
}

// One plane of VL channels
static void depthwise_backward_plane(const DepthwiseBackward& s, int64_t n, int64_t block, char* scratch) {
  const int64_t h = s.dx.h, w = s.dx.w, kh = s.kh | 1, kw = s.kw | 1;  // an even filter turned has one more, a zero
  const int64_t up = before(s.kh), index = n * ceil_div(s.dx.c, VL) + block;
  float *const run = (float*)scratch, *const other = run + w * VL;
  float *const sums = s.sums + index * kSumPieces * VL, *const dbias = s.dbias + index * VL;
  float* const dweight = s.need_weight ? s.dweight + index * s.kh * s.kw * VL : nullptr;
  clear(sums, kSumPieces);
  clear(dbias, 1);
  if (dweight) clear(dweight, s.kh * s.kw);
  for (int64_t y0 = 0; y0 < h; y0 += s.rows) {
    const int64_t rows = least(s.rows, h - y0);
    const int64_t halo = s.need_input ? kh / 2 : 0, end = least(h, y0 + rows + halo);
    const PaddedRows da(other + w * VL, w, kw, most(0, y0 - halo));
    da.fill(end, [&](int64_t y, float* to) {
      gradient_run(s.out, s.act, {n, block, y, 0, w}, to, run);
      if (y >= y0 && y < y0 + rows) add_sum(to, w, dbias);
    });
    if (s.need_weight) {
      const PaddedRows x(da.row(end) - da.margin * VL, w, s.kw, most(0, y0 - up));
      const int64_t x_end = least(h, y0 + rows + s.kh - 1 - up);
      x.fill(x_end, [&](int64_t y, float* to) { value_run(s.in, s.act, {n, block, y, 0, w}, to); });
      for (int64_t y = y0; y < y0 + rows; y++)
        for (int64_t t = most(0, up - y); t < least(s.kh, h - y + up); t++)
          for (int64_t u = 0; u < s.kw; u += kTapsAtOnce)
            tap_gradients_of(least(kTapsAtOnce, s.kw - u), std::make_integer_sequence<int, kTapsAtOnce>())(
                x.row(y + t - up) + (u - x.margin) * VL, da.row(y), w, dweight + (t * s.kw + u) * VL);
    }
    if (!s.need_input) continue;
    const float* weight = (const float*)s.flipped + block * kh * kw * VL;
    convolve(da, h, weight, kh, kw, y0, rows, [&](int64_t y, int64_t x, int64_t count, const float* acc) {
      memcpy(run + x * VL, acc, count * VL * sizeof(float));
      if (x + count < w) return;
      const Run r{n, block, y, 0, w};
      if (s.residual) {
        gather_run(s.out.grad, r, other);
        for (int64_t i = 0; i < w; i++) store(run + i * VL, load(run + i * VL) + load(other + i * VL));
      }
      round_run(s.dx.dtype, run, w);
      scatter_run(s.dx, r, run);
      if (s.in.rows) sums_run(run, s.in, s.act, r, other, sums);
    });
  }
}

}  // namespace cmx::CMX_ISA
