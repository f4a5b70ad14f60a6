// Stages of a stack in bfloat16 where there are tiles: activations are planes, whose rows both halves multiply as they lie.
//
//     depthwise   sums[row][column] += window[row + t][.] x band[t]       window: input columns around 16 output columns
//                                                                         band: Toeplitz matrix of the filter's row t
//     product     out[channel][pixel] = weight[channel][.] x panel[.][pixel]
//
// Between them lies the panel, [kBlock pixels][channel / 2][pixel][2].
#pragma once

#include <vector>

#include "depthwise.h"
#include "product.h"
#include "timer.h"

namespace cmx::CMX_ISA {

constexpr int64_t kBlock = 2 * kTile;  // pixels of a block of the panel; output channels of a panel of weights

// ---- depthwise

// A filter's row is packed as the pairs (w[j], w[j + 1]), j from kw - 1 down to -1, and zeros: [channel][kh][words].
// Row p of its band, lane n, is the pair at j = 2 p - n - margin + before(kw).
struct Bands {
  int64_t words;  // of a packed row
  int64_t steps;  // tiles beside one another
  int64_t margin;  // columns of a window before its first output
  explicit Bands(int64_t kw) : words(kw < VL - 1 ? VL : 2 * VL), steps(kw <= 17 ? 1 : 2), margin(steps == 1 ? 8 : 24) {}
  int64_t window() const { return steps * kTileDepth; }  // columns
  int64_t band() const { return steps * kTile * kTile; }  // pairs
};

CMX_INLINE bool tiles_multiply(Dtype d) { return kTiles && d == Dtype::bfloat16; }

static int64_t packed_bands_bytes(int64_t c, int64_t kh, int64_t kw) { return c * kh * Bands(kw).words * 4; }

// weight [1, c, kh, kw], VL channels of it
static void pack_bands(const View& weight, int64_t block, void* out) {
  const int64_t kw = weight.w, words = Bands(kw).words;
  for (int64_t c = block * VL; c < least(weight.c, (block + 1) * VL); c++)
    for (int64_t t = 0; t < weight.h; t++) {
      uint16_t* to = (uint16_t*)out + (c * weight.h + t) * words * 2;
      auto tap = [&](int64_t j) { return j >= 0 && j < kw ? address<const bfloat16>(weight, 0, c, t, j)->bits : 0; };
      for (int64_t i = 0; i < words; i++, to += 2) to[0] = tap(kw - 1 - i), to[1] = tap(kw - i);
    }
}

CMX_INLINE int64_t tile_depth(int64_t c) { return round_up(c, kTileDepth); }

// weight [1, c_out, 1, c_in] -> [block of kBlock channels][c_in / 32][kBlock][32], zeros behind either
static int64_t packed_planes_bytes(int64_t c_out, int64_t c_in) { return round_up(c_out, kBlock) * tile_depth(c_in) * 2; }
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

#if defined(__AMX_BF16__)
// Makes bands of packed rows
struct BandMaker {
  explicit BandMaker(int64_t kw) : bands(kw) {
    const int64_t shift = kw - 1 + bands.margin - before(kw);
    for (int64_t p = 0; p < bands.steps * kTile; p++) {
      mask_[p] = 0;
      for (int64_t n = 0; n < kTile; n++) {
        const int64_t i = shift - 2 * p + n;
        const bool there = i >= 0 && i <= kw;
        mask_[p] |= there << n;
        index_[p][n] = there ? i : bands.words - 1;
      }
    }
  }
  void make(const vu* packed, vu* to) const {
    const __m512i low = (__m512i)packed[0];
    if (bands.words == VL) {  // the last word of a narrow row is zero
#pragma GCC unroll 16
      for (int64_t p = 0; p < kTile; p++) to[p] = (vu)_mm512_permutexvar_epi32((__m512i)index_[p], low);
      return;
    }
    const __m512i high = (__m512i)packed[1];
    for (int64_t p = 0; p < bands.steps * kTile; p++)
      to[p] = (vu)_mm512_maskz_permutex2var_epi32(mask_[p], low, (__m512i)index_[p], high);
  }
  const Bands bands;

