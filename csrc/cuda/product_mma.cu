// The matrix product D = A B with an epilogue on tensor cores (mma.sync), bf16 and fp16, straight from NCHW or NHWC.
//
// D's rows are output channels and its columns pixels, all images in a row; for channels_last the other way round, so that
// stores are contiguous along a row either way. A block computes one tile of D (product_plan.h) in steps along k: cp.async
// fills a ring of stages, ldmatrix feeds the warps, sums stay in registers from the bias to the stored result.
//
// An operand lies in shared memory as it lies in global memory: numbers along k in a row of `depth` (A, and B of
// channels_last), or pixels in a row, 64 of them a panel [panel][k][64] (B of planes; ldmatrix transposes it). Rows are 64 or
// 128 bytes; bits 4-6 of a byte address are XORed with bits 7-9, so that 8 rows lie in 8 different groups of banks.
#include "product_statistics.cuh"

namespace cmx {
namespace {

constexpr int LANES = 32;

template <int TILE>
struct Geometry {
  static constexpr ProductTile tile = kProductTiles[TILE];
  static constexpr int ROWS = tile.rows, COLUMNS = tile.columns, DEPTH = tile.depth, STAGES = tile.stages;
  static constexpr int MT = tile.warp_rows / 16, NT = tile.warp_columns / 8, SLICES = tile.slices();
  static constexpr int WARP_COLUMNS = COLUMNS / tile.warp_columns;  // warps side by side
  static constexpr int PANEL = COLUMNS < 64 ? COLUMNS : 64;
  static constexpr int A_BYTES = 2 * ROWS * DEPTH, STAGE_BYTES = tile.stage_bytes();
  static constexpr int WARP_ROW = tile.warp_rows, WARP_COLUMN = tile.warp_columns;
  static constexpr int PARTS = tile.parts_of_rows();  // of statistics; 0: none
  static_assert(DEPTH / 16 % SLICES == 0 && MT % SLICES == 0 && NT % 4 == 0 &&
                tile.warps() * SLICES * LANES == kProductThreads);
};

// BYTES of global memory to shared memory, zeros where !inside
template <int BYTES>
__device__ __forceinline__ void copy(unsigned char* to, const void* from, bool inside) {
  if constexpr (BYTES >= 4)
    copy_async<BYTES>(to, from, inside);
  else
    put<uint16_t>(to, inside ? get<uint16_t>(from) : uint16_t(0));
}

// An operand whose rows lie along k: [ROWS][DEPTH], row r at base + offset(r), negative where there is no such row
template <class T, int ROWS, int DEPTH>
struct RowLoader {
  static constexpr int CHUNKS = DEPTH / 8, STEP = kProductThreads / CHUNKS, COUNT = ROWS / STEP;
  const T* base;
  int64_t offset[COUNT];
  int chunk, row, k_end;

  template <class Offset>
  __device__ __forceinline__ RowLoader(const void* from, int k, int thread, const Offset& offset_of)
      : base(static_cast<const T*>(from)), chunk(thread % CHUNKS), row(thread / CHUNKS), k_end(k) {
#pragma unroll
    for (int i = 0; i < COUNT; ++i) offset[i] = offset_of(row + i * STEP);
  }

  template <int BYTES>
  __device__ __forceinline__ void load(unsigned char* shared, int k0) const {
    const int k = k0 + 8 * chunk;
#pragma unroll
    for (int i = 0; i < COUNT; ++i) {
      unsigned char* const to = shared + swizzled((row + i * STEP) * DEPTH * 2 + chunk * 16);
#pragma unroll
      for (int b = 0; b < 16; b += BYTES) {
        const bool inside = offset[i] >= 0 && k + b / 2 < k_end;  // k_end is a multiple of a piece
        copy<BYTES>(to + b, inside ? base + offset[i] + k + b / 2 : base, inside);
      }
    }
  }

