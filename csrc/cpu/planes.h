// Stages of a stack in bfloat16 where there are tiles: activations are planes, which both halves multiply as they lie.
//
//     out[channel][pixel] = weight[channel][.] x panel[.][pixel]
//
// The depthwise half leaves its cells in the panel, [two cells][channel / 32][cell % 2][channel / 2][pixel][channel % 2], in
// which a tile is 1 KB without a gap.
#pragma once

#include "tile_depthwise.h"
#include "timer.h"

namespace cmx::CMX_ISA {

constexpr int64_t kBlock = 2 * kTile;  // pixels of two cells; output channels of a panel of weights

CMX_INLINE int64_t tile_depth(int64_t c) { return round_up(c, kTileDepth); }

// weight [1, c_out, 1, c_in] -> [block of kBlock channels][c_in / 32][kBlock][32], zeros behind either
static int64_t packed_planes_bytes(int64_t c_out, int64_t c_in) {
  return round_up(c_out, kBlock) * tile_depth(c_in) * 2;
}
static void pack_planes(const View& weight, int64_t block, void* out) {
  const int64_t c = weight.w, depth = tile_depth(c), first = block * kBlock;
  bfloat16* const to = (bfloat16*)out + first * depth;
  for (int64_t i = 0; i < kBlock; i++)
    for (int64_t k = 0; k < depth; k += VL) {
      const int64_t count = first + i < weight.c ? most(0, least(VL, c - k)) : 0;
      const vf v = count ? load_some(address<const bfloat16>(weight, 0, first + i, 0, k), weight.sw, count) : vf{};
      store(to + (k / kTileDepth * kBlock + i) * kTileDepth + k % kTileDepth, v);
    }
}

#if defined(CMX_TILES)
// Pairs of channels of cells
struct Panel {
  vu* data;
  uint64_t steps;  // of kTileDepth channels
  vu& at(uint64_t pair, uint64_t cell) const {
    return data[((cell / 2 * steps + pair / kTile) * 2 + cell % 2) * kTile + pair % kTile];
  }
};

struct PlanesPlan {
  int64_t rows;
  Cells cells;
  int64_t depth, channel_pairs, cell_pairs;  // of an image
  PlanesPlan(const Stage& s, int64_t y0)
      : rows(least(s.rows, s.out.h - y0)), cells(rows, s.out.w), cell_pairs(ceil_div(cells.count(), 2)) {
    depth = tile_depth(s.producer == Stage::Producer::patches ? s.in.c * s.ph * s.pw : s.in.c);
    channel_pairs = depth / 2;
  }
  int64_t pair_bytes() const { return depth * kBlock * 2; }  // of cells
  Panel panel(const Stage& s, int64_t n) const {
    return {(vu*)(s.panel + n * cell_pairs * pair_bytes()), (uint64_t)depth / kTileDepth};
  }
  static constexpr int64_t kSums = kBlock * kBlock;
};

// Finishes a block of sums [channel][two cells], a row at a time, while the next block is multiplied
template <Act act, bool near>
class Finisher {
 public:
  Finisher(const Stage& s, const Cells& cells, int64_t y0, float* lines)
      : constants_(s.pointwise.constants),
        scale_(constants_.scale - constants_.bias),
        shift_(constants_.shift - constants_.bias),
        out_(s.out),
        cells_(cells),
        direct_(s.out.sw == 1),
        whole_(direct_ && s.out.w % (2 * kCellColumns) == 0),
        y0_(y0),
        y1_(least(y0 + s.rows, s.out.h)),
        lines_(lines) {}

  // What is left of a block. Plain, so that it may live in registers.
  struct Rows {
    const float* from = nullptr;
    bfloat16* to = nullptr;
    const float* constants = nullptr;
    int64_t below = 0, left = 0, channel = 0, rows = 0, n = 0, cell = 0;
  };

