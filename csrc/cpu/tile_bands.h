// Filters as Toeplitz bands, which tiles of a depthwise convolution's windows are multiplied with: packing and making them.
#pragma once

#include "depthwise.h"
#include "tiles.h"

namespace cmx::CMX_ISA {

constexpr int64_t kCellRows = 2, kCellColumns = 8;

// A filter's row is packed as the pairs (w[j], w[j + 1]), j from kw - 1 down to -1, and zeros: [channel][kh][words].
struct Bands {
  int64_t words;   // of a packed row
  int64_t window;  // columns: 16, 32 or 64
  int64_t parts;   // of the windows of two rows, a tile's depth each
  int64_t steps;   // tiles in depth
  Bands(int64_t kh, int64_t kw)
      : words(words_of(kw)),
        window(kw <= 9    ? 16
               : kw <= 25 ? 32
                          : 64),
        parts(kCellRows * window / kTileDepth),
        steps(ceil_div((kh + 1) * window, kTileDepth)) {}
  static int64_t words_of(int64_t kw) { return kw < VL - 1 ? VL : 2 * VL; }
};

CMX_INLINE bool tiles_multiply(Dtype d) { return kTiles && d == Dtype::bfloat16; }

static int64_t packed_bands_bytes(int64_t c, int64_t kh, int64_t kw) { return c * kh * Bands::words_of(kw) * 4; }

// weight [1, c, kh, kw], VL channels of it
static void pack_bands(const View& weight, int64_t block, void* out) {
  const int64_t kw = weight.w, words = Bands::words_of(kw);
  for (int64_t c = block * VL; c < least(weight.c, (block + 1) * VL); c++)
    for (int64_t t = 0; t < weight.h; t++) {
      uint16_t* to = (uint16_t*)out + (c * weight.h + t) * words * 2;
      auto tap = [&](int64_t j) { return j >= 0 && j < kw ? address<const bfloat16>(weight, 0, c, t, j)->bits : 0; };
      for (int64_t i = 0; i < words; i++, to += 2) to[0] = tap(kw - 1 - i), to[1] = tap(kw - i);
    }
}

#if defined(CMX_TILES)
// Makes the bands of a channel: row p of a band, lane (r, n) has the pair of taps (dy, dx), (dy, dx + 1) that take the
// window's columns q, q + 1 of input row d to column n of the cell's row r: dy = d - r, dx = q - n.
class BandMaker {
 public:
  BandMaker(int64_t kh, int64_t kw) : bands(kh, kw), kh_(kh) {
    vu column, second;
    for (int64_t lane = 0; lane < VL; lane++) {
      column[lane] = lane % kCellColumns;
      second[lane] = bands.words == VL ? lane / kCellColumns * VL : 0;
    }
    const vu last = vu{} + (uint32_t)kw, none = vu{} + (uint32_t)(bands.words - 1);
    for (int64_t i = 0; i < bands.window / 2; i++) {
      const vu word = column + (uint32_t)(kw - 1 - 2 * i);  // below 0: very large
      there_[i] = _mm512_cmple_epu32_mask((__m512i)word, (__m512i)last);
      index_[i] = (word <= last ? word : none) + second;
    }
  }
  void make(const vu* packed, vu* to) const {
    const int64_t rows_a_step = most(1, kTileDepth / bands.window), halves = most(1, bands.window / kTileDepth);
    for (int64_t step = 0; step < bands.steps; step++)
      for (int64_t i = 0; i < rows_a_step; i++) {
        if (step % 8 == 4) tile_keep_awake();
        const int64_t d = step / halves * rows_a_step + i, first = step % halves * kTile, count = kTile / rows_a_step;
        if (bands.words == VL) {
          const __m512i even = row(packed, d), odd = row(packed, d - 1);  // the last word of either is zero
#pragma GCC unroll 8
          for (int64_t p = 0; p < count; p++, to++)
            *to = (vu)_mm512_permutex2var_epi32(even, (__m512i)index_[first + p], odd);
          continue;
        }
        for (int64_t p = first; p < first + count; p++, to++) {
          const __mmask16 there = there_[p], lower = there & 0xff, upper = there & 0xff00;
          const __m512i at = (__m512i)index_[p];
          *to = (vu)_mm512_or_si512(
              _mm512_maskz_permutex2var_epi32(lower, row(packed, d, 0), at, row(packed, d, 1)),
              _mm512_maskz_permutex2var_epi32(upper, row(packed, d - 1, 0), at, row(packed, d - 1, 1)));
        }
      }
  }
  const Bands bands;

 private:
  __m512i row(const vu* packed, int64_t t, int64_t half = 0) const {
    return t >= 0 && t < kh_ ? (__m512i)packed[t * bands.words / VL + half] : _mm512_setzero_si512();
  }
  const int64_t kh_;
  alignas(64) vu index_[kTileDepth];
  __mmask16 there_[kTileDepth];
};
#endif

}  // namespace cmx::CMX_ISA
