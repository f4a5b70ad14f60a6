// Depthwise convolution as products of small matrices: what the tensor-core kernels share.
//
// Eight neighbouring outputs of a row need `window` blocks of 8 input columns. For one filter row ky and one block b,
//   out[y][x0 + n] += sum over k of  in[y + ky][8 b + k] * T[k][n],    T[k][n] = weight[ky][8 b + k - n - LEFT + before]
// where LEFT = 4 (window - 1) is how far the window starts left of x0, `before` the columns of padding, and a weight that
// is not there is zero: T is a banded Toeplitz matrix. An m16n8k16 product takes 16 output rows, and one block of two
// consecutive filter rows.
//
// The 16 rows are S(m) = 4 (m / 2) + m % 2; the tile's other rows are S(m) + 2. So the pair of input rows q, q + 1 below
// S(m) serves the first set for ky = q and the second for ky = q - 2: every ldmatrix is used twice per column of tiles.
// In shared memory the rows with r % 4 in {0, 1} lie in one half-plane and {2, 3} in the other, at a pitch of an odd
// number of 16-byte blocks: ldmatrix, the stores of results and the reads of rows are free of bank conflicts.
#pragma once

#include "depthwise.h"
#include "moments.cuh"

namespace cmx {

constexpr unsigned ALL_LANES = 0xffffffffu;

// Row r of a tile -> bytes from its start
__device__ __forceinline__ constexpr int row_offset(int r, int half_plane, int pitch) {
  return (r >> 1 & 1) * half_plane + (2 * (r >> 2) + (r & 1)) * pitch;
}

// S(m) for tiles of 32 rows; where a tile is two images of 16 rows, m / 8 is the image
template <int IMAGES>
__device__ __forceinline__ constexpr int row_of(int m) {
  if (IMAGES == 2) m &= 7;
  return 4 * (m >> 1) + (m & 1);
}

template <class T>
__device__ __forceinline__ uint32_t bits_or_zero(const T* number, bool inside) {
  return inside ? get<uint16_t>(number) : 0u;
}

// This lane's two numbers of T in block `b` are of the taps kx and kx + 1: k = 2 (lane % 4) and the next, n = lane / 4.
template <int WINDOW>
__device__ __forceinline__ int first_tap(int b, int before, int lane) {
  return 8 * b + 2 * (lane % 4) - lane / 4 - 4 * (WINDOW - 1) + before;
}

// Those of the filter row `row`
template <class T, int WINDOW>
__device__ __forceinline__ uint32_t toeplitz(const T* row, bool row_inside, int b, int kw, int lane) {
  const int kx = first_tap<WINDOW>(b, (kw - 1) / 2, lane);
  const auto bits = [&](int tap) { return bits_or_zero(row + tap, row_inside && tap >= 0 && tap < kw); };
  return bits(kx) | bits(kx + 1) << 16;
}

// The same of the matrix that picks the columns of the outputs themselves: T[k][n] = (8 b + k == n + offset)
template <class T>
__device__ __forceinline__ uint32_t identity(int b, int offset, int lane) {
  constexpr uint32_t one = is_bf16<T> ? 0x3f80u : 0x3c00u;
  const int k = 8 * b + 2 * (lane % 4), wanted = lane / 4 + offset;
  return (k == wanted ? one : 0u) | (k + 1 == wanted ? one << 16 : 0u);
}

// A tile of NT column tiles of 8 outputs, under windows of WINDOW blocks: 32 x 32, or two images of 16 x 16
template <int COLUMN_TILES, int BLOCKS_OF_A_WINDOW>
struct Tile {
  static constexpr int NT = COLUMN_TILES, WINDOW = BLOCKS_OF_A_WINDOW;
  static constexpr int ROWS = 8 * NT, IMAGES = 32 / ROWS, LEFT = 4 * (WINDOW - 1);
  static constexpr int BLOCKS = NT + WINDOW - 1, PITCH = (BLOCKS | 1) * 16;
  static constexpr int OWN_PITCH = (NT | 1) * 16;     // of a tile without the columns around it
  static constexpr int RESULT_PITCH = (NT + 1) * 32;  // of results in float32
  static constexpr int FOUR_ROWS = 2 * PITCH;         // bytes from a row to the fourth below it, in the same half-plane
  // the blocks that hold the outputs' own columns start at block LEFT / 8, column LEFT % 8 of it
  static constexpr int OWN = LEFT / 8, OFFSET = LEFT % 8;
};

struct Where {
  int n, y, x;  // first image, first output row and column
};

__device__ __forceinline__ Where where(int unit, const MmaPlan& plan, int images, int rows, int columns) {
  if (plan.tiles_x == 1 && plan.tiles_y == 1) return {unit * images, 0, 0};  // divisions take 20 instructions each
  const int row_of_tiles = unit / plan.tiles_x, group = row_of_tiles / plan.tiles_y;
  return {group * images, (row_of_tiles - group * plan.tiles_y) * rows, (unit - row_of_tiles * plan.tiles_x) * columns};
}

// run<BYTES>() of the bytes of one access
template <class F>
__device__ __forceinline__ void with_bytes(int bytes, const F& run) {
  switch (bytes) {
    case 16: return run.template operator()<16>();
    case 8: return run.template operator()<8>();
    case 4: return run.template operator()<4>();
    default: return run.template operator()<2>();
  }
}

// Calls f(shared address, image, row, column) for this lane's blocks of 8 columns: 4 rows x 8 blocks at a time
template <class G, class F>
__device__ __forceinline__ void each_block(unsigned char* stage, const Where& at, const DepthwiseShape& s,
                                           const MmaPlan& plan, int lane, const F& f) {
  const int block = lane % 8, x = at.x - G::LEFT + 8 * block;
  if (block >= G::BLOCKS) return;
#pragma unroll 1  // the code is already long
  for (int image = 0; image < G::IMAGES; ++image) {
    unsigned char* to =
        stage + image * 2 * plan.half_plane + row_offset(lane / 8, plan.half_plane, G::PITCH) + 16 * block;
#pragma unroll 2
    for (int r = lane / 8; r < plan.rows; r += 4, to += G::FOUR_ROWS) f(to, at.n + image, at.y + r - (s.kh - 1) / 2, x);
  }
}

// Calls f(shared address, image, row, column) for this lane's blocks of 8 results
template <class G, class F>
__device__ __forceinline__ void each_result(const unsigned char* tile, const Where& at, const DepthwiseShape& s,
                                            const MmaPlan& plan, int lane, const F& f) {
  constexpr int NT = G::NT;
#pragma unroll
  for (int i = 0; i < G::IMAGES; ++i) {
    const unsigned char* from = tile + i * 2 * plan.half_plane +
                                row_offset(lane / NT + (s.kh - 1) / 2, plan.half_plane, G::PITCH) + lane % NT * 16;
#pragma unroll 2
    for (int r = lane / NT; r < G::ROWS; r += 32 / NT, from += 8 / NT * G::FOUR_ROWS)
      if (at.n + i < s.n && at.y + r < s.h) f(from, at.n + i, at.y + r, at.x + lane % NT * 8);
  }
}

// The filter [kh][kw] of a channel -> Toeplitz fragments [pair of filter rows][block][lane], by all warps of a block.
// TURNED by 180 degrees and padded as the gradient of the input is.
template <class T, int WINDOW, bool TURNED>
__device__ __forceinline__ void expand_filter(uint2* filter, const T* weight, int kh, int kw, int warp, int warps,
                                              int lane) {
  constexpr int NEXT = TURNED ? -1 : 1;  // from a tap to the next
  const T* const first = TURNED ? weight + kh * kw - 1 : weight;
#pragma unroll 1
  for (int b = 0; b < WINDOW; ++b) {
    const int kx = first_tap<WINDOW>(b, TURNED ? kw / 2 : (kw - 1) / 2, lane);
    const bool one = kx >= 0 && kx < kw, other = kx + 1 >= 0 && kx + 1 < kw;
#pragma unroll 4
    for (int pair = warp; 2 * pair < kh; pair += warps) {
      const T* const tap = first + NEXT * (2 * pair * kw + kx);
      const T* const below = tap + NEXT * kw;
      const bool two = 2 * pair + 1 < kh;
      filter[(pair * WINDOW + b) * 32 + lane] =
          make_uint2(bits_or_zero(tap, one) | bits_or_zero(tap + NEXT, other) << 16,
                     bits_or_zero(below, one && two) | bits_or_zero(below + NEXT, other && two) << 16);
    }
  }
}

// acc[set][column tile] += the convolution at rows S(m) and S(m) + 2 of COUNT column tiles, the first one's window at shared
// address `tile`, with the pairs of filter rows first .. end - 1, of which there is one.
// pair_at: from there to the rows of the first and the second pair that this lane brings to ldmatrix.
template <class T, class G, int COUNT>
__device__ __forceinline__ void convolve(float (&acc)[2][COUNT][4], uint32_t tile, const int (&pair_at)[2],
                                         const uint2* filter, int first, int end, int lane) {
  constexpr int WINDOW = G::WINDOW;
  uint32_t now[WINDOW][2], earlier[WINDOW][2];  // fragments of filter rows 2 pair, 2 pair + 1, and of the two before
  const auto multiply_pair = [&](int pair, bool first_rows, bool other_rows) {
    if (first_rows) {
#pragma unroll
      for (int b = 0; b < WINDOW; ++b) {
        const uint2 rows = filter[(pair * WINDOW + b) * 32 + lane];
        now[b][0] = rows.x, now[b][1] = rows.y;
      }
    }
    const uint32_t from = tile + (pair & 1 ? pair_at[1] : pair_at[0]) + (pair >> 1) * 2 * G::PITCH;
#pragma unroll
    for (int block = 0; block < COUNT + WINDOW - 1; ++block) {
      uint32_t in[4];
      load_matrices(in, from + 16 * block);
#pragma unroll
      for (int i = 0; i < COUNT; ++i) {
        const int b = block - i;
        if (b < 0 || b >= WINDOW) continue;
        if (first_rows) multiply_k16<T>(acc[0][i], in, now[b], acc[0][i]);
        if (other_rows) multiply_k16<T>(acc[1][i], in, earlier[b], acc[1][i]);
      }
    }
#pragma unroll
    for (int b = 0; b < WINDOW; ++b) earlier[b][0] = now[b][0], earlier[b][1] = now[b][1];
  };
  multiply_pair(first, true, false);
#pragma unroll 1
  for (int pair = first + 1; pair < end; ++pair) multiply_pair(pair, true, true);
  multiply_pair(end, false, true);
}

// Eight outputs to row `to`, columns x .. x + 7, of which those before w exist
template <class T>
__device__ __forceinline__ void store8_words(T* to, int x, int w, const uint4& v, int bytes) {
  if (bytes == 16) {
    if (x < w) put(to + x, v);
    return;
  }
  const uint32_t word[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const int column = x + 2 * i;
    if (bytes == 8) {
      if (i % 2 == 0 && column < w) put(to + column, make_uint2(word[i], word[i + 1]));
    } else if (bytes == 4) {
      if (column < w) put(to + column, word[i]);
    } else {
      if (column < w) put(to + column, static_cast<uint16_t>(word[i]));
      if (column + 1 < w) put(to + column + 1, static_cast<uint16_t>(word[i] >> 16));
    }
  }
}

// v, in a register the compiler cannot rebuild: through a loop it keeps it, where it would compute it again in every turn
template <class V>
__device__ __forceinline__ V kept(V v) {
  return __shfl_sync(ALL_LANES, v, threadIdx.x % 32);
}

// x' of eight numbers in shared memory, of which [from, to) lie in the plane
template <class T>
__device__ __forceinline__ void affine_on_load(void* shared, int from, int to, const InputAffine& affine, Act act) {
  const uint4 words = get<uint4>(shared);
  uint32_t word[4] = {words.x, words.y, words.z, words.w};
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const float2 pair = unpack<T>(word[i]);
    float v[2] = {pair.x, pair.y};
    activate<T, 2>(v, act);
    word[i] = pack<T>(2 * i >= from && 2 * i < to ? affine(v[0]) : 0.f,
                      2 * i + 1 >= from && 2 * i + 1 < to ? affine(v[1]) : 0.f);
  }
  put(shared, make_uint4(word[0], word[1], word[2], word[3]));
}

