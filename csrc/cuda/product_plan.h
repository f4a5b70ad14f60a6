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
  double reached;  // of the predicted speed, measured on an H200: latencies that product_cost.h leaves out
  constexpr int warps() const { return rows / warp_rows * (columns / warp_columns); }
  constexpr int slices() const { return 4 / warps(); }
  constexpr int stage_bytes() const { return 2 * depth * (rows + columns); }
  constexpr bool has_statistics() const { return columns >= 64; }                   // which read panels of 64 columns
  constexpr int parts_of_rows() const { return has_statistics() ? rows / 64 : 0; }  // of statistics of 64 pixels each
};

inline constexpr int kProductThreads = 128;
inline constexpr ProductTile kProductTiles[] = {
    {128, 128, 32, 64, 64, 3, 2, 0.42},
    {64, 64, 64, 64, 32, 3, 3, 0.55},
    {64, 32, 64, 64, 32, 4, 3, 0.5},
};
inline constexpr int kProductTileCount = 3, kProductGatherTile = 1;  // a gather has this tile alone
inline constexpr int kEveryProduct = -1;                             // to choose among, and not one of them

// What becomes of the sums: y of inference; y and its moments; y and sums beside another tensor
enum class ProductUse : int { inference, moments, sums };

struct ProductPlan {
  int tile;
  ProductLayout layout;
  int rows, columns, k;           // of D, and how many products a number of it sums
  int row_tiles, column_tiles;    // blocks = their product; 0: not for this kernel
  int a_bytes, b_bytes, y_bytes;  // of one access
  int shared_bytes;
  int blocks() const { return row_tiles * column_tiles; }
  // Of statistics: a tile whose columns are pixels is one part
  int parts() const {
    return layout == ProductLayout::channels_last ? row_tiles * kProductTiles[tile].parts_of_rows() : column_tiles;
  }
};

// What a plan needs to know of memory
struct ProductMemory {
  ProductLayout layout;
  int weight_bytes, x_bytes, y_bytes;  // of one access
  const char* why_no_tiles;            // why TMA cannot copy tiles of x, the weight and y; null where it can
};

// A tensor as TMA wants it: the first dimension without gaps, strides of the others in bytes, each a multiple of the one before
struct TensorView {
  int64_t size[3], stride[2];
  bool
      images_second;  // [C, N, H, W] in memory, as training has it: images are the second dimension, and rows the third
};

inline TensorView tensor_view(const ProductShape& s, ProductLayout layout, int64_t channels, const Strides& strides) {
  const bool last = layout == ProductLayout::channels_last;
  const int64_t inner = last ? channels : s.plane(), outer = last ? s.plane() : channels;
  const int64_t step = outer == 1 ? inner : last ? strides.w : strides.c;
  const int64_t image = s.n == 1 ? outer * step : strides.n;
  if (image < step) return {{inner, s.n, outer}, {2 * image, 2 * step}, true};
  return {{inner, outer, s.n}, {2 * step, 2 * image}, false};
}

inline bool is_nested(const TensorView& v) {
  return v.stride[0] >= 2 * v.size[0] && v.stride[1] >= v.size[1] * v.stride[0] && v.stride[1] % v.stride[0] == 0 &&
         v.stride[1] >> 40 == 0;
}

inline const char* why_no_tiles(const ProductShape& s, const ProductMemory& m, const Strides& xs, const Strides& ys) {
  if (m.layout == ProductLayout::gather) return "patches, or pixels that TMA would have to gather";
  if (s.k() == 0) return "no input channels";
  if (m.weight_bytes != 16 || m.x_bytes != 16 || m.y_bytes != 16)
    return m.layout == ProductLayout::pixels ? "addresses, planes or c_in are not multiples of 16 bytes"
                                             : "addresses, c_in or c_out are not multiples of 16 bytes";
  for (const TensorView& v : {tensor_view(s, m.layout, s.c_in, xs), tensor_view(s, m.layout, s.c_out, ys)})
    if (!is_nested(v)) return "strides that overlap, are no multiples of each other, or reach 2^40 bytes";
  return nullptr;
}

// Of x as training hands it to a product: [C, N, H, W] in memory, so that torch's product sees one matrix (training_products.py)
inline Strides channels_first(int64_t n, int64_t h, int64_t w) { return {h * w, n * h * w, w, 1}; }

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
    const bool one = plane == 1;  // without a neighbour, at whatever distance
    m.x_bytes = access_bytes(x, {xs.n, one ? 0 : xs.w, s.k()}, element);
    m.y_bytes = access_bytes(y, {ys.n, one ? 0 : ys.w, s.c_out}, element);
  } else if (!patches && linear && xs.w == 1 && x_planes >= 4) {
    m.layout = ProductLayout::pixels, m.x_bytes = x_planes, m.y_bytes = y_planes;
  } else {
    m.layout = ProductLayout::gather, m.x_bytes = static_cast<int>(element), m.y_bytes = y_planes;
  }
  m.why_no_tiles = why_no_tiles(s, m, xs, ys);
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

// ---- patches unfolded beforehand to rows of 16 bytes: unfold.cu