  // `rows` channels from `channel` on, of the cells `cell` and `cell` + 1 of image n
  Rows begin(const float* sums, int64_t channel, int64_t rows, int64_t n, int64_t cell) const {
    const int64_t y = y0_ + cell / cells_.columns * kCellRows, x = cell % cells_.columns * kCellColumns;
    Rows r{sums,
           direct_ ? address<bfloat16>(out_, n, channel, y, x) : nullptr,
           constants_.bias + channel,
           out_.sh,
           rows,
           channel,
           rows,
           n,
           cell};
    if (y + 1 == y1_) r.below = 0;  // the last row of an odd number: written first, and then by what belongs there
    return r;
  }
  CMX_ALWAYS_INLINE void row(Rows& r) const {
    const vf bias = broadcast(r.constants), scale = broadcast(r.constants + scale_),
             shift = broadcast(r.constants + shift_);
    const vf first = activate<act, near>(load(r.from) + bias) * scale + shift;
    const vf second = activate<act, near>(load(r.from + VL) + bias) * scale + shift;
    if (whole_) {  // the cells lie side by side: first halves are the upper row
      const __m512i both = (__m512i)_mm512_cvtne2ps_pbh((__m512)second, (__m512)first);
      const __m512i rows = _mm512_shuffle_i64x2(both, both, _MM_SHUFFLE(3, 1, 2, 0));
      _mm256_storeu_si256((__m256i_u*)(r.to + r.below), _mm512_extracti64x4_epi64(rows, 1));
      _mm256_storeu_si256((__m256i_u*)r.to, _mm512_castsi512_si256(rows));
      r.to += out_.sc;
    } else if (direct_) {
      store_cell(r, r.cell, first);
      store_cell(r, r.cell + 1, second);
    } else {
      float* const to = lines_ + (r.rows - r.left) * kBlock;
      store(to, first);
      store(to + VL, second);
    }
    r.from += kBlock;
    r.constants++;
    r.left--;
  }
  CMX_ALWAYS_INLINE void end(Rows& r) const {
    while (r.left) row(r);
    if (!direct_ && r.rows) scatter_block(r.channel, r.rows, r.n, r.cell);
  }

 private:
  // f(y, x, count, row of the cell) for the rows of a cell that lie in the image
  template <class F>
  CMX_ALWAYS_INLINE void for_rows_of(int64_t cell, F f) const {
    if (cell >= cells_.count()) return;
    const int64_t y = y0_ + cell / cells_.columns * kCellRows, x = cell % cells_.columns * kCellColumns;
    for (int64_t i = 0; i < kCellRows && y + i < y1_; i++) f(y + i, x, least(kCellColumns, out_.w - x), i);
  }
  __attribute__((noinline)) void store_cell(const Rows& r, int64_t cell, vf v) const {
    alignas(32) bfloat16 some[VL];
    store(some, v);
    for_rows_of(cell, [&](int64_t y, int64_t x, int64_t count, int64_t i) {
      memcpy(address<bfloat16>(out_, r.n, r.channel + r.rows - r.left, y, x), some + i * kCellColumns, count * 2);
    });
  }
  __attribute__((noinline)) void scatter_block(int64_t channel, int64_t rows, int64_t n, int64_t cell) const {
    for (int64_t c = 0; c < rows; c += VL)
      for (int64_t k = 0; k < 2; k++) {
        vf v[VL];
        alignas(64) float pixels[VL * VL];
        for (int64_t i = 0; i < VL; i++) v[i] = load(lines_ + (c + i) * kBlock + k * VL);
        transpose(v);
        for (int64_t i = 0; i < VL; i++) store(pixels + i * VL, v[i]);
        for_rows_of(cell + k, [&](int64_t y, int64_t x, int64_t count, int64_t i) {
          scatter(out_, n, channel + c, y, x, count, pixels + i * kCellColumns * VL, VL);
        });
      }
  }