 private:
  alignas(64) vu index_[2 * kTile];
  __mmask16 mask_[2 * kTile];
};

// Rows of planes in bfloat16 whose pixels follow one another
struct PlaneRows {
  const bfloat16* first;
  int64_t plane, row;  // elements
};

// Columns [x0, x0 + 16 steps) of the rows [y0, y0 + rows) of a plane, zeros outside of it
CMX_INLINE void fill_window(const View& in, const bfloat16* plane, int64_t row, int64_t first_row, int64_t x0,
                            int64_t y0, int64_t rows, int64_t steps, bfloat16* to) {
  for (int64_t s = 0; s < steps; s++) {
    const int64_t x = x0 + s * kTileDepth, lo = most(0, -x), hi = least(kTileDepth, in.w - x);
    const __mmask32 mask = hi <= lo ? 0 : (uint32_t)(((uint64_t)1 << hi) - ((uint64_t)1 << lo));
    bfloat16* at = to + s * kTileDepth;
    for (int64_t r = 0; r < rows; r++, at += steps * kTileDepth) {
      const int64_t y = y0 + r;
      const __m512i v = y >= 0 && y < in.h
                            ? _mm512_maskz_loadu_epi16(mask, plane + (y - first_row) * row + x)
                            : _mm512_setzero_si512();
      _mm512_store_si512(at, v);
    }
  }
}

// Sums of four tiles at once, whose chains of dependent products hide one another. shared: two and two have one band.
template <int J, bool shared>
static __attribute__((noinline)) void band_sums(const bfloat16* const (&windows)[4], const vu* const (&bands)[4],
                                                int64_t kh, int64_t steps, float* const (&out)[4]) {
  const int64_t row = steps * kTileDepth * 2;
  const char *a[4], *b[4];
  for (int j = 0; j < 4; j++) a[j] = (const char*)windows[j], b[j] = (const char*)bands[j];
  tile_zero<0>(), tile_zero<1>(), tile_zero<2>(), tile_zero<3>();
  for (int64_t i = 0; i < kh * steps; i++) {
    // a row further down, or half a row further on
    const int64_t at = i * kTileDepth * 2, band = i * kTile * kTile * 4;
    tile_load<6>(b[0] + band, 64);
    tile_load<4>(a[0] + at, row);
    tile_dot<0, 4, 6>();
    tile_load<5>(a[1] + at, row);
    if (shared) {
      tile_dot<1, 5, 6>();
    } else {
      tile_load<7>(b[1] + band, 64);
      tile_dot<1, 5, 7>();
    }
    if (J > 2) {
      constexpr int second = shared ? 7 : 6;
      tile_load<second>(b[2] + band, 64);
      tile_load<4>(a[2] + at, row);
      tile_dot<2, 4, second>();
      tile_load<5>(a[3] + at, row);
      if (!shared) tile_load<7>(b[3] + band, 64);
      tile_dot<3, 5, 7>();
    }
  }
  tile_store<0>(out[0], 64);
  tile_store<1>(out[1], 64);
  if (J > 2) tile_store<2>(out[2], 64);
  if (J > 2) tile_store<3>(out[3], 64);
}

// Sums of a few channels at a time over the rows [y0, y0 + rows) of one image, and what they need
struct TileDepthwise {
  const View in;
  const Depthwise& d;
  const int64_t y0, rows, in_rows, up;
  const int64_t tile_rows, row_tiles, tiles, group;  // channels of a group
  const BandMaker maker;

  TileDepthwise(const View& in, const Depthwise& d, int64_t y0, int64_t rows)
      : in(in),
        d(d),
        y0(y0),
        rows(rows),
        in_rows(rows + d.kh - 1),
        up(before(d.kh)),
        tile_rows(least(rows, kTile)),
        row_tiles(ceil_div(rows, kTile)),
        tiles(row_tiles * ceil_div(in.w, kTile)),
        group(tiles == 1 ? 4 : 2),
        maker(d.kw) {}

  bool in_place() const { return in.sw == 1 && !in.blocked; }
  int64_t window_elements() const { return in_rows * maker.bands.window(); }  // of 16 columns
  int64_t bytes() const {
    const int64_t planes = in_place() ? 0 : VL * in_rows * in.w * 2 + most(in.w, VL) * VL * 4 + 128;
    const int64_t windows = group * tiles / row_tiles * window_elements() * 2, bands = group * d.kh * maker.bands.band() * 4;
    return windows + bands + group * tiles * kTile * kTile * 4 + planes + 64;
  }