// x' of a tile, on the blocks that each_block gives to this lane
template <class T, class G>
__device__ __forceinline__ void affine_on_tile(unsigned char* tile, const Where& at, const InputAffine& affine,
                                               const DepthwiseForward& p, const MmaPlan& plan, int lane) {
  const DepthwiseShape& s = p.shape;
  each_block<G>(tile, at, s, plan, lane, [&](unsigned char* to, int n, int y, int x) {
    if (n < s.n && y >= 0 && y < s.h) affine_on_load<T>(to, -x, s.w - x, affine, p.in_act);
  });
}

// Moments of eight outputs as they were stored, of which `valid` exist
template <class T>
__device__ __forceinline__ void add_moments(RunningMoments& moments, const uint4& words, int valid, Act act) {
  float v[8];
  unpack8<T>(v, words);
  activate<float, 8>(v, act);  // the sums are float32
  moments.add<8>(v, valid);
}

// The block of one channel, by a warp, on x' of a tile in shared memory: the results take the place of the rows that their
// residuals come from, column x0 first.
template <class T, class G>
__device__ __forceinline__ void convolve_tile(unsigned char* tile, const uint2* filter, const ChannelConstants& k,
                                              const DepthwiseForward& p, const MmaPlan& plan, int lane) {
  constexpr int NT = G::NT;
  const int pairs = (p.shape.kh + 1) / 2, before = (p.shape.kh - 1) / 2;
  // ldmatrix: lane i brings row i % 16 of the product, of filter row i / 16 of a pair
  const int m = lane % 16, second = lane / 16, image = G::IMAGES == 2 ? m / 8 * 2 * plan.half_plane : 0;
  const auto at_row = [&](int r) { return image + row_offset(row_of<G::IMAGES>(m) + r, plan.half_plane, G::PITCH); };
  const int pair_at[2] = {at_row(second), at_row(second + 2)};
  // results: this lane's rows m = lane / 4 and m + 8 of a product
  const int other = G::IMAGES == 2 ? 2 * plan.half_plane : 8 * G::PITCH;

  const uint32_t tile_address = shared_address(tile);
  float acc[2][NT][4];  // rows S(m), and S(m) + 2
#pragma unroll
  for (int i = 0; i < 2 * NT * 4; ++i) (&acc[0][0][0])[i] = k.bias;

  convolve<T, G>(acc, tile_address, pair_at, filter, 0, pairs, lane);
  if (!p.partials) activate<T, 2 * NT * 4>(&acc[0][0][0], p.act);

#pragma unroll
  for (int i = 0; i < 2 * NT * 4; ++i) (&acc[0][0][0])[i] = fmaf((&acc[0][0][0])[i], k.scale, k.shift);
  if (p.residual) {
    const uint32_t own[2] = {identity<T>(0, G::OFFSET, lane), identity<T>(1, G::OFFSET, lane)};
    constexpr int STEP = G::OFFSET ? 1 : 2;  // two blocks at once: those of a tile, or of two
#pragma unroll
    for (int set = 0; set < 2; ++set)
#pragma unroll
      for (int i = 0; i < NT; i += STEP) {
        uint32_t in[4];
        load_matrices(in, tile_address + at_row(before + 2 * set) + 16 * (G::OWN + i + second));
        if constexpr (G::OFFSET) {
          multiply_k16<T>(acc[set][i], in, own, acc[set][i]);
        } else {
          multiply_k8<T>(acc[set][i], &in[0], own, acc[set][i]);
          multiply_k8<T>(acc[set][i + 1], &in[2], own, acc[set][i + 1]);
        }
      }
  }
  __syncwarp();  // the results take the place of the rows that their residuals come from
#pragma unroll
  for (int set = 0; set < 2; ++set) {
    const int to_row = row_offset(row_of<1>(lane / 4) + before + 2 * set, plan.half_plane, G::PITCH);
#pragma unroll
    for (int i = 0; i < NT; ++i) {
      unsigned char* const to = tile + to_row + 16 * i + 4 * (lane % 4);
      const float* const v = acc[set][i];
      put(to, pack<T>(v[0], v[1]));
      put(to + other, pack<T>(v[2], v[3]));
    }
  }
}

