// Depthwise convolution on the float32 pipes: any dtype, kernel, size and strides.
//
// A block works through tiles of outputs of a few channels: all images of its channels, then the next channels. It brings
// the inputs under a tile, as float32 and with zeros around the plane, into shared memory; then each thread computes a patch
// of 4 rows x 8 columns of one channel:
//   acc[i][j] += weight[ky][kx] * tile[i + ky][j + kx]
// Each of the 4 + kh - 1 input rows adds to every output row that it reaches, from 8 + kw - 1 numbers in registers: 32 FFMA
// for 16 bytes of weights. For widths of 3, 5, 7 and 9 all but the loop over filter rows is unrolled.
#include "depthwise.h"
#include "depthwise_ffma.cuh"
#include "moments.cuh"

namespace cmx {
namespace {

// What a thread brings of its channel's tile: pieces from `column` on, `columns` apart, in `count` rows from `row` on, `rows`
// apart
struct Share {
  int row, rows, count, column, columns, end;
};

// Of the rows from `top` and the columns from `left` on
__device__ __forceinline__ Share share_of(int patch, int patches, int piece, int top, int bottom, int left, int end) {
  const int lanes = (end - left) / piece < patches ? (end - left) / piece : patches;
  const int lane = patch % lanes, row = patch / lanes, rows = patches / lanes;
  return {top + row,           rows,          row < rows ? (bottom - top - row + rows - 1) / rows : 0,
          left + lane * piece, lanes * piece, end};
}

// x' of a channel's tile -> plane [row][pitch], zeros outside of the plane. `x`: row 0, column 0 of the tile
template <class T, int WIDTH>
__device__ __forceinline__ void load_pieces(float* plane, const T* x, const Place& at, int c, const Share& mine,
                                            const DepthwiseForward& p, const FfmaPlan& plan) {
  const DepthwiseShape& s = p.shape;
  const InputAffine affine = affine_of(p.affine, c, s.c);
  for (int i = 0; i < mine.count; ++i) {
    const int row = mine.row + i * mine.rows, y = at.y + row - (s.kh - 1) / 2;
    const bool row_inside = y >= 0 && y < s.h;
    for (int column = mine.column; column < mine.end; column += mine.columns) {
      const int from = at.x + column - plan.left;
      float v[WIDTH];
      load_or_zeros<WIDTH>(v, x + y * p.x_stride.h, p.x_stride.w, from, s.w, row_inside, plan.vector_loads);
      if (p.affine) {
        activate<T, WIDTH>(v, p.in_act);
#pragma unroll
        for (int j = 0; j < WIDTH; ++j) v[j] = row_inside && from + j >= 0 && from + j < s.w ? affine(v[j]) : 0.f;
      }
      float* const to = plane + row * plan.pitch + column;
#pragma unroll
      for (int j = 0; j < WIDTH; j += 4) put(to + j, make_float4(v[j], v[j + 1], v[j + 2], v[j + 3]));
    }
  }
}

// The same for float32 as it is, by cp.async
__device__ __forceinline__ void copy_pieces(float* plane, const float* x, const Place& at, const Share& mine,
                                            const DepthwiseForward& p, const FfmaPlan& plan) {
  const int top = at.y + mine.row - (p.shape.kh - 1) / 2, to_next = mine.rows * plan.pitch;
  const int64_t from_next = mine.rows * p.x_stride.h;
#pragma unroll 1
  for (int column = mine.column; column < mine.end; column += mine.columns) {
    const int from_column = at.x + column - plan.left;
    const unsigned height = from_column >= 0 && from_column < p.shape.w ? p.shape.h : 0;
    const float* from = x + top * p.x_stride.h + from_column;
    float* to = plane + mine.row * plan.pitch + column;
    unsigned y = top;
#pragma unroll 4
    for (int i = 0; i < mine.count; ++i, y += mine.rows, from += from_next, to += to_next)
      copy_async<16>(to, from, y < height);
  }
}

// The same of a whole plane, whose surroundings are zero already: `plane` and `x` are at this thread's first piece
__device__ __forceinline__ void copy_plane(float* plane, const float* x, const Share& mine, int64_t step, int pitch) {
#pragma unroll 4
  for (int i = 0; i < mine.count; ++i, x += step, plane += mine.rows * pitch) copy_async<16>(plane, x, true);
}

// Moments of act(y) of the threads of each channel -> its part. The tile in shared memory is gone.
__device__ __forceinline__ void store_moments(PartMoments* all, const PartMoments& mine, int ch, int patch, int patches,
                                              const Place& at, int64_t part, const DepthwiseForward& p) {
  __syncthreads();  // the tile has been read
  PartMoments* const here = all + ch * patches + patch;
  *here = mine;
  for (int step = 1; step < patches; step *= 2) {
    __syncthreads();
    if (patch % (2 * step) == 0 && patch + step < patches) *here = merge(*here, here[step]);
  }
  if (patch == 0 && ch < at.channels) store_part(p.partials, part, p.shape.c, at.c + ch, *here);
}

// The outputs of a patch, from its sums, to the row of y at `to`; `own` points at the inputs in their place.
// With partials: y is the sums, and their moments are added.
template <class T>
__device__ __forceinline__ void store_patch(T* to, float (&acc)[ROWS * COLUMNS], const float* own,
                                            RunningMoments& moments, const ChannelConstants& k, int y, int x,
                                            const DepthwiseForward& p, const FfmaPlan& plan) {
  const DepthwiseShape& s = p.shape;
  // Calls f(row of the patch, its numbers) with `to` at that row
  const auto each_row = [&](const auto& f) {
#pragma unroll
    for (int i = 0; i < ROWS; ++i, to += p.y_stride.h) f(i, acc + i * COLUMNS);
  };
  if (p.partials) {
    each_row([&](int i, float* v) {
      if (y + i >= s.h) return;
      store8(to, p.y_stride.w, v, x, s.w, plan.vector_stores);
#pragma unroll
      for (int j = 0; j < COLUMNS; ++j) v[j] = to_float(from_float<T>(v[j]));  // as it is stored
      activate<float, COLUMNS>(v, p.act);
      moments.add<COLUMNS>(v, s.w - x);
    });
    return;
  }
  activate<T, ROWS * COLUMNS>(acc, p.act);
#pragma unroll
  for (int i = 0; i < ROWS * COLUMNS; ++i) acc[i] = fmaf(acc[i], k.scale, k.shift);
  if (p.residual) {
#pragma unroll
    for (int i = 0; i < ROWS * COLUMNS; i += 4) {
      float input[4];
      load4(input, own + i / COLUMNS * plan.pitch + i % COLUMNS);
#pragma unroll
      for (int j = 0; j < 4; ++j) acc[i + j] += input[j];
    }
  }
  if (plan.vector_stores && y + ROWS <= s.h && x + COLUMNS <= s.w)
    each_row([&](int, const float* v) { store8_vector(to + x, v); });
  else
    each_row([&](int i, const float* v) {
      if (y + i < s.h) store8(to, p.y_stride.w, v, x, s.w, plan.vector_stores);
    });
}

template <class T, int KW>
__global__ void __launch_bounds__(FfmaPlan::kThreads, FfmaPlan::kBlocksPerSm)
    depthwise_fwd_ffma_kernel(const __grid_constant__ DepthwiseForward p, const __grid_constant__ FfmaPlan plan) {
  CMX_DYNAMIC_SHARED(shared);
  float* const tile = reinterpret_cast<float*>(shared);
  float* const weights = tile + plan.channels * plan.channel_pitch;
  const DepthwiseShape& s = p.shape;
  const int patches = plan.patches_x * plan.patches_y;
  const int ch = plan.channels_first ? threadIdx.x % plan.channels : threadIdx.x / patches;
  const int patch = plan.channels_first ? threadIdx.x / plan.channels : threadIdx.x % patches;
  const int patch_y = patch / plan.patches_x * ROWS, patch_x = patch % plan.patches_x * COLUMNS;
  float* const plane = tile + ch * plan.channel_pitch;
  const float* const mine = plane + patch_y * plan.pitch + patch_x;
  const bool copies = plan.copies && !p.affine, whole = plan.whole && copies && !p.partials;
  const int before = (s.kh - 1) / 2;
  const Share share = whole ? share_of(patch, patches, plan.piece, before, before + s.h, plan.left, plan.left + s.w)
                            : share_of(patch, patches, plan.piece, 0, plan.tile_rows, 0, plan.pitch);

  if (whole) {  // the columns and rows around the plane, once for all of them
    for (int i = threadIdx.x; i < plan.channels * plan.channel_pitch / 4; i += blockDim.x)
      put(tile + 4 * i, make_float4(0, 0, 0, 0));
    __syncthreads();
  }

  begin_chained();
  const int64_t items = plan.groups * plan.units, end = (blockIdx.x + 1) * items / gridDim.x;
  int64_t item = blockIdx.x * items / gridDim.x;
  int group = static_cast<int>(item / plan.units), c = 0;
  int64_t unit = item - group * plan.units;
  bool mine_exists = false;
  ChannelConstants k{};
  const T* x_channel = nullptr;
  T* y_patch = nullptr;
  for (bool new_group = true; item < end; ++item, ++unit) {
    if (unit == plan.units) unit = 0, ++group, new_group = true;
    const Place at = place_of(unit, group, plan, s);
    if (new_group) {
      load_weights<T>(weights, p.weight, at, s, plan);
      c = at.c + ch, mine_exists = ch < at.channels, new_group = false;
      if (mine_exists) k = constants_of(p, c);
      x_channel = static_cast<const T*>(p.x) + c * p.x_stride.c;
      y_patch = static_cast<T*>(p.y) + c * p.y_stride.c + patch_y * p.y_stride.h;
    }
    if (mine_exists) {
      const T* const from = x_channel + at.n * p.x_stride.n;
      if (sizeof(T) == 4 && whole)
        copy_plane(
            plane + share.row * plan.pitch + share.column,
            reinterpret_cast<const float*>(from) + (share.row - before) * p.x_stride.h + share.column - plan.left,
            share, share.rows * p.x_stride.h, plan.pitch);
      else if (sizeof(T) == 4 && copies)
        copy_pieces(plane, reinterpret_cast<const float*>(from), at, share, p, plan);
      else if (sizeof(T) == 2 && plan.piece == 8)
        load_pieces<T, 8>(plane, from, at, c, share, p, plan);
      else
        load_pieces<T, 4>(plane, from, at, c, share, p, plan);
    }
    commit_copies();
    wait_for_copies<0>();
    __syncthreads();
    const int y = at.y + patch_y, x = at.x + patch_x;
    RunningMoments moments;
    if (mine_exists && y < s.h && x < s.w) {
      float acc[ROWS * COLUMNS];
#pragma unroll
      for (int i = 0; i < ROWS * COLUMNS; ++i) acc[i] = k.bias;
      convolve<KW>(acc, mine + plan.lead, weights + ch * plan.weight_channel_pitch, s, plan);
      store_patch<T>(y_patch + at.n * p.y_stride.n + at.y * p.y_stride.h, acc, mine + before * plan.pitch + plan.left,
                     moments, k, y, x, p, plan);
    }
    if (p.partials)
      store_moments(reinterpret_cast<PartMoments*>(shared), moments.result(), ch, patch, patches, at, unit, p);
    __syncthreads();  // the tile is free
  }
}

}  // namespace

cudaError_t depthwise_fwd_ffma(const DepthwiseForward& p, const FfmaPlan& plan, cudaStream_t stream) {
  return dispatch_ffma(p.shape, [&]<class T, int KW>() {
    const int threads = plan.channels * plan.patches_x * plan.patches_y;
    return launch(depthwise_fwd_ffma_kernel<T, KW>, {plan.blocks, threads, plan.shared_bytes, stream}, p, plan);
  });
}

}  // namespace cmx
