// Depthwise convolution by tiles, in bfloat16:
//
//     sums[cell][lane] += window[cell][.] x band[.][lane]
//
// A cell is 2 rows by 8 columns of the output, a row of a tile; its window holds the input rows of both, from before(kw)
// columns before it on; a band, a Toeplitz matrix, is what a tile's depth of the windows is multiplied with.
#pragma once

#include <vector>

#include "activation.h"
#include "tile_bands.h"

namespace cmx::CMX_ISA {

// Whether a layer by itself is faster by tiles than by vectors, in cycles of one block of VL channels (Emerald Rapids): small
// planes do not repay their bands, and few taps not their windows. In a stack the product wants planes either way.
static bool tiles_pay(const View& in, const Depthwise& d) {
  if (!tiles_multiply(in.dtype)) return false;
  auto inside = [](int64_t size, int64_t k) {  // pairs of a pixel and a tap that lies in the image
    int64_t sum = 0;
    for (int64_t i = 0; i < size; i++) sum += least(size, i + k - before(k)) - most(0, i - before(k));
    return sum;
  };
  const Bands bands(d.kh, d.kw);
  const int64_t columns = ceil_div(in.w, kCellColumns), rows = ceil_div(in.h, kCellRows), cells = rows * columns;
  const int64_t windows = (rows + d.kh / 2) * columns * bands.parts;
  const int64_t transposed = in.sw == 1 ? 0 : 16 * in.h * in.w;
  const int64_t tiles = VL * (20 * bands.steps + 4 * windows + bands.steps * cells + 16 * cells) + transposed;
  return tiles < inside(in.h, d.kh) * inside(in.w, d.kw) / 2 + 16 * in.h * in.w;
}

#if defined(CMX_TILES)
// Sums of four tiles at once, whose chains of dependent products hide one another. shared: two and two have one band.
// Step i takes the windows at(i) bytes further.
template <int J, bool shared, class At>
CMX_INLINE void band_sums(const char* const (&a)[4], const char* const (&b)[4], int64_t steps, float* const (&out)[4],
                          At at) {
  tile_zero<0>(), tile_zero<1>(), tile_zero<2>(), tile_zero<3>();
  for (int64_t i = 0; i < steps; i++) {
    const int64_t step = at(i), band = i * kTile * kTile * 4;
    tile_load<6>(b[0] + band, 64);
    tile_load<4>(a[0] + step, 64);
    tile_dot<0, 4, 6>();
    if (J == 1) continue;
    tile_load<5>(a[1] + step, 64);
    if (shared) {
      tile_dot<1, 5, 6>();
    } else {
      tile_load<7>(b[1] + band, 64);
      tile_dot<1, 5, 7>();
    }
    if (J == 2) continue;
    constexpr int second = shared ? 7 : 6;
    tile_load<second>(b[2] + band, 64);
    tile_load<4>(a[2] + step, 64);
    tile_dot<2, 4, second>();
    tile_load<5>(a[3] + step, 64);
    if (!shared) tile_load<7>(b[3] + band, 64);
    tile_dot<3, 5, 7>();
  }
  tile_store<0>(out[0], 64);
  if (J > 1) tile_store<1>(out[1], 64);
  if (J > 2) tile_store<2>(out[2], 64), tile_store<3>(out[3], 64);
}

// What follows a convolution in one channel, in all lanes
struct ChannelConstants {
  vf bias, scale, shift;
  ChannelConstants(const Constants& k, int64_t c)
      : bias(broadcast(k.bias + c)), scale(broadcast(k.scale + c)), shift(broadcast(k.shift + c)) {}
  template <Act act, bool near>
  CMX_ALWAYS_INLINE vf finished(vf sum) const {
    return activate<act, near>(sum + bias) * scale + shift;
  }
};

// Rows [y0, y0 + rows) of one image, in cells [row of cells][column of cells]
struct Cells {
  int64_t rows, columns;
  Cells(int64_t rows, int64_t w) : rows(ceil_div(rows, kCellRows)), columns(ceil_div(w, kCellColumns)) {}
  int64_t count() const { return rows * columns; }
};

// Depthwise sums of a few channels at a time
class TileDepthwise {
 public:
  TileDepthwise(const View& in, const Depthwise& d, int64_t y0, int64_t rows)
      : in_(in),
        d_(d),
        top_(y0 - before(d.kh)),
        cells_(rows, in.w),
        groups_(cells_.rows + d.kh / 2),
        touched_(groups_, ceil_div(most(0, 1 - kCellRows - top_), kCellRows), ceil_div(in.h - top_, kCellRows)),
        whole_(groups_, ceil_div(most(0, -top_), kCellRows), (in.h - top_) / kCellRows),
        rows_a_line_(in.sh == in.w ? most(1, kTileDepth / in.w) : 1),
        tile_rows(least(cells_.count(), kTile)),
        tiles_(ceil_div(cells_.count(), kTile)),
        group_(tiles_ == 1 ? kMostChannels : kMostChannels / 2),
        maker_(d.kh, d.kw) {}