  __device__ __forceinline__ void load(unsigned char* shared, int k0, int bytes) const {
    switch (bytes) {
      case 16: return load<16>(shared, k0);
      case 8: return load<8>(shared, k0);
      case 4: return load<4>(shared, k0);
      default: return load<2>(shared, k0);
    }
  }
};

// B as planes of pixels: [panel][DEPTH][PANEL]; pixel j lies at base + c * stride + table[j], negative beyond the last
template <class T, class G>
struct PixelLoader {
  static constexpr int CHUNKS = G::COLUMNS / 8, STEP = kProductThreads / CHUNKS, COUNT = G::DEPTH / STEP;
  const T* base;
  const int64_t* table;
  int64_t stride;
  int chunk, row, k_end;

  __device__ __forceinline__ PixelLoader(const ProductForward& p, const int64_t* offsets, int thread)
      : base(static_cast<const T*>(p.x)),
        table(offsets + thread % CHUNKS * 8),
        stride(p.x_stride.c),
        chunk(thread % CHUNKS),
        row(thread / CHUNKS),
        k_end(p.shape.c_in) {}

  template <int BYTES>
  __device__ __forceinline__ void load(unsigned char* shared, int k0) const {
    const int in_panel = chunk % (G::PANEL / 8), panel = chunk / (G::PANEL / 8);
#pragma unroll
    for (int b = 0; b < 16; b += BYTES) {
      const int64_t offset = table[b / 2];
#pragma unroll
      for (int i = 0; i < COUNT; ++i) {
        const int r = row + i * STEP;
        const bool inside = offset >= 0 && k0 + r < k_end;
        copy<BYTES>(shared + swizzled((panel * G::DEPTH + r) * G::PANEL * 2 + in_panel * 16) + b,
                    inside ? base + (k0 + r) * stride + offset : base, inside);
      }
    }
  }

  __device__ __forceinline__ void load(unsigned char* shared, int k0, int bytes) const {
    switch (bytes) {
      case 16: return load<16>(shared, k0);
      case 8: return load<8>(shared, k0);
      default: return load<4>(shared, k0);
    }
  }
};

// The same number by number: patches, and any strides. A thread has one column; its warp shares the rows' addresses.
template <class T, class G>
struct GatherLoader {
  static constexpr int STEP = kProductThreads / G::COLUMNS, COUNT = G::DEPTH / STEP;
  static_assert(COUNT <= LANES && G::COLUMNS % LANES == 0);
  const ProductForward& p;
  int k_end;
  int64_t offset;  // of the column
  int column, row, lane;

  __device__ __forceinline__ GatherLoader(const ProductForward& given, int k, const int64_t* table, int thread)
      : p(given),
        k_end(k),
        offset(table[thread % G::COLUMNS]),
        column(thread % G::COLUMNS),
        row(thread / G::COLUMNS),
        lane(thread % LANES) {}