// The product that is left, whose patches are 1x1
inline ProductShape unfolded(ProductShape s) {
  s.c_in = static_cast<int>(round_up(s.k(), 8)), s.ph = s.pw = 1;
  return s;
}

inline bool is_last(const Strides& s) { return s.c == 1 && s.w != 1; }

// A block takes `columns` patches of a row of patches: the rows (c, a) of their pixels meet in shared memory.
struct UnfoldPlan {
  static constexpr int kThreads = 256, kShared = 48 << 10;
  static constexpr int kLeast = 8;  // columns that are not divided

  int columns, tiles;  // tiles: of a row of patches
  int pitch;           // of a row in shared memory, in numbers: 16 bytes more than whole rounds of its banks
  bool vector_loads;   // by 16 bytes
  int each;            // numbers of a store: 8, or 1
  int blocks;          // 0: not for this kernel
  int shared_bytes;
};

// `from`, `strides`: of the image. `last`: patches become channels_last
inline UnfoldPlan unfold_plan(const ProductShape& s, const void* from, const Strides& strides, bool last,
                              const Gpu& gpu) {
  UnfoldPlan p{};
  const int64_t rows = int64_t(s.c_in) * s.ph;
  const auto set = [&](int64_t columns) {
    p.columns = static_cast<int>(columns), p.tiles = static_cast<int>(ceil_div(s.w, columns));
    p.pitch = static_cast<int>(round_up(columns * s.pw - 8, 64) + 8);
  };
  const auto blocks = [&] { return int64_t(s.n) * s.h * p.tiles; };
  const auto bytes = [&] { return 2 * rows * p.pitch; };
  if (!rows || s.k() > INT32_MAX / 2) return p;
  set(s.w);
  while (p.columns > p.kLeast && (bytes() > p.kShared || blocks() < 2 * gpu.multiprocessors))
    set(round_up(ceil_div(p.columns, 2), p.kLeast));
  if (bytes() > p.kShared || blocks() > INT32_MAX) return UnfoldPlan{};
  p.blocks = static_cast<int>(blocks()), p.shared_bytes = static_cast<int>(bytes());
  p.each = last || s.w % 8 == 0 ? 8 : 1;
  const int64_t begin = p.tiles > 1 ? int64_t(p.columns) * s.pw : 0;
  p.vector_loads =
      strides.w == 1 && access_bytes(from, {strides.n, strides.c, strides.h, int64_t(s.w) * s.pw, begin}, 2) == 16;
  return p;
}

// ---- sm_90a: product_wgmma.cu. As many blocks as multiprocessors take tiles of D in turns, pairs of blocks (clusters) pairs
// of tiles that share their channels.

struct WgmmaPlan {
  static constexpr int kTile = 128, kDepth = 64;  // D's rows and columns, and numbers along k, of a step
  static constexpr int kPanel = 64;               // pixels: a tile has two panels, each in one image
  static constexpr int kStages = 5, kGroups = 2;  // steps in flight; groups of 4 warps that take tiles alternately
  static constexpr int kThreads = 128 * (kGroups + 1);
  static constexpr int kOperandBytes = 2 * kTile * kDepth, kStageBytes = 2 * kOperandBytes,
                       kOutBytes = 2 * kTile * kTile;
  static constexpr int kBarriers = 16 * kStages;
  static constexpr int kShared = 1024 + kStages * kStageBytes + kGroups * kOutBytes + kBarriers;  // 1024: to align

  ProductLayout layout;  // pixels or channels_last
  int image_panels;      // of one image
  int cluster;           // blocks of one, which take as many tiles together: 1 or 2
  int channel_tiles, tiles, steps;
  int parts;   // of statistics: of a tile, or where rows are pixels of each panel
  int blocks;  // 0: not for this kernel
};

inline WgmmaPlan wgmma_plan(const ProductShape& s, const ProductMemory& m, const Gpu& gpu) {
  WgmmaPlan p{};
  if (m.why_no_tiles || gpu.shared_bytes < p.kShared) return p;
  p.layout = m.layout;
  p.image_panels = static_cast<int>(ceil_div(s.plane(), p.kPanel));
  p.channel_tiles = static_cast<int>(ceil_div(s.c_out, p.kTile));
  const int64_t panels = int64_t(s.n) * p.image_panels, pixel_tiles = ceil_div(panels, 2);
  p.parts = static_cast<int>(m.layout == ProductLayout::pixels ? pixel_tiles : panels);
  p.cluster = pixel_tiles > 1 ? 2 : 1;
  const int64_t tiles = round_up(pixel_tiles, p.cluster) * p.channel_tiles;  // the last one may be empty
  if (tiles * ceil_div(s.k(), p.kDepth) > INT32_MAX) return p;               // they are counted in 32 bits
  p.tiles = static_cast<int>(tiles);
  p.steps = static_cast<int>(ceil_div(s.k(), p.kDepth));
  p.blocks = std::max(p.cluster, std::min(p.tiles, gpu.multiprocessors / p.cluster * p.cluster));
  return p;
}

}  // namespace cmx