  // Of scratch memory, for these rows or fewer, whose channels may come in larger groups
  int64_t most_bytes() const {
    const int64_t gathered = in_place() ? 0 : VL * in_rows() * in_.w * 2 + most(in_.w, VL) * VL * 4;
    return kMostChannels * (window_bytes() + band_bytes() + round_up(cells_.count(), kTile) * VL * 4) + gathered + 128;
  }

  // Images [n0, n1), channels [c0, c1). begin(n, c) gives put(cell, i, j, even, odd, even_skip, odd_skip), which gets the sums
  // of channels c and c + 1 in the cell (i, j), and the input there, [2][8]. It holds what it needs: nothing behind a pointer
  // stays in a register.
  template <class Begin>
  void run(int64_t n0, int64_t n1, int64_t c0, int64_t c1, char* memory, Begin begin) const {
    if (!in_place())  // a block of channels is gathered for one image at a time
      for (; n0 + 1 < n1; n0++) run(n0, n0 + 1, c0, c1, memory, begin);
    const Pieces m(*this, memory);
    clear_outside(m);
    for (int64_t c = c0; c < c1; c += group_) {
      if (!in_place() && (c - c0) % VL == 0) gather_planes(n0, c, m);
      for (int64_t n = n0; n < n1; n++) {
        // from this image's plane to the one that comes after: of the next image, or of the first in the next channels
        const int64_t ahead = !in_place() ? 0 : n + 1 < n1 ? in_.sn : group_ * in_.sc - (n1 - 1 - n0) * in_.sn;
        for (int64_t g = 0; g < group_; g++) prepare(n, least(c + g, c1 - 1), c0, g, ahead, n == n0, m);
        multiply(m);
        for (int64_t g = 0; g < group_ && c + g < c1; g += 2) {
          if (finish(n, c + g, g, m, begin)) continue;
          for (int64_t i = 0; i < 2; i++) separate(g + i, m);
          finish(n, c + g, g, m, begin);
        }
      }
    }
  }

 private:
  static constexpr int64_t kMostChannels = 4;  // of a group: four sums at once
  struct Groups {
    int64_t begin, end;
    Groups(int64_t count, int64_t from, int64_t to) : begin(least(from, count)), end(most(begin, least(to, count))) {}
  };
  struct Pieces {
    char *windows, *bands;  // of a channel: [part][row group][column of cells][kTileDepth]; [step][kTile][kTile] pairs
    float* sums;            // [channel][cell][VL]
    float* some;
    bfloat16* planes;  // [VL][in_rows][w], and room for what is not read
    Pieces(const TileDepthwise& t, char* memory)
        : windows(memory),
          bands(windows + t.group_ * t.window_bytes()),
          sums((float*)(bands + t.group_ * t.band_bytes())),
          some(sums + t.group_ * round_up(t.cells_.count(), kTile) * VL),
          planes((bfloat16*)(some + (t.in_place() ? 0 : most(t.in_.w, VL) * VL))) {}
  };
  bool in_place() const { return in_.sw == 1 && !in_.blocked; }
  int64_t in_rows() const { return kCellRows * groups_; }
  int64_t part_bytes() const { return groups_ * cells_.columns * kTileDepth * 2; }
  int64_t window_bytes() const { return maker_.bands.parts * part_bytes(); }
  int64_t band_bytes() const { return maker_.bands.steps * kTile * kTile * 4; }
  float* sums(const Pieces& m, int64_t g) const { return m.sums + g * round_up(cells_.count(), kTile) * VL; }
  int64_t first_cell(int64_t tile) const { return least(tile * kTile, cells_.count() - tile_rows); }

