// Tile plans of the matrix product behind pointwise_block and patch_embed: the only place with its tuned numbers.
#pragma once

#include <initializer_list>

#include "plan.h"

namespace cmx {

// Output [n, c_out, h, w]; a pixel of it sums over k = (c, a, b): the c_in x ph x pw numbers of its patch
struct ProductShape {
  int n, c_in, c_out, h, w, ph, pw;
  Dtype dtype;
  int64_t plane() const { return int64_t(h) * w; }
  int64_t k() const { return int64_t(c_in) * ph * pw; }
};

// Which operand of the product D [rows][columns] = A [rows][k] B [k][columns] x is, and how it is read
enum class ProductLayout : int {
  pixels,         // A the weight, B the planes of x: neighbouring pixels are neighbours in memory
  channels_last,  // A the pixels of x, B the weight: neighbouring channels are neighbours in memory
  gather,         // as pixels, number by number: patches, and every other layout
};

// A block computes `rows` x `columns` of D in steps of `depth`, with 4 warps of warp_rows x warp_columns; where that are
// fewer warps than 4, the others take a share of each step: their sums meet in shared memory, in a fixed order.
struct ProductTile {
  int rows, columns, depth, warp_rows, warp_columns, stages, blocks_per_sm;
  constexpr int warps() const { return rows / warp_rows * (columns / warp_columns); }
  constexpr int slices() const { return 4 / warps(); }
  constexpr int stage_bytes() const { return 2 * depth * (rows + columns); }
};

inline constexpr int kProductThreads = 128;
inline constexpr ProductTile kProductTiles[] = {
    {128, 128, 32, 64, 64, 3, 2},
    {64, 64, 64, 64, 32, 3, 3},
    {64, 32, 64, 64, 32, 4, 3},
};
inline constexpr int kProductTileCount = 3, kProductGatherTile = 1;  // a gather has this tile alone

struct ProductPlan {
  int tile;
  ProductLayout layout;
  int rows, columns, k;           // of D, and how many products a number of it sums
  int row_tiles, column_tiles;    // blocks = their product; 0: not for this kernel
  int a_bytes, b_bytes, y_bytes;  // of one access
  int shared_bytes;
  int blocks() const { return row_tiles * column_tiles; }
};

// What a plan needs to know of memory
struct ProductMemory {
  ProductLayout layout;
  int weight_bytes, x_bytes, y_bytes;  // of one access
};

inline int access_bytes(const void* address, std::initializer_list<int64_t> elements, int64_t element) {
  int64_t bits = reinterpret_cast<intptr_t>(address) | 16;
  for (const int64_t e : elements) bits |= e * element;
  return static_cast<int>(bits & -bits);
}

inline ProductMemory product_memory_of(const void* x, const Strides& xs, const void* weight, const void* y,
                                       const Strides& ys, const ProductShape& s) {
  const int64_t element = size_of(s.dtype), plane = s.plane();
  const bool patches = s.ph != 1 || s.pw != 1;
  const bool linear = xs.h == s.w * xs.w || s.h == 1;  // a pixel's address is its number times xs.w
  const int y_planes = ys.w == 1 ? access_bytes(y, {ys.n, ys.c, plane}, element) : static_cast<int>(element);
  ProductMemory m{};
  m.weight_bytes = access_bytes(weight, {s.k()}, element);
  const int x_planes = access_bytes(x, {xs.n, xs.c, plane}, element);
  if (!patches && linear && xs.w == 1 && x_planes == 16) {
    m.layout = ProductLayout::pixels, m.x_bytes = x_planes, m.y_bytes = y_planes;
  } else if (!patches && linear && xs.c == 1 && ys.c == 1) {
    m.layout = ProductLayout::channels_last;
    m.x_bytes = access_bytes(x, {xs.n, xs.w, s.k()}, element);
    m.y_bytes = access_bytes(y, {ys.n, ys.w, s.c_out}, element);
  } else if (!patches && linear && xs.w == 1 && x_planes >= 4) {
    m.layout = ProductLayout::pixels, m.x_bytes = x_planes, m.y_bytes = y_planes;
  } else {
    m.layout = ProductLayout::gather, m.x_bytes = static_cast<int>(element), m.y_bytes = y_planes;
  }
  return m;
}

// n * h * w must be below 2^31 - 128
inline ProductPlan product_plan(const ProductShape& s, const ProductMemory& m, int tile) {
  ProductPlan p{};
  if (m.layout == ProductLayout::gather && tile != kProductGatherTile) return p;
  const ProductTile& t = kProductTiles[tile];
  p.tile = tile, p.layout = m.layout;
  const bool last = m.layout == ProductLayout::channels_last;
  const int pixels = static_cast<int>(s.n * s.plane());
  p.rows = last ? pixels : s.c_out, p.columns = last ? s.c_out : pixels;
  p.k = static_cast<int>(s.k());
  p.a_bytes = last ? m.x_bytes : m.weight_bytes, p.b_bytes = last ? m.weight_bytes : m.x_bytes;
  p.y_bytes = m.y_bytes;
  p.row_tiles = static_cast<int>(ceil_div(p.rows, t.rows));
  p.column_tiles = static_cast<int>(ceil_div(p.columns, t.columns));
  const int ring = t.stages * t.stage_bytes(), sums = (t.slices() - 1) * t.rows * t.columns * 4;
  const int tables = 2 * 8 * (last ? t.rows : t.columns);  // where each pixel of the block lies in x and y
  p.shared_bytes = tables + std::max(ring, sums);
  return p;
}

}  // namespace cmx