  // f(c, y, x, count, even, odd): sums of channels c and c + 1 in up to VL columns, and residual(0 or 1) of either
  template <class F>
  void run(int64_t n, int64_t c_begin, int64_t c_end, char* memory, F f) const {
    Pieces m(*this, memory);
    for (int64_t c0 = c_begin; c0 < c_end; c0 += group) {
      if (!in_place() && (c0 - c_begin) % VL == 0) gather_planes(n, c0, m);
      for (int64_t g = 0; g < group; g++) prepare(n, least(c0 + g, c_end - 1), c0 - (c0 - c_begin) % VL, g, m);
      multiply(m);
      for (int64_t g = 0; g < group && c0 + g < c_end; g += 2)
        if (!finish(c0 + g, g, m, f)) {
          separate(least(c0 + g, c_end - 1), g, m);
          separate(least(c0 + g + 1, c_end - 1), g + 1, m);
          finish(c0 + g, g, m, f);
        }
    }
  }

 private:
  struct Pieces {
    bfloat16* windows;  // [channel][column of tiles][row][window]
    vu* bands;          // [channel][row of the filter][band]
    float* sums;        // [channel][tile][kTile][kTile]
    bfloat16* planes;   // [VL][in_rows][w]
    float* some;
    Pieces(const TileDepthwise& t, char* memory) {
      windows = (bfloat16*)memory;
      bands = (vu*)(windows + t.group * t.tiles / t.row_tiles * t.window_elements());
      sums = (float*)bands + t.group * t.d.kh * t.maker.bands.band();
      some = sums + t.group * t.tiles * kTile * kTile;
      planes = (bfloat16*)(some + (t.in_place() ? 0 : most(t.in.w, VL) * VL));
    }
  };
  bfloat16* window(const Pieces& m, int64_t g, int64_t column) const {
    return m.windows + (g * tiles / row_tiles + column) * window_elements();
  }
  int64_t row_of(int64_t row_tile) const { return least(row_tile * kTile, rows - tile_rows); }

  // Planes of VL channels out of anything
  void gather_planes(int64_t n, int64_t c0, const Pieces& m) const {
    for (int64_t r = 0; r < in_rows; r++) {
      const int64_t y = y0 - up + r;
      if (y < 0 || y >= in.h) continue;
      gather(in, n, c0, y, 0, in.w, m.some, VL);
      for (int64_t x = 0; x < in.w; x += VL) {
        vf v[VL];
        for (int64_t i = 0; i < VL; i++) v[i] = load(m.some + least(x + i, in.w - 1) * VL);
        transpose(v);
        const __mmask16 mask = (1u << least(VL, in.w - x)) - 1;
        for (int64_t l = 0; l < VL; l++)
          _mm256_mask_storeu_epi16(m.planes + (l * in_rows + r) * in.w + x, mask, (__m256i)narrow_bf16(v[l]));
      }
    }
  }

  void prepare(int64_t n, int64_t c, int64_t gathered, int64_t g, const Pieces& m) const {
    const bool direct = in_place();
    const bfloat16* plane = direct ? address<const bfloat16>(in, n, c, 0, 0) : m.planes + (c - gathered) * in_rows * in.w;
    for (int64_t j = 0; j < tiles / row_tiles; j++)
      fill_window(in, plane, direct ? in.sh : in.w, direct ? 0 : y0 - up, j * kTile - maker.bands.margin, y0 - up, in_rows,
                  maker.bands.steps, window(m, g, j));
    const vu* packed = (const vu*)d.weight + c * d.kh * (maker.bands.words / VL);
    for (int64_t t = 0; t < d.kh; t++)
      maker.make(packed + t * (maker.bands.words / VL), m.bands + (g * d.kh + t) * maker.bands.band() / VL);
  }