  // Planes of VL channels out of anything
  void gather_planes(int64_t n, int64_t c0, const Pieces& m) const {
    for (int64_t r = 0; r < in_rows(); r++) {
      const int64_t y = top_ + r;
      if (y < 0 || y >= in_.h) continue;
      gather(in_, n, c0, y, 0, in_.w, m.some, VL);
      for (int64_t x = 0; x < in_.w; x += VL) {
        vf v[VL];
        for (int64_t i = 0; i < VL; i++) v[i] = load(m.some + least(x + i, in_.w - 1) * VL);
        transpose(v);
        const __mmask16 mask = (1u << least(VL, in_.w - x)) - 1;
        for (int64_t l = 0; l < VL; l++)
          _mm256_mask_storeu_epi16(m.planes + (l * in_rows() + r) * in_.w + x, mask, (__m256i)narrow_bf16(v[l]));
      }
    }
  }

  // Windows of channel c, and its bands, which all images share
  void prepare(int64_t n, int64_t c, int64_t gathered, int64_t g, int64_t ahead, bool bands, const Pieces& m) const {
    const bool direct = in_place();
    const int64_t row = direct ? in_.sh : in_.w;
    const bfloat16* const plane = direct ? address<const bfloat16>(in_, n, c, 0, 0)
                                         : m.planes + (c - gathered) % VL * in_rows() * in_.w - top_ * in_.w;
    fill_windows(plane, row, m.windows + g * window_bytes(), ahead);
    const int64_t words = maker_.bands.words / VL;
    if (!bands) return;
    const vu* const weight = (const vu*)d_.weight + c * d_.kh * words;
    for (int64_t i = 0; i < d_.kh * words; i++) __builtin_prefetch(weight + 2 * group_ * d_.kh * words + i);
    maker_.make(weight, (vu*)(m.bands + g * band_bytes()));
  }
  // Windows above and below the image stay zero for all channels
  void clear_outside(const Pieces& m) const {
    const int64_t row = cells_.columns * kTileDepth * 2;
    for (char* part = m.windows; part < m.windows + group_ * window_bytes(); part += part_bytes()) {
      memset(part, 0, touched_.begin * row);
      memset(part + touched_.end * row, 0, (groups_ - touched_.end) * row);
    }
  }
  // Windows of a plane; `ahead`, elements further, lies the one whose come next. Stores are whole rows of tiles: a tile that
  // meets two stores in a row waits for both.
  __attribute__((noinline)) void fill_windows(const bfloat16* plane, int64_t row, char* windows, int64_t ahead) const {
    const int64_t window = maker_.bands.window, part = part_bytes(), columns = cells_.columns, top = top_, h = in_.h,
                  step = columns * kTileDepth * 2;
    const Groups touched = touched_, whole = whole_;
    for (int64_t y = most(0, top); y < least(h, top + in_rows()); y += rows_a_line_)
      for (int64_t x = 0; x < in_.w; x += kTileDepth) __builtin_prefetch(plane + y * row + x + ahead);
    for (int64_t j = 0, x = -before(d_.kw); j < columns; j++, x += kCellColumns) {
      char* const to = windows + j * kTileDepth * 2;
      tile_keep_awake();
      if (window == kTile) {
        const __mmask16 mask = inside(x, kTile);
        auto masked = [&](int64_t begin, int64_t end) {
          for (int64_t group = begin; group < end; group++) {
            const int64_t y = top + kCellRows * group;
            const bfloat16* const from = plane + y * row + x;
            const __mmask16 upper = y >= 0 && y < h ? mask : 0, lower = y + 1 >= 0 && y + 1 < h ? mask : 0;
            store_window(to + group * step, _mm256_maskz_loadu_epi16(upper, from),
                         _mm256_maskz_loadu_epi16(lower, from + row));
          }
        };
        if (mask != 0xffff) {
          masked(touched.begin, touched.end);
          continue;
        }
        masked(touched.begin, whole.begin), masked(whole.end, touched.end);
        const bfloat16* from = plane + (top + kCellRows * whole.begin) * row + x;
        for (int64_t group = whole.begin; group < whole.end; group++, from += kCellRows * row)
          store_window(to + group * step, *(const __m256i_u*)from, *(const __m256i_u*)(from + row));
        continue;
      }
      for (int64_t r = kCellRows * touched.begin; r < kCellRows * touched.end; r++)
        for (int64_t at = 0; at < window; at += kTileDepth) {
          const int64_t y = top + r, of = (r % kCellRows * window + at) / kTileDepth;
          const __mmask32 mask = y >= 0 && y < h ? inside(x + at, kTileDepth) : 0;
          _mm512_store_si512(to + of * part + r / kCellRows * step,
                             _mm512_maskz_loadu_epi16(mask, plane + y * row + x + at));
        }
    }
  }
  CMX_ALWAYS_INLINE static void store_window(char* to, __m256i upper, __m256i lower) {
    _mm512_store_si512(to, _mm512_inserti64x4(_mm512_castsi256_si512(upper), lower, 1));
  }
  // Columns x .. x + count that lie in the image
  uint32_t inside(int64_t x, int64_t count) const {
    const int64_t lo = most(0, -x), hi = least(count, in_.w - x);
    return hi <= lo ? 0 : (uint32_t)(((uint64_t)1 << hi) - ((uint64_t)1 << lo));
  }

