// Training, the pointwise half and the stem: products over chunks of pixels of one image.
//
// forward    panel [pixel][channel] = input          x weight             -> a, moments
// backward   panel [pixel][c_out]   = da             x weight transposed  -> dx, sums
//            rows  [c_out][pixel]   = da transposed  x input              -> dweight, over a group of chunks
#pragma once

#include "product.h"
#include "train_runs.h"

namespace cmx::CMX_ISA {

constexpr int64_t kRunPixels = 16, kSlot = 16;  // pixels at a time; a chunk of a group is a multiple of kSlot

template <class P>
constexpr int64_t kPanelGap = 64 / sizeof(P);  // rows of a panel must not share their cache sets

// f(block, first pixel, count, run): fills `run`, which goes to panel[pixel][channel]
template <class P, class F>
CMX_INLINE void fill_panel(int64_t c, int64_t pixels, P* panel, int64_t pitch, float* run, F f) {
  for (int64_t x = 0; x < pixels; x += kRunPixels)
    for (int64_t block = 0; block < panel_channels<P>(c) / VL; block++) {
      const int64_t count = least(kRunPixels, pixels - x);
      if (block * VL < c)
        f(block, x, count, run);
      else
        clear(run, count);
      for (int64_t i = 0; i < count; i++) store(at(panel + (x + i) * pitch, block * VL), load(run + i * VL));
    }
}

template <class P>
static void fill_input(const ProductInput& in, Act act, int64_t n, int64_t m0, int64_t pixels, P* panel, int64_t pitch,
                       float* run, float* other) {
  const int64_t channels = panel_channels<P>(in.channels);
  if (!in.image.data) {
    fill_panel(in.channels, pixels, panel, pitch, run, [&](int64_t block, int64_t x, int64_t count, float* to) {
      const Run r{n, block, 0, m0 + x, count};
      value_run(in.in, act, r, to);
      if (!in.skip.x.data) return;
      value_run(in.skip, act, r, other);
      for (int64_t i = 0; i < count; i++) store(to + i * VL, load(to + i * VL) + load(other + i * VL));
    });
    return;
  }
  with_dtype(in.image.dtype, [&](auto t) {
    for (int64_t i = 0; i < pixels; i++)
      fill_patch<decltype(t)>(in.image, n, (m0 + i) / in.columns, (m0 + i) % in.columns, in.ph, in.pw, channels,
                              panel + i * pitch, run);
  });
}

template <class P>
struct ProductPlan {
  int64_t channels, pitch;  // of the wider panel
  ProductPlan(int64_t chunk, int64_t c_in, int64_t c_out)
      : channels(panel_channels<P>(most(c_in, c_out))), pitch(width_of<P>(channels) + kPanelGap<P>), chunk(chunk) {}
  int64_t panel_bytes() const { return round_up(chunk * pitch * sizeof(P), 64); }
  int64_t bytes() const {
    const int64_t runs = most(2 * most(chunk, kRunPixels) * VL, patch_scratch<P>(channels));
    return panel_bytes() + (NR * chunk * VL + runs) * 4 + 64;
  }