  __device__ __forceinline__ void load(unsigned char* shared, int k0, int) const {
    const ProductShape& s = p.shape;
    const int mine = k0 + row + lane * STEP, c = mine / (s.ph * s.pw);
    const int in_patch = mine - c * (s.ph * s.pw), a = in_patch / s.pw, b = in_patch - a * s.pw;
    const int64_t row_offset = c * p.x_stride.c + a * p.x_stride.h + b * p.x_stride.w;
    const T* const base = static_cast<const T*>(p.x) + offset;
    unsigned char* const to = shared + column / G::PANEL * (G::DEPTH * G::PANEL * 2);
#pragma unroll 8
    for (int i = 0; i < COUNT; ++i) {
      const int r = row + i * STEP;
      const int64_t from = __shfl_sync(~0u, row_offset, i);
      copy<2>(to + swizzled(r * G::PANEL * 2 + column % G::PANEL * 2), base + from, offset >= 0 && k0 + r < k_end);
    }
  }
};

// Lane t of four has words 0-3 of row t; then it has word t of rows 0-3.
__device__ __forceinline__ void transpose_over_four_lanes(uint32_t (&w)[4], int lane) {
#pragma unroll
  for (int bit = 1; bit <= 2; bit *= 2) {
    const bool upper = lane & bit;
    const int low[2] = {0, bit == 1 ? 2 : 1};
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      uint32_t &below = w[low[i]], &above = w[low[i] + bit];
      const uint32_t other = __shfl_xor_sync(~0u, upper ? below : above, bit);
      (upper ? below : above) = other;
    }
  }
}

template <class T, int LAYOUT, int TILE>
__global__ void __launch_bounds__(kProductThreads, kProductTiles[TILE].blocks_per_sm)
    product_mma_kernel(const __grid_constant__ ProductForward p, const __grid_constant__ ProductPlan plan) {
  using G = Geometry<TILE>;
  constexpr bool LAST = LAYOUT == static_cast<int>(ProductLayout::channels_last);
  constexpr int MT = G::MT, NT = G::NT, PIXELS = LAST ? G::ROWS : G::COLUMNS;
  CMX_DYNAMIC_SHARED(shared);
  const ProductShape& s = p.shape;
  const int thread = threadIdx.x, lane = thread % LANES, warp = thread / LANES;
  const int slice = warp % G::SLICES, row_of_warp = warp / G::SLICES / G::WARP_COLUMNS * G::WARP_ROW,
            column_of_warp = warp / G::SLICES % G::WARP_COLUMNS * G::WARP_COLUMN;
  // blocks that share pixels run side by side: x is read once, the weight stays in L2
  const int channel_tiles = LAST ? plan.column_tiles : plan.row_tiles;
  const int channel_tile = blockIdx.x % channel_tiles, pixel_tile = blockIdx.x / channel_tiles;
  const int first_row = (LAST ? pixel_tile : channel_tile) * G::ROWS;
  const int first_column = (LAST ? channel_tile : pixel_tile) * G::COLUMNS;
  const int k_end = plan.k;

  int64_t* const x_table = reinterpret_cast<int64_t*>(shared);  // where this block's pixels lie in x and in y
  int64_t* const y_table = x_table + PIXELS;
  unsigned char* const ring = reinterpret_cast<unsigned char*>(y_table + PIXELS);
  const int plane = s.h * s.w, pixels = LAST ? plan.rows : plan.columns;
  for (int i = thread; i < PIXELS; i += kProductThreads) {
    const int pixel = pixel_tile * PIXELS + i, n = pixel / plane, rest = pixel - n * plane, y = rest / s.w,
              x = rest - y * s.w;
    x_table[i] = pixel >= pixels ? -1 : n * p.x_stride.n + y * s.ph * p.x_stride.h + x * s.pw * p.x_stride.w;
    y_table[i] = pixel >= pixels ? -1 : n * p.y_stride.n + rest * p.y_stride.w;
  }
  begin_chained();
  __syncthreads();

  const auto weight_row = [&](int first, int count) {
    return [=](int r) { return first + r < count ? (first + r) * int64_t(k_end) : int64_t(-1); };
  };
  const auto load_a = [&] {
    if constexpr (LAST)
      return RowLoader<T, G::ROWS, G::DEPTH>(p.x, k_end, thread, [&](int r) { return x_table[r]; });
    else
      return RowLoader<T, G::ROWS, G::DEPTH>(p.weight, k_end, thread, weight_row(first_row, plan.rows));
  }();
  const auto load_b = [&] {
    if constexpr (LAST)
      return RowLoader<T, G::COLUMNS, G::DEPTH>(p.weight, k_end, thread, weight_row(first_column, plan.columns));
    else if constexpr (LAYOUT == static_cast<int>(ProductLayout::pixels))
      return PixelLoader<T, G>(p, x_table, thread);
    else
      return GatherLoader<T, G>(p, k_end, x_table, thread);
  }();
  const int steps = (k_end + G::DEPTH - 1) / G::DEPTH;
  const auto load = [&](int step, int stage) {
    unsigned char* const to = ring + stage * G::STAGE_BYTES;
    if (step < steps) {
      load_a.load(to, step * G::DEPTH, plan.a_bytes);
      load_b.load(to + G::A_BYTES, step * G::DEPTH, plan.b_bytes);
    }
    commit_copies();
  };
  for (int i = 0; i < G::STAGES - 1; ++i) load(i, i);

  // A lane holds rows lane / 4 and + 8 of each 16 rows. Its columns: 2 (lane % 4) and + 1 of each 8 columns; where B's rows
  // lie along k they can be picked, so that four such pairs are 8 columns in a row: 8 (lane % 4) + 2 j and + 1.
  const auto channel = [&](int i, int half, int j, int e) {
    return LAST ? first_column + column_of_warp + j / 4 * 32 + lane % 4 * 8 + j % 4 * 2 + e
                : first_row + row_of_warp + i * 16 + half * 8 + lane / 4;
  };
  const auto constant = [&](const float* v, float missing, int c) { return v && c < s.c_out ? v[c] : missing; };
  float acc[MT][NT][4];
#pragma unroll
  for (int i = 0; i < MT; ++i)
#pragma unroll
    for (int j = 0; j < NT; ++j)
#pragma unroll
      for (int e = 0; e < 4; ++e) acc[i][j][e] = slice == 0 ? constant(p.bias, 0.f, channel(i, e / 2, j, e % 2)) : 0.f;

  // ldmatrix: the row of A, and of B, that this lane brings
  const int a_row = row_of_warp + lane % 16, a_half = lane / 16;
  const int pick = lane % 8 / 2 * 8 + lane % 2, b_half = LAST ? lane / 8 % 2 : lane % 16, b_tile = lane / 16;
  const uint32_t ring_address = shared_address(ring);
  int stage = 0;
#pragma unroll 1
  for (int step = 0; step < steps; ++step) {
    wait_for_copies<G::STAGES - 2>();
    __syncthreads();  // the copies of all threads have arrived, and the stage before this one is free
    load(step + G::STAGES - 1, stage == 0 ? G::STAGES - 1 : stage - 1);
    const uint32_t a_tile = ring_address + stage * G::STAGE_BYTES, b_panels = a_tile + G::A_BYTES;
#pragma unroll
    for (int kk = 0; kk < G::DEPTH / 16 / G::SLICES; ++kk) {
      const int k16 = kk * G::SLICES + slice;
      uint32_t a[MT][4], b[NT / 2][4];
#pragma unroll
      for (int i = 0; i < MT; ++i)
        load_matrices(a[i], a_tile + swizzled((a_row + 16 * i) * G::DEPTH * 2 + (2 * k16 + a_half) * 16));
#pragma unroll
      for (int j = 0; j < NT / 2; ++j) {
        if constexpr (LAST) {
          const int row = column_of_warp + j / 2 * 32 + j % 2 * 4 + b_tile * 2 + pick;
          load_matrices(b[j], b_panels + swizzled(row * G::DEPTH * 2 + (2 * k16 + b_half) * 16));
        } else {
          const int column = column_of_warp + (2 * j + b_tile) * 8, panel = column / G::PANEL;
          load_matrices<true>(
              b[j], b_panels + swizzled((panel * G::DEPTH + k16 * 16 + b_half) * G::PANEL * 2 + column % G::PANEL * 2));
        }
      }
#pragma unroll
      for (int i = 0; i < MT; ++i)
#pragma unroll
        for (int j = 0; j < NT; ++j) multiply_k16<T>(acc[i][j], a[i], b[j / 2] + j % 2 * 2, acc[i][j]);
    }
    stage = stage + 1 == G::STAGES ? 0 : stage + 1;
  }
  wait_for_copies<0>();

  // Slices: each sums its part of the 16-row tiles over all slices, in their order
  constexpr int MINE = MT / G::SLICES;
  float sum[MINE][NT][4];
  if constexpr (G::SLICES == 1) {
    memcpy(sum, acc, sizeof sum);
  } else {
    __syncthreads();  // the ring is free
    // [tile of the block][16-row tile][slice that gives][element][lane]; none gives to itself
    float* const sums =
        reinterpret_cast<float*>(ring) + (warp / G::SLICES * MT * (G::SLICES - 1)) * (NT * 4 * LANES) + lane;
#pragma unroll
    for (int i = 0; i < MT; ++i) {
      const int owner = i / MINE;
      if (owner == slice) continue;
#pragma unroll
      for (int j = 0; j < NT * 4; ++j)
        sums[(i * (G::SLICES - 1) + slice - (slice > owner)) * (NT * 4 * LANES) + j * LANES] = acc[i][j / 4][j % 4];
    }
    __syncthreads();
#pragma unroll
    for (int i = 0; i < MT; ++i) {
      if (i / MINE != slice) continue;
#pragma unroll
      for (int j = 0; j < NT * 4; ++j) {
        float total = 0.f;
#pragma unroll
        for (int from = 0; from < G::SLICES; ++from)
          total += from == slice ? acc[i][j / 4][j % 4]
                                 : sums[(i * (G::SLICES - 1) + from - (from > slice)) * (NT * 4 * LANES) + j * LANES];
        sum[i % MINE][j / 4][j % 4] = total;
      }
    }
  }

  const bool training = G::PARTS && p.partials;
  activate<T, MINE * NT * 4>(&sum[0][0][0], training ? Act::none : p.act);

  T* const y = static_cast<T*>(p.y);
  const int own_row = slice * MINE * 16;
  const auto address = [&](const void* base, int row, int column) -> T* {  // in y, or as in y; null outside
    T* const at = const_cast<T*>(static_cast<const T*>(base));
    if constexpr (LAST)
      return y_table[row] < 0 || first_column + column >= plan.columns ? nullptr
                                                                       : at + y_table[row] + first_column + column;
    else
      return y_table[column] < 0 || first_row + row >= plan.rows
                 ? nullptr
                 : at + (first_row + row) * p.y_stride.c + y_table[column];
  };
  if (training) __syncthreads();  // the ring has been read: y takes its place
#pragma unroll
  for (int q = 0; q < NT / 4; ++q) {
    const int in_block = column_of_warp + q * 32 + lane % 4 * 8;  // this lane's 8 columns, in the end
#pragma unroll
    for (int i = 0; i < MINE; ++i) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        uint32_t words[4];
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          float v[2];
#pragma unroll
          for (int e = 0; e < 2; ++e) {
            const int c = channel(i, half, 4 * q + j, e) + (LAST ? 0 : own_row);
            v[e] = fmaf(sum[i][4 * q + j][2 * half + e], constant(p.scale, 1.f, c), constant(p.shift, 0.f, c));
          }
          words[j] = pack<T>(v[0], v[1]);
        }
        if (!LAST) transpose_over_four_lanes(words, lane);
        const int row = row_of_warp + own_row + i * 16 + half * 8 + lane / 4;
        if (training)
          put(ring + in_block / 64 * (G::ROWS * 128) + swizzled(row * 128 + in_block % 64 * 2),
              make_uint4(words[0], words[1], words[2], words[3]));
        if (plan.y_bytes == 16) {
          if (T* const to = address(y, row, in_block)) put(to, make_uint4(words[0], words[1], words[2], words[3]));
        } else {
#pragma unroll 1
          for (int c = 0; c < 8; c += plan.y_bytes / 2) {
            T* const to = address(y, row, in_block + c);
            const uint32_t word = c < 4 ? (c < 2 ? words[0] : words[1]) : (c < 6 ? words[2] : words[3]);
            if (!to) continue;
            if (plan.y_bytes == 8)
              put(to, c ? make_uint2(words[2], words[3]) : make_uint2(words[0], words[1]));
            else if (plan.y_bytes == 4)
              put(to, word);
            else
              put(to, static_cast<uint16_t>(word >> 16 * (c % 2)));
          }
        }
      }
    }
  }

  if constexpr (G::PARTS > 0) {
    constexpr int PANELS = G::COLUMNS / 64;
    if (!training) return;
    __syncthreads();  // y is in the ring
    const auto like = [&](int row, int column) {
      uint4 words = make_uint4(0, 0, 0, 0);
      if (plan.y_bytes == 16) {
        if (const T* const from = address(p.like, row, column)) words = get<uint4>(from);
      } else {
        uint16_t number[8];
#pragma unroll
        for (int e = 0; e < 8; ++e) {
          const T* const from = address(p.like, row, column + e);
          number[e] = from ? get<uint16_t>(from) : uint16_t(0);
        }
        memcpy(&words, number, 16);
      }
      return words;
    };
    if constexpr (LAST) {
      constexpr int CHUNKS = 2 * PANELS * G::PARTS;  // of the 8 of a panel
      const int chunk = warp * CHUNKS % (8 * PANELS), panel = chunk / 8, piece = warp * CHUNKS / (8 * PANELS);
      statistics_of_columns<T, CHUNKS>(
          p, ring + panel * (G::ROWS * 128), piece * 64, chunk % 8, first_column + chunk * 8,
          int64_t(pixel_tile) * G::PARTS + piece, lane, [&](int r) { return y_table[piece * 64 + r] >= 0; },
          [&](int r, int in_panel) { return like(piece * 64 + r, panel * 64 + in_panel * 8); });
    } else {
      constexpr int ROWS = G::ROWS / 4;
      const int row = warp * ROWS;
      const auto count = [&](int panel, int chunk) {
        const int left = plan.columns - first_column - panel * 64 - chunk * 8;
        return left < 0 ? 0 : left < 8 ? left : 8;
      };
      statistics_of_rows<T, ROWS, PANELS>(
          p, ring, G::ROWS * 128, row, first_row + row, pixel_tile, lane, count,
          [&](int r, int panel, int chunk) { return like(row + r, panel * 64 + chunk * 8); });
    }
  }
}