  void multiply(const Pieces& m) const {
    const char *a[4], *b[4];
    float* to[4];
    auto job = [&](int j, int64_t i, int64_t tile) {
      a[j] = m.windows + i * window_bytes() + first_cell(tile) * kTileDepth * 2;
      b[j] = m.bands + i * band_bytes();
      to[j] = sums(m, i) + first_cell(tile) * VL;
    };
    if (tiles_ == 1) {
      for (int j = 0; j < 4; j++) job(j, j, 0);
      return sums_of<4, false>(a, b, to);
    }
    int64_t tile = 0;
    for (; tile + 1 < tiles_; tile += 2) {
      for (int j = 0; j < 4; j++) job(j, j / 2, tile + j % 2);
      sums_of<4, true>(a, b, to);
    }
    if (tile == tiles_) return;
    for (int j = 0; j < 2; j++) job(j, j, tile);
    sums_of<2, false>(a, b, to);
  }
  template <int J, bool shared>
  __attribute__((noinline)) void sums_of(const char* const (&a)[4], const char* const (&b)[4],
                                         float* const (&to)[4]) const {
    const int64_t row = cells_.columns * kTileDepth * 2, parts = maker_.bands.parts, part = part_bytes();
    int64_t next = 0, of_part = 0, group = 0;
    band_sums<J, shared>(a, b, maker_.bands.steps, to, [&](int64_t) {
      const int64_t at = next;
      if (++of_part == parts) of_part = 0, group += row;
      next = group + of_part * part;
      return at;
    });
  }