 private:
  int64_t chunk;
};

// panel x packed weight (+ bias) -> out, pixels m0 .. m0 + pixels of image n. f(run, values) gets what was stored.
template <class P, class F>
CMX_INLINE void product_into(const View& out, const P* panel, int64_t pitch, int64_t c_in, const void* weight,
                             const float* bias, int64_t n, int64_t m0, int64_t pixels, float* sums, F f) {
  Pointwise p{};
  p.weight = weight;
  product(
      panel, pitch, pixels, panel_channels<P>(c_in), out.c, p, pixels,
      [&](int64_t m, int64_t, int64_t count, int64_t block, const float* acc) {
        const vf b = bias ? load(bias + block * VL) : vf{};
        float* to = sums + ((block % NR) * pixels + m) * VL;
        for (int64_t i = 0; i < count; i++) store(to + i * VL, load(acc + i * VL) + b);
      },
      [&](int64_t, int64_t, int64_t block, int64_t blocks) {
        for (int64_t j = 0; j < blocks; j++) {
          const Run r{n, block + j, 0, m0, pixels};
          float* const values = sums + ((block + j) % NR) * pixels * VL;
          round_run(out.dtype, values, pixels);
          scatter_run(out, r, values);
          f(r, values);
        }
      });
}

template <class P>
static void product_train_as(const ProductTrain& s, int64_t n, int64_t m0, char* scratch) {
  const ProductPlan<P> plan(s.chunk, s.in.channels, s.a.c);
  P* const panel = (P*)scratch;
  float *const sums = (float*)(scratch + plan.panel_bytes()), *const run = sums + NR * s.chunk * VL;
  const int64_t pixels = least(s.chunk, s.a.w - m0), blocks = ceil_div(s.a.c, VL);
  fill_input(s.in, s.act, n, m0, pixels, panel, plan.pitch, run, run + kRunPixels * VL);
  float* const moments = s.moments + (n * ceil_div(s.a.w, s.chunk) + m0 / s.chunk) * blocks * kMomentPieces * VL;
  product_into(
      s.a, panel, plan.pitch, s.in.channels, s.weight, s.bias, n, m0, pixels, sums,
      [&](const Run& r, const float* a) { moments_run(a, pixels, s.act, moments + r.block * kMomentPieces * VL); });
}

// da transposed: [channel][pixel] from pixel `first` on, VL pixels of a run at a time
template <class P>
CMX_INLINE void put_columns(const float* run, int64_t count, P* rows, int64_t first, int64_t pitch) {
  for (int64_t i = 0; i < count; i += VL) {
    vf v[VL];
    for (int64_t k = 0; k < VL; k++) v[k] = load(run + (i + k) * VL);
    transpose(v);
    for (int64_t l = 0; l < VL; l++) store(at(rows + l * pitch, first + i), v[l]);
  }
}

// The panel of a chunk as rows slot .. slot + chunk of a product's packed weight, zeros behind its pixels
template <class P>
static void pack_input(const P* panel, int64_t pitch, int64_t pixels, int64_t channels, int64_t chunk, void* packed,
                       int64_t rows, int64_t slot) {
  constexpr int64_t S = kChannelsAtOnce<P>;
  for (int64_t first = 0; first < channels; first += kWide<P> * VL) {
    const int64_t width = least(kWide<P> * VL, channels - first);
    float* const to = (float*)packed + first * width_of<P>(rows) / S;
    for (int64_t i = 0; i < chunk; i += S)
      for (int64_t j = 0; j < width; j += VL) {
        auto pixel = [&](int64_t x) { return x < pixels ? load(at(panel + x * pitch, first + j)) : vf{}; };
        pack_channels<P>(pixel(i), pixel(i + S - 1), to + j, slot + i, width);
      }
  }
}

// The chunk at pixel m0 of image n, which has its place in the group at pixel `slot`
template <class P>
static void product_backward_as(const ProductBackward& s, int64_t n, int64_t m0, int64_t slot, char* scratch) {
  const int64_t c_out = s.out.a.c, blocks = ceil_div(s.in.channels, VL), pixels = least(s.chunk, s.out.a.w - m0);
  const ProductPlan<P> plan(s.chunk, s.in.channels, c_out);
  P* const panel = (P*)scratch;
  float *const sums = (float*)(scratch + plan.panel_bytes()), *const run = sums + NR * s.chunk * VL;
  float* const other = run + most(s.chunk, kRunPixels) * VL;
  const int64_t da_pitch = width_of<P>(s.pixels) + kPanelGap<P>;
  clear(s.dbias, ceil_div(c_out, VL));
  fill_panel(c_out, pixels, panel, plan.pitch, run, [&](int64_t block, int64_t x, int64_t count, float* to) {
    gradient_run(s.out, s.act, {n, block, 0, m0 + x, count}, to, other);
    add_sum(to, count, s.dbias + block * VL);
    if (!s.need_weight) return;
    const int64_t whole = round_up(count, kSlot);
    clear(to + count * VL, whole - count);
    put_columns(to, whole, (P*)s.da + block * VL * da_pitch, slot + x, da_pitch);
  });
  const int64_t whole = round_up(pixels, kSlot);
  for (int64_t c = 0; s.need_weight && whole < s.chunk && c < round_up(c_out, VL); c++)
    for (int64_t i = whole; i < s.chunk; i += VL) store(at((P*)s.da + c * da_pitch, slot + i), vf{});
  if (s.need_input) {
    clear(s.sums, blocks * kSumPieces);
    product_into(s.dx, panel, plan.pitch, c_out, s.transposed, nullptr, n, m0, pixels, sums,
                 [&](const Run& r, const float* dx) {
                   if (s.in.in.rows) sums_run(dx, s.in.in, s.act, r, run, s.sums + r.block * kSumPieces * VL);
                 });
  }
  if (s.need_weight) {
    fill_input(s.in, s.act, n, m0, pixels, panel, plan.pitch, run, other);
    pack_input(panel, plan.pitch, pixels, round_up(s.in.channels, VL), s.chunk, s.panel, s.pixels, slot);
  }
}

// dweight += da x input of a group, output channels [first, first + count)
template <class P>
static void weight_gradient_as(const ProductBackward& s, int64_t first, int64_t count) {
  const int64_t pitch = width_of<P>(s.pixels) + kPanelGap<P>, columns = round_up(s.in.channels, VL);
  Pointwise p{};
  p.weight = s.panel;
  product((const P*)s.da + first * pitch, pitch, count, s.pixels, s.in.channels, p, count,
          [&](int64_t m, int64_t, int64_t rows, int64_t block, const float* acc) {
            for (int64_t i = 0; i < rows; i++) {
              float* to = s.dweight + (first + m + i) * columns + block * VL;
              store(to, load(to) + load(acc + i * VL));
            }
          },
          [](int64_t, int64_t, int64_t, int64_t) {});
}

static int64_t product_scratch_bytes(Dtype d, int64_t chunk, int64_t c_in, int64_t c_out) {
  return with_panel(d, [&](auto p) { return ProductPlan<decltype(p)>(chunk, c_in, c_out).bytes(); });
}
static void product_train_chunk(const ProductTrain& s, int64_t n, int64_t m0, char* scratch) {
  with_panel(s.a.dtype, [&](auto p) { product_train_as<decltype(p)>(s, n, m0, scratch); });
}
static void product_backward_chunk(const ProductBackward& s, int64_t n, int64_t m0, int64_t slot, char* scratch) {
  with_panel(s.out.a.dtype, [&](auto p) { product_backward_as<decltype(p)>(s, n, m0, slot, scratch); });
}
static void weight_gradient(const ProductBackward& s, int64_t first, int64_t count) {
  with_panel(s.out.a.dtype, [&](auto p) { weight_gradient_as<decltype(p)>(s, first, count); });
}
// Pixels that a chunk is a multiple of
static int64_t chunk_step(Dtype d) {
  return with_panel(d, [&](auto p) { return most(kSlot, kDepth<decltype(p)>); });
}
// Sizes of the memory of a group: da, input
static int64_t group_da_bytes(Dtype d, int64_t pixels, int64_t c_out) {
  return with_panel(d, [&](auto p) {
    typedef decltype(p) P;
    return round_up(c_out, VL) * (width_of<P>(pixels) + kPanelGap<P>)*(int64_t)sizeof(P);
  });
}
static int64_t group_input_bytes(Dtype d, int64_t pixels, int64_t channels) {
  return with_panel(d, [&](auto p) {
    typedef decltype(p) P;
    return round_up(channels, VL) * width_of<P>(pixels) * (int64_t)sizeof(P);
  });
}

}  // namespace cmx::CMX_ISA