  const Constants constants_;
  const int64_t scale_, shift_;
  const View out_;
  const Cells cells_;
  const bool direct_, whole_;
  const int64_t y0_, y1_;
  float* const lines_;  // [kBlock][kBlock], unless rows are stored where they belong
};

template <Act act, bool near>
static void product_of(const Stage& s, const PlanesProduct& task, float* sums) {
  constexpr int64_t kStep = kBlock * kTileDepth * 2;  // bytes of either operand
  const PlanesPlan plan(s, task.y0);
  const int64_t steps = plan.depth / kTileDepth, slab = steps * kStep, rows_a_step = ceil_div(kBlock, steps);
  const int64_t pairs = task.pair_end - task.pair;
  const int64_t lines_a_step = ceil_div(slab / 64, steps * most(1, pairs));  // of the next weights, asked for meanwhile
  const Finisher<act, near> finisher(s, plan.cells, task.y0, sums + 2 * plan.kSums);
  typename Finisher<act, near>::Rows rest;
  const char* const after = (const char*)(task.last_round ? s.pointwise.next : s.pointwise.weight);
  for (int64_t block = task.block, turn = 0; block < task.block_end; block++) {
    const char* const weight = (const char*)s.pointwise.weight + block * slab;
    const char* ahead = block + 1 < task.share_end ? weight + slab : after + task.share * slab;
    const Operand a{weight, kTileDepth * 2, kTile * kTileDepth * 2, kStep};
    int64_t n = task.pair / plan.cell_pairs, cell = task.pair % plan.cell_pairs * 2;
    for (int64_t pair = task.pair; pair < task.pair_end; pair++, turn ^= 1) {
      const Operand b{s.panel + pair * slab, kTile * 4, kTile * kTile * 4, kStep};
      float* const to = sums + turn * plan.kSums;
      auto work = [&](bool) __attribute__((always_inline)) {
        for (int64_t i = 0; i < lines_a_step; i++, ahead += 64) __builtin_prefetch(ahead, 0, 2);
        for (int64_t i = 0; i < rows_a_step && rest.left; i++) finisher.row(rest);
      };
      if (cell + 1 < plan.cells.count())
        tile_block<2, 2>(a, b, steps, to, kBlock * 4, kTile * 4, work);
      else
        tile_block<2, 1>(a, b, steps, to, kBlock * 4, kTile * 4, work);
      finisher.end(rest);
      rest = finisher.begin(to, block * kBlock, least(kBlock, s.out.c - block * kBlock), n, cell);
      cell += 2;
      if (cell >= plan.cells.count()) cell = 0, n++;
    }
  }
  finisher.end(rest);
}

static void planes_product(const Stage& s, const PlanesProduct& task, char* scratch) {
  const Timer timer(s.times ? &s.times->product : nullptr);
  const Tiles tiles;
  with_activation(s.act, [&](auto a) {
    constexpr Act act = decltype(a)::value;
    (s.between ? product_of<act, true> : product_of<act, false>)(s, task, (float*)scratch);
  });
}

// The patches of image n, a cell at a time: rows of pairs, transposed
static void fill_patches_panel(const Stage& s, int64_t n, const PlanesFill& task, const PlanesPlan& plan,
                               bfloat16* some) {
  const Panel panel = plan.panel(s, n);
  for (int64_t cell = task.cell_row * plan.cells.columns; cell < task.cell_row_end * plan.cells.columns; cell++) {
    for (int64_t i = 0; i < VL; i++) {
      const int64_t y = cell / plan.cells.columns * kCellRows + i / kCellColumns,
                    x = cell % plan.cells.columns * kCellColumns + i % kCellColumns;
      bfloat16* const to = some + i * plan.depth;
      const bool there = y < plan.rows && x < s.out.w;
      const int64_t filled = there ? copy_patch<bfloat16>(s.in, n, task.y0 + y, x, s.ph, s.pw, to) : 0;
      memset(to + filled, 0, (plan.depth - filled) * 2);
    }
    for (int64_t pair = 0; pair < plan.channel_pairs; pair += VL) {
      vf v[VL];
      for (int64_t i = 0; i < VL; i++) v[i] = load((const float*)(some + i * plan.depth) + pair);
      transpose(v);
      for (int64_t l = 0; l < VL; l++) panel.at(pair + l, cell) = bits(v[l]);
    }
  }
}

// Blocks [unit, unit_end) of VL channels
static void fill_depthwise_panel(const Stage& s, const PlanesFill& task, const PlanesPlan& plan, char* scratch) {
  const int64_t y = task.cell_row * kCellRows, first_cell = task.cell_row * plan.cells.columns;
  const TileDepthwise depthwise(s.in, s.depthwise, task.y0 + y, least(task.cell_row_end * kCellRows, plan.rows) - y);
  const Tiles tiles(depthwise.tile_rows);
  const Constants& k = s.depthwise.constants;
  const int64_t c = s.in.c, c0 = task.unit * VL, c1 = least(task.unit_end * VL, c);
  with_activation(s.act, [&](auto a) {
    depthwise.run(task.image, task.image_end, c0, c1, scratch,
                  [&](int64_t n, int64_t c) __attribute__((always_inline)) {
                    const bool two = c + 1 < s.in.c;
                    const ChannelConstants even(k, c), odd(k, two ? c + 1 : c);
                    const uint32_t there = two ? ~0u : 0xffff;
                    const Panel panel = plan.panel(s, n);
                    vu* const to = &panel.at(c / 2, 0);
                    const int64_t block = panel.steps * kBlock;  // vectors
                    return [=](int64_t i, int64_t, int64_t, vf e, vf o, vf even_skip, vf odd_skip)
                               __attribute__((always_inline)) {
                                 const vf first = even.template finished<decltype(a)::value, true>(e) + even_skip,
                                          second = odd.template finished<decltype(a)::value, true>(o) + odd_skip;
                                 const int64_t cell = first_cell + i;
                                 to[cell / 2 * block + cell % 2 * kTile] = pack_pair(first, second) & there;
                               };
                  });
  });
  if (c1 < c) return;
  for (int64_t n = task.image; n < task.image_end; n++)
    for (int64_t pair = ceil_div(c, 2); pair < plan.channel_pairs; pair++)
      for (int64_t cell = first_cell; cell < task.cell_row_end * plan.cells.columns; cell++)
        plan.panel(s, n).at(pair, cell) = vu{};
}

static void planes_fill(const Stage& s, const PlanesFill& task, char* scratch) {
  const Timer timer(s.times ? &s.times->producer : nullptr);
  const PlanesPlan plan(s, task.y0);
  if (s.producer != Stage::Producer::patches) return fill_depthwise_panel(s, task, plan, scratch);
  for (int64_t n = task.image; n < task.image_end; n++) fill_patches_panel(s, n, task, plan, (bfloat16*)scratch);
}

// Of the band that begins with row y0
static PlanesShape planes_shape(const Stage& s, int64_t y0) {
  const PlanesPlan plan(s, y0);
  const bool patches = s.producer == Stage::Producer::patches;
  PlanesShape shape{};
  shape.units = patches ? 1 : ceil_div(s.in.c, VL);
  shape.cell_rows = plan.cells.rows;
  shape.pairs = s.out.n * plan.cell_pairs;
  shape.blocks = ceil_div(s.out.c, kBlock);
  shape.pair_bytes = plan.pair_bytes();
  shape.panel_bytes = shape.pairs * shape.pair_bytes;
  shape.block_bytes = kBlock * plan.depth * 2;
  shape.fill_scratch =
      patches ? VL * (plan.depth + VL) * 2 : TileDepthwise(s.in, s.depthwise, y0, plan.rows).most_bytes();
  shape.product_scratch = 3 * plan.kSums * 4;
  return shape;
}

#else
static PlanesShape planes_shape(const Stage&, int64_t) { return {}; }
static void planes_fill(const Stage&, const PlanesFill&, char*) {}
static void planes_product(const Stage&, const PlanesProduct&, char*) {}
#endif

}  // namespace cmx::CMX_ISA