  // Whether all sums of channels g and g + 1 are finite. put(cell, i, j, even, odd, even_skip, odd_skip)
  template <bool residual, class Put>
  bool finish_pair(int64_t g, const Pieces& m, Put put) const {
    const int64_t rows = cells_.rows, columns = cells_.columns, other = window_bytes();
    const float *even = sums(m, g), *odd = sums(m, g + 1);
    const char *upper = under(m, g, 0), *lower = under(m, g, 1);
    vf zero{};
    for (int64_t i = 0, cell = 0; i < rows; i++)
      for (int64_t j = 0; j < columns;
           j++, cell++, even += VL, odd += VL, upper += kTileDepth * 2, lower += kTileDepth * 2) {
        const vf e = load(even), o = load(odd);
        zero += vf{} * e;
        zero += vf{} * o;
        put(cell, i, j, e, o, residual ? both(upper, lower) : vf{},
            residual ? both(upper + other, lower + other) : vf{});
      }
    return _mm512_cmp_ps_mask((__m512)zero, _mm512_setzero_ps(), _CMP_NEQ_UQ) == 0;
  }
  template <class Begin>
  bool finish(int64_t n, int64_t c, int64_t g, const Pieces& m, Begin begin) const {
    return d_.residual ? finish_pair<true>(g, m, begin(n, c)) : finish_pair<false>(g, m, begin(n, c));
  }
  // The input under row r of the first cell; that under cell i lies i rows of a tile further
  const char* under(const Pieces& m, int64_t g, int64_t r) const {
    return element(m.windows + g * window_bytes(), before(d_.kh) + r, 0, before(d_.kw), maker_.bands.window);
  }
  CMX_ALWAYS_INLINE static vf both(const char* upper, const char* lower) {
    const __m128i first = _mm_loadu_si128((const __m128i_u*)upper), second = _mm_loadu_si128((const __m128i_u*)lower);
    return (vf)_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_set_m128i(second, first)), 16);
  }
  // Column q of the window of cells in column j, input row y
  CMX_ALWAYS_INLINE const char* element(const char* windows, int64_t y, int64_t j, int64_t q, int64_t window) const {
    const int64_t linear = y % kCellRows * window + q;
    return windows + linear / kTileDepth * part_bytes() +
           ((y / kCellRows * cells_.columns + j) * kTileDepth + linear % kTileDepth) * 2;
  }

  // Sums of a channel again without what is not finite, which a band's zeros spread over the cells; then its products
  // with the taps.
  __attribute__((noinline)) void separate(int64_t g, const Pieces& m) const {
    struct Spot {
      bfloat16 *at, value;
      int64_t y, j, q;
    };
    std::vector<Spot> spots;
    char* const windows = m.windows + g * window_bytes();
    const char* const bands = m.bands + g * band_bytes();
    const int64_t window = maker_.bands.window;
    for (int64_t y = 0; y < in_rows(); y++)
      for (int64_t j = 0; j < cells_.columns; j++)
        for (int64_t q = 0; q < window; q++) {
          bfloat16* const at = (bfloat16*)element(windows, y, j, q, window);
          if ((at->bits & 0x7f80) != 0x7f80) continue;
          spots.push_back({at, *at, y, j, q});
          at->bits = 0;
        }
    if (spots.empty()) return;
    for (int64_t tile = 0; tile < tiles_; tile++) {
      const char* const a = windows + first_cell(tile) * kTileDepth * 2;
      float* const to = sums(m, g) + first_cell(tile) * VL;
      sums_of<1, false>({a, a, a, a}, {bands, bands, bands, bands}, {to, to, to, to});
    }
    for (const Spot& s : spots) {
      const uint32_t reached = (1u << least(kCellColumns, s.q + 1)) - 1;  // dx = q - n: neither below 0, nor from kw on
      const uint32_t columns = reached >> most(0, s.q - d_.kw + 1) << most(0, s.q - d_.kw + 1);
      for (int64_t i = most(0, (s.y - d_.kh) / kCellRows); i <= least(cells_.rows - 1, s.y / kCellRows); i++) {
        const int64_t d = s.y - kCellRows * i, k = d * window + s.q;
        const __mmask16 lanes = (d < d_.kh ? columns : 0) | (d > 0 && d <= d_.kh ? columns << kCellColumns : 0);
        const vu pairs = *(const vu*)(bands + k / 2 * VL * 4);
        float* const to = sums(m, g) + (i * cells_.columns + s.j) * VL;
        const vf sum = load(to) + all(load(&s.value)[0]) * (k % 2 ? high(pairs) : low(pairs));
        _mm512_mask_storeu_ps(to, lanes, (__m512)sum);
      }
    }
    for (const Spot& s : spots) *s.at = s.value;
  }

  const View in_;
  const Depthwise& d_;
  const int64_t top_;
  const Cells cells_;
  const int64_t groups_;          // of two input rows
  const Groups touched_, whole_;  // of which one row or both lie in the image
  const int64_t rows_a_line_;

 public:
  const int64_t tile_rows;  // cells of a tile

 private:
  const int64_t tiles_, group_;  // of a channel; channels of a group
  const BandMaker maker_;
};

