// The CPU kernels of one instruction set: bands of a stage, blocks of a depthwise layer, pool and head.
#include "../cpu_levels.h"
#include "activation.h"
#include "depthwise.h"
#include "layout.h"
#include "peak.h"
#include "planes.h"
#include "pool_head.h"
#include "product.h"
#include "strassen.h"
#include "timer.h"
#include "train_depthwise.h"
#include "train_product.h"

namespace cmx::CMX_ISA {

// One worker's scratch memory, handed out piece by piece
struct Scratch {
  char* next;
  template <class T>
  T* take(int64_t count) {
    T* p = (T*)next;
    next += round_up(count * sizeof(T), 64);
    return p;
  }
};

template <class P>
struct StagePlan {
  int64_t channels, pitch, rows_pixels, row_scratch, part, sums, out_scratch;
  explicit StagePlan(const Stage& s) {
    const bool patches = s.producer == Stage::Producer::patches;
    channels = panel_channels<P>(patches ? s.in.c * s.ph * s.pw : s.in.c);
    const bool strassen = s.pointwise.form == Form::strassen;
    pitch = width_of<P>(channels) * (1 + strassen) + 64 / (int64_t)sizeof(P);  // rows must not share their cache sets
    rows_pixels = round_up(s.rows * s.out.w, kTilePanel<P> ? kTile : 2);
    row_scratch = s.producer == Stage::Producer::depthwise
                      ? RowPlan(s.in, s.depthwise.kw).scratch_vectors(s.in, s.rows, s.depthwise.kh) * VL
                  : patches ? patch_scratch<P>(channels)
                            : kCopy * VL;
    part = strassen ? rows_pixels : least(s.part, rows_pixels);
    sums = strassen ? strassen_sums(part) : 0;
    out_scratch = s.out.blocked ? 0 : part * NR * VL * (1 + strassen);
  }
  static constexpr int64_t kCopy = 64;  // pixels converted at a time
  int64_t bytes() const {
    return round_up(rows_pixels * pitch * sizeof(P), 64) + round_up(row_scratch * 4, 64) + round_up(sums * 4, 64) +
           round_up(out_scratch * 4, 64) + 64;
  }
};

// panel[pixel][channel] = x, for the rows [y0, y0 + rows)
template <class P>
static void fill_copy(const Stage& s, const StagePlan<P>& plan, int64_t n, int64_t y0, int64_t rows, P* panel,
                      float* some) {
  for_rows(s.in, y0, rows, [&](int64_t y, int64_t, int64_t count, int64_t before) {
    for (int64_t x = 0; x < count; x += plan.kCopy)
      for (int64_t c = 0; c < plan.channels; c += VL) {
        const int64_t step = least(plan.kCopy, count - x);
        P* to = at(panel + (before + x) * plan.pitch, c);
        if (c < s.in.c)
          gather(s.in, n, c, y, x, step, some, VL);
        else
          memset(some, 0, step * VL * 4);
        for (int64_t i = 0; i < step; i++) store(to + i * plan.pitch, load(some + i * VL));
      }
  });
}

// panel[pixel][(cin, p, q)] = the patch of the image under the pixel
template <class P>
static void fill_patches(const Stage& s, const StagePlan<P>& plan, int64_t n, int64_t y0, int64_t rows, P* panel,
                         float* some) {
  with_dtype(s.in.dtype, [&](auto t) {
    for (int64_t r = 0; r < rows; r++)
      for (int64_t x = 0; x < s.out.w; x++)
        fill_patch<decltype(t)>(s.in, n, y0 + r, x, s.ph, s.pw, plan.channels, panel + (r * s.out.w + x) * plan.pitch,
                                some);
  });
}

template <class P>
static void fill_depthwise(const Stage& s, const StagePlan<P>& panel_plan, int64_t n, int64_t y0, int64_t rows,
                           P* panel, float* row_scratch) {
  const RowPlan plan(s.in, s.depthwise.kw);
  const InputRows span(s.in, s.depthwise.kh, y0, rows);
  const int64_t blocks = ceil_div(s.in.c, VL);
  for (int64_t c = blocks * VL; c < panel_plan.channels; c += VL)
    for (int64_t i = 0; i < rows * s.out.w; i++) store(at(panel + i * panel_plan.pitch, c), vf{});
  for (int64_t block = 0; block < blocks; block++)
    depthwise_rows(
        s.in, s.depthwise, plan, block, y0, rows, prepare_rows(s.in, plan, n, block, span.top, span.end, row_scratch),
        [](int64_t, int64_t, int64_t) {},
        [&](int64_t y, int64_t x, int64_t count, const float* acc, const float* residual) {
          P* to = at(panel + ((y - y0) * s.out.w + x) * panel_plan.pitch, block * VL);
          depthwise_epilogue<std::is_same_v<P, bfloat16>>(acc, count, s.depthwise, block, s.act, plan.pairs, residual,
                                                          to, panel_plan.pitch);
        });
}

template <class P, class T>
static void stage_band_as(const Stage& s, int64_t n, int64_t y0, char* memory) {
  const StagePlan<P> plan(s);
  const int64_t rows = least(s.rows, s.out.h - y0);
  Scratch scratch{memory};
  P* panel = scratch.take<P>(plan.rows_pixels * plan.pitch);
  float* row_scratch = scratch.take<float>(plan.row_scratch);
  float* sums = scratch.take<float>(plan.sums);
  float* lines = scratch.take<float>(plan.out_scratch);
  {
    const Timer timer(s.times ? &s.times->producer : nullptr);
    switch (s.producer) {
      case Stage::Producer::depthwise: fill_depthwise(s, plan, n, y0, rows, panel, row_scratch); break;
      case Stage::Producer::patches: fill_patches(s, plan, n, y0, rows, panel, row_scratch); break;
      case Stage::Producer::copy: fill_copy(s, plan, n, y0, rows, panel, row_scratch); break;
    }
  }
  const View& out = s.out;
  int64_t part_begin = 0;
  // results of a block before they are scattered; Strassen's come for two halves of the output channels in turns
  auto lines_of = [&](int64_t block) {
    const bool high = s.pointwise.form == Form::strassen && block >= out.c / 2 / VL;
    return lines + (block % NR + high * NR) * plan.part * VL;
  };
  const int64_t pixels = rows * out.w;
  // in equal pieces, a line for so many of the results
  constexpr int64_t kLine = 64;
  int64_t after_bytes = 0, due = 0;
  for (const Ahead& m : s.after) after_bytes += m.bytes;
  const int64_t results = pixels * ceil_div(out.c, VL);
  const Ahead *after = s.after, *const after_end = after + sizeof(s.after) / sizeof(Ahead);
  int64_t offset = 0;
  auto ask = [&] {
    for (; after < after_end && offset >= after->bytes; after++) offset = 0;
    if (after < after_end) __builtin_prefetch(after->data + offset);
    offset += kLine;
  };
  auto finish = [&](int64_t m, int64_t step, int64_t count, int64_t block, const float* acc) {
    for (due += ceil_div(after_bytes, kLine) * count; due > 0; due -= results) ask();
    const Constants& constants = s.pointwise.constants;
    if (out.blocked) {
      T* to = block_of<T>(out, n, block) + (y0 * out.w + m) * VL;
      if (out.paired)
        paired_epilogue(acc, count, constants, block * VL, s.act, (vu*)to);
      else
        epilogue<NoResidual, std::is_same_v<T, bfloat16>>(acc, count, constants, block * VL, s.act, nullptr, to,
                                                          step * VL);
      for (int64_t lane = out.c - block * VL; lane < VL; lane++)  // 0 * inf made NaN of what must stay zero
        for (int64_t i = 0; i < count; i++)
          to[out.paired ? (i / 2 * VL + lane) * 2 + i % 2 : i * step * VL + lane] = T{};
    } else {
      float* to = lines_of(block) + (m - part_begin) * VL;
      epilogue<NoResidual, false>(acc, count, constants, block * VL, s.act, nullptr, to, step * VL);
    }
  };
  auto done = [&](int64_t m0, int64_t m1, int64_t block, int64_t blocks) {
    if (out.blocked) return;
    const View flat = as_one_row(out);
    for (int64_t j = 0; j < blocks; j++)
      for (int64_t m = m0, count; m < m1; m += count) {
        const int64_t pixel = y0 * out.w + m;
        count = least(m1 - m, flat.w - pixel % flat.w);
        scatter(flat, n, (block + j) * VL, pixel / flat.w, pixel % flat.w, count, lines_of(block + j) + (m - m0) * VL,
                VL);
      }
    if (block + blocks == ceil_div(out.c, VL)) part_begin = m1;
  };
  const Timer timer(s.times ? &s.times->product : nullptr);
  if constexpr (sizeof(P) == sizeof(float))
    if (s.pointwise.form == Form::strassen)
      return strassen_product(panel, plan.pitch, pixels, plan.channels, out.c, s.pointwise, sums, finish, done);
  product(panel, plan.pitch, pixels, plan.channels, out.c, s.pointwise, plan.part, finish, done);
}

static void stage_band(const Stage& s, int64_t n, int64_t y0, char* scratch) {
  with_panel(s.in.dtype, [&](auto p) {
    typedef decltype(p) P;
    if constexpr (std::is_same_v<P, bfloat16>)
      stage_band_as<P, P>(s, n, y0, scratch);
    else
      with_dtype(s.out.dtype, [&](auto t) { stage_band_as<P, decltype(t)>(s, n, y0, scratch); });
  });
}

static int64_t stage_scratch_bytes(const Stage& s) {
  return with_panel(s.in.dtype, [&](auto p) { return StagePlan<decltype(p)>(s).bytes(); });
}

// The weight as the vectors read it, behind the bands of the tiles
static const void* vectors_of(const DepthwiseStage& s) {
  const Depthwise& d = s.depthwise;
  return (const char*)d.weight + (tiles_multiply(s.in.dtype) ? packed_bands_bytes(s.in.c, d.kh, d.kw) : 0);
}

// One block of channels of a depthwise layer by itself, rows [y0, y0 + rows)
static void depthwise_band(const DepthwiseStage& given, int64_t n, int64_t block, int64_t y0, char* memory) {
  if (tiles_pay(given.in, given.depthwise)) return tile_layer(given, n, block, y0, memory);
  DepthwiseStage s = given;
  s.depthwise.weight = vectors_of(given);
  const View &in = s.in, &out = s.out;
  const int64_t rows = least(s.rows, out.h - y0), w = out.w;
  const RowPlan plan(in, s.depthwise.kw);
  const InputRows span(in, s.depthwise.kh, y0, rows);
  Scratch scratch{memory};
  float* row_scratch = scratch.take<float>(plan.scratch_vectors(in, s.rows, s.depthwise.kh) * VL);
  float* sums = scratch.take<float>(s.rows * w * VL);
  const Rows from = prepare_rows(in, plan, n, block, span.top, span.end, row_scratch);
  if (out.sc == 1 && (block + 1) * VL <= out.c) {  // whole vectors of channels: no detour over scratch
    with_dtype(out.dtype, [&](auto t) {
      typedef decltype(t) T;
      depthwise_rows(
          in, s.depthwise, plan, block, y0, rows, from,
          [&](int64_t y, int64_t x, int64_t count) {  // stores to lines far apart would wait for one after the other
            const T* to = address<T>(out, n, block * VL, y, x);
            for (int64_t i = 0; i < count; i++) __builtin_prefetch(to + i * out.sw, 1);
          },
          [&](int64_t y, int64_t x, int64_t count, const float* acc, const float* residual) {
            T* to = address<T>(out, n, block * VL, y, x);
            depthwise_epilogue(acc, count, s.depthwise, block, s.act, plan.pairs, residual, to, out.sw);
          });
    });
    return;
  }
  depthwise_rows(
      in, s.depthwise, plan, block, y0, rows, from, [](int64_t, int64_t, int64_t) {},
      [&](int64_t y, int64_t x, int64_t count, const float* acc, const float* residual) {
        float* to = sums + ((y - y0) * w + x) * VL;
        depthwise_epilogue(acc, count, s.depthwise, block, s.act, plan.pairs, residual, to, VL);
      });
  for_rows(out, y0, rows, [&](int64_t y, int64_t x, int64_t count, int64_t before) {
    scatter(out, n, block * VL, y, x, count, sums + before * VL, VL);
  });
}

static int64_t depthwise_scratch_bytes(const DepthwiseStage& s) {
  if (tiles_pay(s.in, s.depthwise)) return tile_layer_bytes(s);
  const RowPlan plan(s.in, s.depthwise.kw);
  return round_up(plan.scratch_vectors(s.in, s.rows, s.depthwise.kh) * VL * 4, 64) + s.rows * s.out.w * VL * 4 + 64;
}

static int64_t depthwise_weight_bytes(Dtype dtype, int64_t c, int64_t kh, int64_t kw) {
  return (tiles_multiply(dtype) ? packed_bands_bytes(c, kh, kw) : 0) + packed_depthwise_bytes(dtype, c, kh, kw);
}
static void pack_depthwise_weight(const View& weight, int64_t block, void* out) {
  const bool bands = tiles_multiply(weight.dtype);
  if (bands) pack_bands(weight, block, out);
  pack_depthwise(weight, block, (char*)out + (bands ? packed_bands_bytes(weight.c, weight.h, weight.w) : 0));
}

// How a stack multiplies, and its weights
static Form stack_form(Dtype dtype, int64_t c_out, int64_t c_in, bool strassen) {
  if (tiles_multiply(dtype)) return Form::planes;
  return strassen && uses_strassen(dtype, c_out, c_in) ? Form::strassen : Form::plain;
}
static int64_t packed_stack_bytes(Form form, Dtype dtype, int64_t c_out, int64_t c_in) {
  switch (form) {
    case Form::planes: return packed_planes_bytes(c_out, c_in);
    case Form::strassen: return packed_strassen_bytes(c_out, c_in);
    default: return packed_pointwise_bytes(dtype, c_out, c_in);
  }
}
static int64_t stack_tasks(Form form, int64_t c_out) {
  switch (form) {
    case Form::planes: return ceil_div(c_out, kBlock);
    case Form::strassen: return kProducts * c_out / 2 / (NR * VL);
    default: return ceil_div(c_out, NR * VL);
  }
}
static void pack_stack(Form form, const View& weight, int64_t task, void* out) {
  switch (form) {
    case Form::planes: return pack_planes(weight, task, out);
    case Form::strassen: return pack_strassen(weight, task, out);
    default: return pack_pointwise(weight, task, out);
  }
}

#define CMX_STRING(x) #x
#define CMX_NAME(x) CMX_STRING(x)

const CpuKernels& kernels() {
  static constexpr CpuKernels table = {
      CMX_NAME(CMX_ISA),
      VL,
      NR * VL,
      kTiles,
      kBf16Products,
      [](Dtype d) { return with_panel(d, [](auto p) { return width_of<decltype(p)>(1) * (int64_t)sizeof(p); }); },
      [](Dtype d, int64_t kw) { return pairs_depthwise(d, kw); },
      [](Dtype d) { return tiles_multiply(d) ? kCellRows : 1; },
      depthwise_weight_bytes,
      packed_pointwise_bytes,
      pack_depthwise_weight,
      pack_pointwise,
      stack_form,
      packed_stack_bytes,
      stack_tasks,
      pack_stack,
      stage_scratch_bytes,
      stage_band,
      planes_shape,
      planes_fill,
      planes_product,
      depthwise_scratch_bytes,
      depthwise_band,
      kPoolBlocks,
      pool_blocks,
      classify,
      depthwise_train_scratch_bytes,
      depthwise_train_band,
      depthwise_backward_scratch_bytes,
      depthwise_backward_plane,
      chunk_step,
      product_scratch_bytes,
      product_train_chunk,
      product_backward_chunk,
      weight_gradient,
      group_da_bytes,
      group_input_bytes,
      peak_flop,
  };
  return table;
}

}  // namespace cmx::CMX_ISA
