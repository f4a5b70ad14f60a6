// Training, pixel runs of one block of VL channels: activations out of pre-activations, their gradients, sums over both.
//
// A run is [count][VL] float32. Lanes beyond the last channel hold zeros, as gather() and the padded rows make them.
#pragma once

#include "activation.h"
#include "layout.h"

namespace cmx::CMX_ISA {

constexpr int64_t kFarAhead = 64;  // pixels: the next rows, while this one is summed

struct Run {
  int64_t n, block, y, x, count;
};

CMX_INLINE void gather_run(const View& v, const Run& r, float* out) {
  gather(v, r.n, r.block * VL, r.y, r.x, r.count, out, VL, kFarAhead);
}
CMX_INLINE void scatter_run(const View& v, const Run& r, const float* in) {
  scatter(v, r.n, r.block * VL, r.y, r.x, r.count, in, VL);
}

// Row `i` of a table of vectors of c channels
CMX_INLINE vf table_row(const float* rows, int64_t c, int64_t i, int64_t block) {
  return load(rows + i * round_up(c, VL) + block * VL);
}

// out = X
static void value_run(const Activation& in, Act act, const Run& r, float* out) {
  gather_run(in.x, r, out);
  if (!in.rows) return;
  const vf mean = table_row(in.rows, in.x.c, 0, r.block), scale = table_row(in.rows, in.x.c, 1, r.block),
           shift = table_row(in.rows, in.x.c, 2, r.block);
  with_activation(act, [&](auto a) {
    for (int64_t i = 0; i < r.count; i++)
      store(out + i * VL, (activate<decltype(a)::value>(load(out + i * VL)) - mean) * scale + shift);
  });
}

// out = da; `other` is scratch memory of the same size
static void gradient_run(const PreActivation& p, Act act, const Run& r, float* out, float* other) {
  gather_run(p.a, r, out);
  gather_run(p.grad, r, other);
  const vf scale = table_row(p.rows, p.a.c, 0, r.block), q = table_row(p.rows, p.a.c, 1, r.block),
           rest = table_row(p.rows, p.a.c, 2, r.block), mean = table_row(p.rows, p.a.c, 3, r.block);
  with_activation(act, [&](auto a) {
    for (int64_t i = 0; i < r.count; i++) {
      vf slope;
      const vf g = activate_with_slope<decltype(a)::value>(load(out + i * VL), slope);
      store(out + i * VL, (scale * load(other + i * VL) + q * (g - mean) + rest) * slope);
    }
  });
}

// A run as it will be read again after it was stored
CMX_INLINE void round_run(Dtype dtype, float* run, int64_t count) {
  if (dtype == Dtype::float32) return;
  with_dtype(dtype, [&](auto t) {
    for (int64_t i = 0; i < count; i++) {
      decltype(t) stored[VL];
      store(stored, load(run + i * VL));
      store(run + i * VL, load(stored));
    }
  });
}

// Mean and squared deviations of act(a), from differences to the mean of its first values: right for any mean. A single
// value may be an outlier, against whose square the deviations lose their digits. Short sums first: fewer roundings.
static void moments_run(const float* a, int64_t length, Act act, float* piece) {
  constexpr int64_t kFew = 4, kShort = 32;
  with_activation(act, [&](auto f) {
    auto value = [&](int64_t i) { return activate<decltype(f)::value>(load(a + i * VL)); };
    const int64_t few = least(kFew, length);
    vf origin = {};
    for (int64_t i = 0; i < few; i++) origin += value(i);
    origin = origin / all((float)few);
    vf sum = {}, squares = {};
    for (int64_t i0 = 0; i0 < length; i0 += kShort) {
      vf some = {}, some_squares = {};
      for (int64_t i = i0; i < least(i0 + kShort, length); i++) {
        const vf d = value(i) - origin;
        some += d;
        some_squares += d * d;
      }
      sum += some;
      squares += some_squares;
    }
    const vf count = all((float)length);
    store(piece + kOrigin * VL, origin);
    store(piece + kOffset * VL, sum / count);
    store(piece + kSquares * VL, squares - sum * sum / count);
  });
}

// piece += sum(dx), sum(dx * (act(x) - mean)), x of the run r
static void sums_run(const float* dx, const Activation& in, Act act, const Run& r, float* scratch, float* piece) {
  gather_run(in.x, r, scratch);
  const vf mean = table_row(in.rows, in.x.c, 0, r.block);
  with_activation(act, [&](auto a) {
    vf sum = {}, centred = {};
    for (int64_t i = 0; i < r.count; i++) {
      const vf d = load(dx + i * VL);
      sum += d;
      centred += d * (activate<decltype(a)::value>(load(scratch + i * VL)) - mean);
    }
    store(piece + kSum * VL, load(piece + kSum * VL) + sum);
    store(piece + kCentred * VL, load(piece + kCentred * VL) + centred);
  });
}

CMX_INLINE void add_sum(const float* run, int64_t count, float* to) {
  vf sum = {};
  for (int64_t i = 0; i < count; i++) sum += load(run + i * VL);
  store(to, load(to) + sum);
}

CMX_INLINE void clear(float* to, int64_t vectors) { memset(to, 0, vectors * VL * sizeof(float)); }

}  // namespace cmx::CMX_ISA