static int64_t tile_layer_bytes(const DepthwiseStage& s) {
  const int64_t rows = least(s.rows, s.out.h);
  return round_up(TileDepthwise(s.in, s.depthwise, 0, rows).most_bytes(), 64) +
         Cells(rows, s.out.w).count() * VL * VL * 4 + 64;
}
// One block of VL channels of a depthwise layer by itself, rows [y0, y0 + s.rows)
static void tile_layer(const DepthwiseStage& s, int64_t n, int64_t block, int64_t y0, char* memory) {
  const View& out = s.out;
  const int64_t rows = least(s.rows, out.h - y0), c0 = block * VL, c1 = least(c0 + VL, out.c);
  const Cells cells(rows, out.w);
  const TileDepthwise depthwise(s.in, s.depthwise, y0, rows);
  float* const sums =
      (float*)(memory + round_up(depthwise.most_bytes(), 64));  // [cell][channel][VL], unless stored in place
  const Constants& k = s.depthwise.constants;
  const Tiles tiles(depthwise.tile_rows);
  with_activation(s.act, [&](auto a) {
    depthwise.run(n, n + 1, c0, c1, memory, [&](int64_t n, int64_t c) __attribute__((always_inline)) {
      const bool two = c + 1 < c1, direct = out.sw == 1;
      const ChannelConstants even(k, c), odd(k, two ? c + 1 : c);
      bfloat16* const to = address<bfloat16>(out, n, c, y0, 0);
      float* const some = sums + (c - c0) * VL;
      const int64_t plane = out.sc, row = out.sh, w = out.w;
      return [=](int64_t cell, int64_t i, int64_t j, vf e, vf o, vf even_skip, vf odd_skip)
                 __attribute__((always_inline)) {
                   const vf both[2] = {even.template finished<decltype(a)::value, false>(e) + even_skip,
                                       odd.template finished<decltype(a)::value, false>(o) + odd_skip};
                   for (int64_t q = 0; q < 1 + two; q++) {
                     if (!direct) {
                       store(some + (cell * VL + q) * VL, both[q]);
                       continue;
                     }
                     const __m256i narrow = (__m256i)narrow_bf16(both[q]);
                     const __mmask8 mask = (1u << least(kCellColumns, w - j * kCellColumns)) - 1;
                     bfloat16* const at = to + q * plane + i * kCellRows * row + j * kCellColumns;
                     _mm_mask_storeu_epi16(at, mask, _mm256_castsi256_si128(narrow));
                     if (i * kCellRows + 1 < rows)
                       _mm_mask_storeu_epi16(at + row, mask, _mm256_extracti128_si256(narrow, 1));
                   }
                 };
    });
  });
  if (out.sw == 1) return;
  for (int64_t i = 0; i < cells.rows; i++)
    for (int64_t j = 0; j < cells.columns; j++) {
      float* const cell = sums + (i * cells.columns + j) * VL * VL;
      vf v[VL];
      for (int64_t l = 0; l < VL; l++) v[l] = l < c1 - c0 ? load(cell + l * VL) : vf{};
      transpose(v);
      for (int64_t l = 0; l < VL; l++) store(cell + l * VL, v[l]);
      for (int64_t r = 0; r < kCellRows && i * kCellRows + r < rows; r++)
        scatter(out, n, c0, y0 + i * kCellRows + r, j * kCellColumns, least(kCellColumns, out.w - j * kCellColumns),
                cell + r * kCellColumns * VL, VL);
    }
}
#else
static int64_t tile_layer_bytes(const DepthwiseStage&) { return 0; }
static void tile_layer(const DepthwiseStage&, int64_t, int64_t, int64_t, char*) {}
#endif

}  // namespace cmx::CMX_ISA