  void multiply(const Pieces& m) const {
    const bfloat16* a[4];
    const vu* b[4];
    float* to[4];
    auto job = [&](int j, int64_t g, int64_t tile) {
      a[j] = window(m, g, tile / row_tiles) + row_of(tile % row_tiles) * maker.bands.window();
      b[j] = m.bands + g * d.kh * maker.bands.band() / VL;
      to[j] = m.sums + (g * tiles + tile) * kTile * kTile;
    };
    if (group == 4) {
      for (int j = 0; j < 4; j++) job(j, j, 0);
      return band_sums<4, false>(a, b, d.kh, maker.bands.steps, to);
    }
    int64_t tile = 0;
    for (; tile + 1 < tiles; tile += 2) {
      for (int j = 0; j < 4; j++) job(j, j / 2, tile + j % 2);
      band_sums<4, true>(a, b, d.kh, maker.bands.steps, to);
    }
    if (tile == tiles) return;
    for (int j = 0; j < 2; j++) job(j, j, tile);
    a[2] = a[3] = a[0], b[2] = b[3] = b[0], to[2] = to[3] = to[0];
    band_sums<2, false>(a, b, d.kh, maker.bands.steps, to);
  }

  // Whether all sums of channels g and g + 1 are finite
  template <class F>
  bool finish(int64_t c, int64_t g, const Pieces& m, F f) const {
    vf zero{};
    for (int64_t tile = 0; tile < tiles; tile++) {
      const int64_t column = tile / row_tiles, row = row_of(tile % row_tiles), x = column * kTile;
      const float* even = m.sums + (g * tiles + tile) * kTile * kTile;
      const float* odd = even + tiles * kTile * kTile;
      const bfloat16* skip = window(m, g, column) + (row + up) * maker.bands.window() + maker.bands.margin;
      const int64_t odd_skip = tiles / row_tiles * window_elements(), count = least(kTile, in.w - x);
      for (int64_t r = 0; r < tile_rows; r++) {
        const vf e = load(even + r * kTile), o = load(odd + r * kTile);
        zero += vf{} * e;
        zero += vf{} * o;
        const bfloat16* at = skip + r * maker.bands.window();
        f(c, y0 + row + r, x, count, e, o, d.residual ? load(at) : vf{}, d.residual ? load(at + odd_skip) : vf{});
      }
    }
    return _mm512_cmp_ps_mask((__m512)zero, _mm512_setzero_ps(), _CMP_NEQ_UQ) == 0;
  }