template <class T, int LAYOUT, int TILE>
cudaError_t launch_kernel(const ProductForward& p, const ProductPlan& plan, cudaStream_t stream) {
  const auto kernel = product_mma_kernel<T, LAYOUT, TILE>;
  return launch(kernel, {plan.blocks(), kProductThreads, plan.shared_bytes, stream}, p, plan);
}

template <class T, int LAYOUT>
cudaError_t launch_tile(const ProductForward& p, const ProductPlan& plan, cudaStream_t stream) {
  switch (plan.tile) {
    case 0: return launch_kernel<T, LAYOUT, 0>(p, plan, stream);
    case 1: return launch_kernel<T, LAYOUT, 1>(p, plan, stream);
    case 2: return launch_kernel<T, LAYOUT, 2>(p, plan, stream);
    default: return cudaErrorInvalidValue;
  }
}

template <class T>
cudaError_t launch_layout(const ProductForward& p, const ProductPlan& plan, cudaStream_t stream) {
  switch (plan.layout) {
    case ProductLayout::pixels: return launch_tile<T, 0>(p, plan, stream);
    case ProductLayout::channels_last: return launch_tile<T, 1>(p, plan, stream);
    case ProductLayout::gather: return launch_kernel<T, 2, kProductGatherTile>(p, plan, stream);
  }
  return cudaErrorInvalidValue;
}

}  // namespace

cudaError_t product_fwd_mma(const ProductForward& p, const ProductPlan& plan, cudaStream_t stream) {
  if (plan.blocks() < 1 || (p.partials && !kProductTiles[plan.tile].has_statistics())) return cudaErrorInvalidValue;
  return p.shape.dtype == Dtype::bfloat16 ? launch_layout<bf16>(p, plan, stream) : launch_layout<fp16>(p, plan, stream);
}

}  // namespace cmx
