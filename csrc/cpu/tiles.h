// AMX: tiles of 16 rows of 64 bytes, and sums of 16 x 16 float32 over 32 products of bfloat16 in one instruction.
//
//     sums[i][j] += a[i][k] * b[k / 2][j][k % 2]        a: rows of 32 numbers; b: rows of 16 pairs
//
// Operands lie anywhere, with any distance between rows; rows that cross a line of the cache take five times as long.
#pragma once

#include <iterator>

#include "vec.h"

namespace cmx::CMX_ISA {

#if defined(CMX_TILES)
constexpr bool kTiles = true;
#else
constexpr bool kTiles = false;
#endif
constexpr int64_t kTile = 16, kTileDepth = 32;  // rows and columns of sums; products of each

// One operand: 16 rows (a) or 16 pairs of rows (b), bytes to the next row, the next tile beside it, the next products,
// the next piece of the same numbers
struct Operand {
  const void* data;
  int64_t row, tile, step, piece = 0;
};

#if defined(CMX_TILES)
// Tiles 0 to 3 are sums, 4 and 5 rows of a, 6 and 7 pairs of b; of this thread until it ends. rows: of a and the sums
class Tiles {
 public:
  explicit Tiles(int64_t rows = kTile) {
    alignas(64) uint8_t config[64] = {1};
    for (int i = 0; i < 8; i++) {
      config[16 + 2 * i] = 64;
      config[48 + i] = i < 6 ? rows : kTile;
    }
    asm volatile("ldtilecfg %0" ::"m"(config));
  }
  ~Tiles() { asm volatile("tilerelease"); }
  Tiles(const Tiles&) = delete;
};

// The compiler's own are not said to touch memory
template <int T>
CMX_INLINE void tile_load(const void* p, int64_t row) {
  asm volatile("tileloadd (%0,%1,1), %%tmm%c2" ::"r"(p), "r"(row), "i"(T) : "memory");
}
template <int T>
CMX_INLINE void tile_store(void* p, int64_t row) {
  asm volatile("tilestored %%tmm%c2, (%0,%1,1)" ::"r"(p), "r"(row), "i"(T) : "memory");
}
template <int T>
CMX_INLINE void tile_zero() {
  asm volatile("tilezero %%tmm%c0" ::"i"(T));
}
template <int S, int A, int B>
CMX_INLINE void tile_dot() {
  asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(S), "i"(A), "i"(B));
}

// Where nothing else multiplies tiles for 0.15 us: the unit falls asleep then, and the next product takes 0.4 us more
// (Emerald Rapids). Spoils tile 3.
CMX_INLINE void tile_keep_awake() { tile_dot<3, 4, 6>(); }

// What a step multiplies: (piece of a, piece of b), each from the last by one exchange. Of numbers that are sums of three
// pieces the products that weigh less than the last come first: they are added while sums are small.
struct Factors {
  int a, b;
};
template <int Pieces>
constexpr Factors kFactors[] = {{0, 0}};
template <>
constexpr Factors kFactors<3>[] = {{2, 0}, {1, 0}, {1, 1}, {0, 1}, {0, 2}, {0, 0}};

// M x N tiles of sums, bytes to the next row and to the next tile beside it; those below lie kTile rows further.
// work(last of a step) is called between the instructions, for vectors to have something to do.
template <int M, int N, int Pieces = 1, class Work>
CMX_INLINE void tile_block(const Operand& a, const Operand& b, int64_t steps, float* out, int64_t row, int64_t beside,
                           Work work) {
  constexpr auto& factors = kFactors<Pieces>;
  constexpr int count = std::size(factors);
  const char *pa = (const char*)a.data, *pb = (const char*)b.data;
  const int64_t below = kTile * row;
  tile_zero<0>();
  if (N == 2) tile_zero<1>();
  if (M == 2) tile_zero<2>();
  if (M == 2 && N == 2) tile_zero<3>();
  for (int64_t i = 0; i < steps; i++, pa += a.step, pb += b.step) {
#pragma GCC unroll 6
    for (int f = 0; f < count; f++) {
      const bool other_a = !f || factors[f].a != factors[f - 1].a, other_b = !f || factors[f].b != factors[f - 1].b;
      const char *const fa = pa + factors[f].a * a.piece, *const fb = pb + factors[f].b * b.piece;
      if (other_a) tile_load<4>(fa, a.row);
      if (other_b) tile_load<6>(fb, b.row);
      tile_dot<0, 4, 6>();
      if (N == 2 && other_b) tile_load<7>(fb + b.tile, b.row);
      if (N == 2) tile_dot<1, 4, 7>();
      if (M == 2 && other_a) tile_load<5>(fa + a.tile, a.row);
      if (M == 2) tile_dot<2, 5, 6>();
      if (M == 2 && N == 2) tile_dot<3, 5, 7>();
      work(f + 1 == count);
    }
  }
  tile_store<0>((char*)out, row);
  if (N == 2) tile_store<1>((char*)out + beside, row);
  if (M == 2) tile_store<2>((char*)out + below, row);
  if (M == 2 && N == 2) tile_store<3>((char*)out + below + beside, row);
}
#endif

}  // namespace cmx::CMX_ISA