  // Sums again without what is not finite, which a band's zeros spread along the row; then its products with the taps.
  __attribute__((noinline)) void separate(int64_t c, int64_t g, const Pieces& m) const {
    struct Spot {
      bfloat16* at;
      bfloat16 value;
      int64_t column, row, q;
    };
    const int64_t columns = tiles / row_tiles, width = maker.bands.window();
    std::vector<Spot> spots;
    for (int64_t j = 0; j < columns; j++)
      for (int64_t i = 0; i < window_elements(); i++) {
        bfloat16& v = window(m, g, j)[i];
        if ((v.bits & 0x7f80) != 0x7f80) continue;
        spots.push_back({&v, v, j, i / width, i % width});
        v.bits = 0;
      }
    if (spots.empty()) return;
    for (int64_t tile = 0; tile < tiles; tile++) {
      const bfloat16* at = window(m, g, tile / row_tiles) + row_of(tile % row_tiles) * width;
      const vu* band = m.bands + g * d.kh * maker.bands.band() / VL;
      float* const to = m.sums + (g * tiles + tile) * kTile * kTile;
      float unused[kTile * kTile];
      const bfloat16* const a[4] = {at, at, at, at};
      const vu* const b[4] = {band, band, band, band};
      float* const out[4] = {to, unused, unused, unused};
      band_sums<2, false>(a, b, d.kh, maker.bands.steps, out);
    }
    const uint16_t* packed = (const uint16_t*)d.weight + c * d.kh * maker.bands.words * 2;
    for (const Spot& s : spots) {
      const float value = load(&s.value)[0];
      for (int64_t i = 0; i < row_tiles; i++) {
        float* to = m.sums + (g * tiles + s.column * row_tiles + i) * kTile * kTile;
        for (int64_t r = 0; r < tile_rows; r++)
          for (int64_t n = 0; n < kTile; n++) {
            const int64_t t = s.row - (row_of(i) + r), u = s.q - maker.bands.margin - n + before(d.kw);
            if (t < 0 || t >= d.kh || u < 0 || u >= d.kw) continue;
            const uint32_t w = (uint32_t)packed[(t * maker.bands.words + d.kw - 1 - u) * 2] << 16;
            float weight;
            memcpy(&weight, &w, 4);
            to[r * kTile + n] += value * weight;
          }
      }
    }
    for (const Spot& s : spots) *s.at = s.value;
  }
};

// ---- product

// Words of a panel: pairs of channels of `count` pixels from px on
CMX_INLINE void put_words(vu* panel, int64_t pairs, int64_t pair, int64_t px, int64_t count, vu words) {
  uint32_t* const to = (uint32_t*)panel + (px / kBlock * pairs + pair) * kBlock + px % kBlock;
  const int64_t room = kBlock - px % kBlock;
  if (count == VL && room >= VL) {
    *(vu*)to = words;
    return;
  }
  const uint32_t mask = (1u << count) - 1, here = room >= VL ? mask : mask & ((1u << room) - 1);
  _mm512_mask_storeu_epi32(to, here, (__m512i)words);
  if (mask != here)  // the rest begins the same pair's row of the next block
    _mm512_mask_storeu_epi32((uint32_t*)panel + ((px / kBlock + 1) * pairs + pair) * kBlock - room, mask & ~here,
                             (__m512i)words);
}

struct PlanesPlan {
  int64_t depth, pairs, blocks;  // of the panel
  int64_t scratch;
  PlanesPlan(const Stage& s, int64_t rows) {
    const bool patches = s.producer == Stage::Producer::patches;
    depth = tile_depth(patches ? s.in.c * s.ph * s.pw : s.in.c);
    pairs = depth / 2;
    blocks = ceil_div(rows * s.out.w, kBlock);
    scratch = patches ? VL * (depth + VL) * 2 : TileDepthwise(s.in, s.depthwise, 0, rows).bytes();
  }
  int64_t panel_words() const { return blocks * pairs * kBlock; }
  static constexpr int64_t kSums = kBlock * kBlock;
  int64_t bytes() const { return round_up(panel_words() * 4, 64) + round_up(scratch, 64) + 4 * kSums * 4 + 256; }
};

// One block of sums [channel][pixel], to be finished a row at a time while the next is multiplied
struct Pending {
  const float* sums;
  int64_t channel, pixel, count, row, rows;
};

template <Act act>
static void planes_product(const Stage& s, int64_t n, int64_t y0, int64_t pixels, const PlanesPlan& plan, const vu* panel,
                           float* sums) {
  const View flat = as_one_row(s.out);
  const bool direct = s.out.sw == 1 && flat.h == 1;
  const Constants& constants = s.pointwise.constants;
  float* const lines = sums + 2 * plan.kSums;
  const int64_t steps = plan.depth / kTileDepth, begin = y0 * s.out.w;
  Pending p{};
  auto finish_row = [&] {
    const int64_t c = p.channel + p.row;
    const vf bias = broadcast(constants.bias + c), scale = broadcast(constants.scale + c), shift = broadcast(constants.shift + c);
    const float* from = p.sums + p.row * kBlock;
    const vf low = activate<act, true>(load(from) + bias) * scale + shift;
    const vf high = activate<act, true>(load(from + VL) + bias) * scale + shift;
    if (direct) {
      const __m512i both = (__m512i)_mm512_cvtne2ps_pbh((__m512)high, (__m512)low);
      bfloat16* to = address<bfloat16>(flat, n, c, 0, begin + p.pixel);
      if (p.count == kBlock)
        _mm512_storeu_si512(to, both);
      else
        _mm512_mask_storeu_epi16(to, (1u << p.count) - 1, both);
    } else {
      store(lines + p.row * kBlock, low);
      store(lines + p.row * kBlock + VL, high);
    }
    p.row++;
  };
  auto scatter_block = [&] {
    if (direct) return;
    for (int64_t c = 0; c < p.rows; c += VL)
      for (int64_t x = 0; x < p.count; x += VL) {
        vf v[VL];
        alignas(64) float pixel_lines[VL * VL];
        for (int64_t i = 0; i < VL; i++) v[i] = load(lines + (c + i) * kBlock + x);
        transpose(v);
        for (int64_t i = 0; i < VL; i++) store(pixel_lines + i * VL, v[i]);
        const int64_t m1 = least(p.count, x + VL);
        for (int64_t m = x, count; m < m1; m += count) {
          const int64_t pixel = begin + p.pixel + m;
          count = least(m1 - m, flat.w - pixel % flat.w);
          scatter(flat, n, p.channel + c, pixel / flat.w, pixel % flat.w, count, pixel_lines + (m - x) * VL, VL);
        }
      }
  };
  auto finish = [&] {
    while (p.row < p.rows) finish_row();
    if (p.rows) scatter_block();
  };
  const int64_t rows_a_step = ceil_div(kBlock, steps);
  // what comes next is asked for in equal pieces
  const int64_t channel_blocks = ceil_div(s.out.c, kBlock), calls = steps * plan.blocks;
  const int64_t slab = kBlock * plan.depth * 2, lines_a_call = ceil_div(slab / 64, calls);
  for (int64_t block = 0, turn = 0; block < channel_blocks; block++) {
    const bfloat16* const weight = (const bfloat16*)s.pointwise.weight + block * kBlock * plan.depth;
    const char* ahead = block + 1 < channel_blocks ? (const char*)weight + slab : (const char*)s.pointwise.next;
    const Operand a{weight, kTileDepth * 2, kTile * kTileDepth * 2, kBlock * kTileDepth * 2};
    for (int64_t m = 0; m < pixels; m += kBlock, turn ^= 1) {
      const int64_t count = least(kBlock, pixels - m);
      const Operand b{panel + m * plan.pairs / VL, kBlock * 4, kTile * 4, kTile * kBlock * 4};
      float* const to = sums + turn * plan.kSums;
      auto work = [&](int64_t) __attribute__((always_inline)) {
        for (int64_t i = 0; i < lines_a_call; i++, ahead += 64) __builtin_prefetch(ahead, 0, 2);
        for (int64_t i = 0; i < rows_a_step && p.row < p.rows; i++) finish_row();
      };
      if (count > kTile)
        tile_block<2, 2>(a, b, steps, to, kBlock * 4, kTile * 4, work);
      else
        tile_block<2, 1>(a, b, steps, to, kBlock * 4, kTile * 4, work);
      finish();
      p = {to, block * kBlock, m, count, 0, least(kBlock, s.out.c - block * kBlock)};
    }
  }
  finish();
}

// The patches of the rows [y0, y0 + rows), VL pixels at a time: rows of pairs, transposed
static void fill_patches_panel(const Stage& s, int64_t n, int64_t y0, int64_t rows, const PlanesPlan& plan, vu* panel,
                               bfloat16* some) {
  const int64_t w = s.out.w, pixels = rows * w;
  for (int64_t m = 0; m < pixels; m += VL) {
    const int64_t count = least(VL, pixels - m);
    for (int64_t i = 0; i < count; i++) {
      bfloat16* const to = some + i * plan.depth;
      const int64_t filled = copy_patch<bfloat16>(s.in, n, y0 + (m + i) / w, (m + i) % w, s.ph, s.pw, to);
      memset(to + filled, 0, (plan.depth - filled) * 2);
    }
    for (int64_t pair = 0; pair < plan.pairs; pair += VL) {
      vf v[VL];
      for (int64_t i = 0; i < VL; i++) v[i] = load((const float*)(some + i * plan.depth) + pair);
      transpose(v);
      for (int64_t l = 0; l < VL; l++) put_words(panel, plan.pairs, pair + l, m, count, bits(v[l]));
    }
  }
}

static void planes_band(const Stage& s, int64_t n, int64_t y0, char* memory) {
  const int64_t rows = least(s.rows, s.out.h - y0), w = s.out.w;
  const PlanesPlan plan(s, rows);
  vu* const panel = (vu*)memory;
  char* const scratch = memory + round_up(plan.panel_words() * 4, 64);
  float* const sums = (float*)(scratch + round_up(plan.scratch, 64));
  {
    const Timer timer(s.times ? &s.times->producer : nullptr);
    if (s.producer == Stage::Producer::patches) {
      fill_patches_panel(s, n, y0, rows, plan, panel, (bfloat16*)scratch);
    } else {
      const TileDepthwise depthwise(s.in, s.depthwise, y0, rows);
      const Tiles tiles(depthwise.tile_rows);
      const Constants& k = s.depthwise.constants;
      with_activation(s.act, [&](auto a) {
        constexpr Act act = decltype(a)::value;
        depthwise.run(n, 0, s.in.c, scratch,
                      [&](int64_t c, int64_t y, int64_t x, int64_t count, vf even, vf odd, vf even_skip, vf odd_skip)
                          __attribute__((always_inline)) {
          auto done = [&](vf v, int64_t i, vf skip) __attribute__((always_inline)) {
            return activate<act, true>(v + broadcast(k.bias + i)) * broadcast(k.scale + i) + broadcast(k.shift + i) + skip;
          };
          const vf e = done(even, c, even_skip), o = c + 1 < s.in.c ? done(odd, c + 1, odd_skip) : vf{};
          put_words(panel, plan.pairs, c / 2, (y - y0) * w + x, count, pack_pair(e, o));
        });
      });
      for (int64_t block = 0; block < plan.blocks; block++) {
        const int64_t used = ceil_div(s.in.c, 2);
        memset((uint32_t*)panel + (block * plan.pairs + used) * kBlock, 0, (plan.pairs - used) * kBlock * 4);
      }
    }
  }
  const Timer timer(s.times ? &s.times->product : nullptr);
  const Tiles tiles;
  with_activation(s.act, [&](auto a) { planes_product<decltype(a)::value>(s, n, y0, rows * w, plan, panel, sums); });
}

static int64_t planes_bytes(const Stage& s) { return PlanesPlan(s, s.rows).bytes(); }

// One block of VL channels of a depthwise layer by itself, rows [y0, y0 + s.rows)
static int64_t tile_layer_bytes(const DepthwiseStage& s) {
  const int64_t lines = s.out.sw == 1 ? 0 : 2 * VL * s.rows * s.out.w * 4;
  return round_up(TileDepthwise(s.in, s.depthwise, 0, s.rows).bytes(), 64) + lines + 64;
}
static void tile_layer(const DepthwiseStage& s, int64_t n, int64_t block, int64_t y0, char* memory) {
  const View& out = s.out;
  const int64_t rows = least(s.rows, out.h - y0), w = out.w, pixels = rows * w, c0 = block * VL, c1 = least(c0 + VL, out.c);
  const TileDepthwise depthwise(s.in, s.depthwise, y0, rows);
  float* const sums = (float*)(memory + round_up(depthwise.bytes(), 64));  // [VL][pixels], then a row [w][VL]
  float* const line = sums + VL * s.rows * w;
  const Constants& k = s.depthwise.constants;
  const Tiles tiles(depthwise.tile_rows);
  with_activation(s.act, [&](auto a) {
    constexpr Act act = decltype(a)::value;
    depthwise.run(n, c0, c1, memory, [&](int64_t c, int64_t y, int64_t x, int64_t count, vf even, vf odd, vf even_skip, vf odd_skip)
                                         __attribute__((always_inline)) {
      auto one = [&](int64_t i, vf v, vf skip) __attribute__((always_inline)) {
        if (i >= c1) return;
        const vf done =
            activate<act>(v + broadcast(k.bias + i)) * broadcast(k.scale + i) + broadcast(k.shift + i) + skip;
        if (out.sw == 1) {
          bfloat16* const to = address<bfloat16>(out, n, i, y, x);
          _mm256_mask_storeu_epi16(to, (1u << count) - 1, (__m256i)narrow_bf16(done));
        } else {
          _mm512_mask_storeu_ps(sums + (i - c0) * pixels + (y - y0) * w + x, (1u << count) - 1, (__m512)done);
        }
      };
      one(c, even, even_skip);
      one(c + 1, odd, odd_skip);
    });
  });
  if (out.sw == 1) return;
  for (int64_t r = 0; r < rows; r++) {
    for (int64_t x = 0; x < w; x += VL) {
      vf v[VL] = {};
      const __mmask16 mask = (1u << least(VL, w - x)) - 1;
      for (int64_t l = 0; l < c1 - c0; l++) v[l] = (vf)_mm512_maskz_loadu_ps(mask, sums + l * pixels + r * w + x);
      transpose(v);
      for (int64_t i = 0; i < least(VL, w - x); i++) store(line + (x + i) * VL, v[i]);
    }
    scatter(out, n, c0, y0 + r, 0, w, line, VL);
  }
}
#else
static int64_t planes_bytes(const Stage&) { return 0; }
static void planes_band(const Stage&, int64_t, int64_t, char*) {}
static int64_t tile_layer_bytes(const DepthwiseStage&) { return 0; }
static void tile_layer(const DepthwiseStage&, int64_t, int64_t, int64_t, char*) {}
#endif

}  // namespace cmx::CMX_ISA
