// Between a strided View and vectors of channels: gather [pixel][lane] float32 from it, scatter them back.
#pragma once

#include "vec.h"

namespace cmx::CMX_ISA {

// A View whose rows follow one another without a gap is one long row.
CMX_INLINE View as_one_row(View v) {
  if (!v.blocked && v.sh == v.w * v.sw) v.w *= v.h, v.h = 1;
  return v;
}

template <class T>
CMX_INLINE T* address(const View& v, int64_t n, int64_t c, int64_t y, int64_t x) {
  return (T*)v.data + n * v.sn + c * v.sc + y * v.sh + x * v.sw;
}

constexpr int64_t kAhead = 16;  // pixels

template <class T>
static __attribute__((noinline)) void gather_as(const View& v, int64_t n, int64_t c, int64_t y, int64_t x,
                                                int64_t count, float* out, int64_t step, int64_t ahead) {
  const int64_t lanes = least(VL, v.c - c);
  const T* p = address<const T>(v, n, c, y, x);
  if (v.sc == 1 || v.c == 1) {
    for (int64_t i = 0; i < count; i++) {
      // pixels lie pages apart: no hardware follows. Far ahead into L2: a few sets of L1 would have to hold them all.
      if (ahead > kAhead)
        __builtin_prefetch(p + (i + ahead) * v.sw, 0, 2);
      else
        __builtin_prefetch(p + (i + ahead) * v.sw);
      store(out + i * step, lanes == VL ? load(p + i * v.sw) : load_some(p + i * v.sw, 1, lanes));
    }
    return;
  }
  if (v.sw == 1 && count >= VL) {
    for (int64_t i = 0; i < count; i += VL) {
      const int64_t at = least(i, count - VL);  // the last VL pixels overlap those before
      vf rows[VL] = {};
      for (int64_t l = 0; l < lanes; l++) rows[l] = load(p + l * v.sc + at);
      transpose(rows);
      for (int64_t k = 0; k < VL; k++) store(out + (at + k) * step, rows[k]);
    }
    return;
  }
  for (int64_t i = 0; i < count; i++) store(out + i * step, load_some(p + i * v.sw, v.sc, lanes));
}

// Pixels x .. x + count of row y, channels c .. c + VL, as float32; channels beyond v.c are zero.
CMX_INLINE void gather(const View& v, int64_t n, int64_t c, int64_t y, int64_t x, int64_t count, float* out,
                       int64_t step, int64_t ahead = kAhead) {
  with_dtype(v.dtype, [&](auto t) { gather_as<decltype(t)>(v, n, c, y, x, count, out, step, ahead); });
}

template <class T>
static __attribute__((noinline)) void scatter_as(const View& v, int64_t n, int64_t c, int64_t y, int64_t x,
                                                 int64_t count, const float* in, int64_t step) {
  const int64_t lanes = least(VL, v.c - c);
  T* p = address<T>(v, n, c, y, x);
  if (v.sc == 1 || v.c == 1) {
    for (int64_t i = 0; i < count; i++) {
      __builtin_prefetch(p + (i + kAhead) * v.sw, 1);
      if (lanes == VL)
        store(p + i * v.sw, load(in + i * step));
      else
        store_some(p + i * v.sw, 1, lanes, load(in + i * step));
    }
    return;
  }
  if (v.sw == 1 && count >= VL) {
    for (int64_t i = 0; i < count; i += VL) {
      const int64_t at = least(i, count - VL);
      vf columns[VL];
      for (int64_t k = 0; k < VL; k++) columns[k] = load(in + (at + k) * step);
      transpose(columns);
      for (int64_t l = 0; l < lanes; l++) store(p + l * v.sc + at, columns[l]);
    }
    return;
  }
  for (int64_t i = 0; i < count; i++) store_some(p + i * v.sw, v.sc, lanes, load(in + i * step));
}

CMX_INLINE void scatter(const View& v, int64_t n, int64_t c, int64_t y, int64_t x, int64_t count, const float* in,
                        int64_t step) {
  with_dtype(v.dtype, [&](auto t) { scatter_as<decltype(t)>(v, n, c, y, x, count, in, step); });
}

// The patch of an image under pixel (y, x) of a grid: [cin][p][q]. Returns its length; up to VL numbers behind it are written.
template <class T, class P>
CMX_INLINE int64_t copy_patch(const View& in, int64_t n, int64_t y, int64_t x, int64_t ph, int64_t pw, P* out) {
  P* to = out;  // whole vectors: what a row leaves of its last is overwritten by the next
  for (int64_t c = 0; c < in.c; c++)
    for (int64_t p = 0; p < ph; p++) {
      const T* from = address<const T>(in, n, c, y * ph + p, x * pw);
      for (int64_t q = 0, count; q < pw; q += VL, to += count) {
        count = least(VL, pw - q);
        store(to, load_some(from + q * in.sw, in.sw, count));
      }
    }
  return to - out;
}

// Rows y .. y + rows of a View, all in one span where they follow one another
template <class F>
CMX_INLINE void for_rows(const View& v, int64_t y, int64_t rows, F f) {  // f(y, x, count, pixels before)
  if (v.sh == v.w * v.sw) return f(y, 0, rows * v.w, 0);
  for (int64_t r = 0; r < rows; r++) f(y + r, 0, v.w, r * v.w);
}

// Start of a block of VL channels of a blocked View
template <class T>
CMX_INLINE T* block_of(const View& v, int64_t n, int64_t block) {
  return (T*)v.data + (n * ceil_div(v.c, VL) + block) * v.h * v.w * VL;
}

}  // namespace cmx::CMX_ISA