// This warp's part of its channel's moments
__device__ __forceinline__ void store_moments(const RunningMoments& moments, const DepthwiseForward& p, int part, int c,
                                              int lane) {
  if (!p.partials) return;
  const PartMoments all = merge_warp(moments.result());
  if (lane == 0) store_part(p.partials, part, p.shape.c, c, all);
}

template <class Kernel, class Parameters>
cudaError_t launch_mma(Kernel kernel, const Parameters& p, const MmaPlan& plan, cudaStream_t stream) {
  return launch(kernel, {plan.blocks, 32 * plan.warps, plan.shared_bytes, stream}, p, plan);
}

template <class T, int NT, class F>
cudaError_t dispatch_window(const MmaPlan& plan, const F& run) {
  switch (plan.window) {
    case 2: return run.template operator()<T, NT, 2>();
    case 3: return run.template operator()<T, NT, 3>();
    case 4: return run.template operator()<T, NT, 4>();
    case 5: return run.template operator()<T, NT, 5>();
    default: return cudaErrorInvalidValue;
  }
}

// run<T, NT, WINDOW>() of the call's dtype and the plan's tile
template <class F>
cudaError_t dispatch_tile(const DepthwiseForward& p, const MmaPlan& plan, const F& run) {
  if (p.shape.dtype == Dtype::bfloat16)
    return plan.column_tiles == 2 ? dispatch_window<bf16, 2>(plan, run) : dispatch_window<bf16, 4>(plan, run);
  return plan.column_tiles == 2 ? dispatch_window<fp16, 2>(plan, run) : dispatch_window<fp16, 4>(plan, run);
}

}  // namespace cmx
