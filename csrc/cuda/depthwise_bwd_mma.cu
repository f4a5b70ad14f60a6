// Gradients of the depthwise convolution on tensor cores, in one pass: bf16 and fp16, kernels up to 9 x 9, any size.
//
// A block owns one channel and some of its tiles, each warp its own, as in depthwise_fwd_mma.cu. For each tile a warp
// brings da with its halo and act(x) without into shared memory, rounded to 16 bits as layers that store them would do; x'
// is made of act(x) in the registers of its products. Both gradients slide over da, with the filter turned by 180 degrees
// (ky', kx'):
//   dx[i][j] += weight[ky'][kx'] * da[i + ky'][j + kx']        the forward pass's product with Toeplitz matrices
//   dweight[ky'][kx'] += x'[i][j] * da[i + ky'][j + kx']       summed over rows by products, over a row at the end:
//     sums[ky'][d][m][n] += sum over i of da[i + ky'][8 (j + d) + m] * x'[i][8 j + n]        for every column tile j
//     dweight[ky'][kx'] = sum of sums[ky'][d][m][n] where 8 d + m - n is kx' less the padding
// All tiles of all images add to the same sums in registers: 16 (two filter rows) x 8 for each pair and each block d.
// Where ldmatrix brings a pair of rows for the one, ldmatrix.trans brings it for the other, and as there, each serves twice:
// for the rows S(m) of the filter's pair q and for the rows S(m) + 2 of the pair before.
#include "depthwise_mma.cuh"
#include "neighbours.cuh"

namespace cmx {
namespace {

constexpr int PAIRS = kMmaBackwardPairs, WINDOW = kMmaBackwardWindow;
constexpr int LEFT = 4 * (WINDOW - 1);  // columns of a tile of da before its outputs

struct Sums {
  float da = 0, dx = 0, dx_centred = 0;
};

// Eight neighbours, of which the first `count` exist, zeros behind them, as they lie. WIDE: all or none, read at once.
template <bool WIDE, class T>
__device__ __forceinline__ uint4 load8(const T* from, int count) {
  if constexpr (WIDE) {
    return count > 0 ? get<uint4>(from) : make_uint4(0, 0, 0, 0);
  } else {
    uint32_t word[4];
#pragma unroll
    for (int i = 0; i < 4; ++i)
      word[i] = bits_or_zero(from + 2 * i, 2 * i < count) | bits_or_zero(from + 2 * i + 1, 2 * i + 1 < count) << 16;
    return make_uint4(word[0], word[1], word[2], word[3]);
  }
}

// The tile's own rows, of one image or two, are 32: a warp moves 32 / NT of them at once, eight columns a lane.
struct Row {
  int image, row;
};

template <class G>
__device__ __forceinline__ Row own_row(int i) {
  return G::IMAGES == 2 ? Row{i / G::ROWS, i % G::ROWS} : Row{0, i};
}

// From column x on the rows of a tile, counted from the plane's row `from`
template <class T, class G>
struct Rows {
  T* first;
  const Strides& stride;

  __device__ __forceinline__ Rows(T* data, const Strides& strides, const Where& at, int c, int from, int x)
      : first(data + c * strides.c + at.n * strides.n + from * strides.h + x), stride(strides) {}
  __device__ __forceinline__ T* operator()(const Row& r) const {
    return first + (G::IMAGES == 2 ? r.image * stride.n : 0) + r.row * stride.h;
  }
};
template <class G, class T>
__device__ __forceinline__ Rows<T, G> rows_of(T* data, const Strides& strides, const Where& at, int c, int from,
                                              int x) {
  return {data, strides, at, c, from, x};
}

// Bytes from the start of act(x) to eight columns of a row
template <class G>
__device__ __forceinline__ int own_offset(const Row& r, int eight) {
  constexpr int HALF = G::ROWS / 2 * G::OWN_PITCH;
  return r.image * 2 * HALF + row_offset(r.row, HALF, G::OWN_PITCH) + 16 * eight;
}

// da of the tile and its halo, zeros outside of the plane; adds up the tile's own
template <class T, class G>
__device__ __forceinline__ void load_gradient(unsigned char* tile, float& sum, const Where& at,
                                              const DepthwiseGradients& p, const MmaPlan& plan, int c, int lane) {
  constexpr int AT_ONCE = 32 / G::NT, STEPS = 2;
  const DepthwiseShape& s = p.shape;
  const GradientAffine affine = gradient_affine(p.coefficients, c, s.c);
  const int up = s.kh / 2, column = lane % G::NT * 8, x = at.x + column;
  const auto grad = rows_of<G>(static_cast<const T*>(p.grad), p.grad_stride, at, c, at.y - up, x);
  const auto a = rows_of<G>(static_cast<const T*>(p.a), p.a_stride, at, c, at.y - up, x);
  const int around = plan.rows - G::ROWS, rows = 32 + G::IMAGES * around;  // rows above and below; all
  const bool wide = plan.load_bytes == 16;
  const auto row_of_index = [&](int i) {  // the tile's own first
    if (i < 32) return Row{own_row<G>(i).image, own_row<G>(i).row + up};
    const int image = G::IMAGES == 2 && i - 32 >= around, row = i - 32 - image * around;
    return Row{image, row < up ? row : row + G::ROWS};
  };
  const auto inside = [&](const Row& r) {
    return at.n + r.image < s.n && at.y + r.row - up >= 0 && at.y + r.row - up < s.h;
  };
  const auto place = [&](const Row& r) {
    return tile + r.image * 2 * plan.half_plane + row_offset(r.row, plan.half_plane, G::PITCH);
  };
  const int loaded = plan.tiles_y == 1 ? 32 : rows;  // what is left lies outside of the plane
#pragma unroll 1
  for (int i = 32 + lane / G::NT; loaded == 32 && i < rows; i += AT_ONCE) {
    unsigned char* const to = place(row_of_index(i)) + 2 * (LEFT + column);
    put(to, make_uint2(0, 0)), put(to + 8, make_uint2(0, 0));
  }
#pragma unroll 1
  for (int i = lane / G::NT; i < loaded; i += STEPS * AT_ONCE) {
    uint4 grads[STEPS], pre[STEPS];
    const auto load = [&]<bool WIDE>() {
#pragma unroll
      for (int step = 0; step < STEPS; ++step) {
        const Row r = row_of_index(i + step * AT_ONCE);
        const int count = inside(r) ? s.w - x : 0;
        grads[step] = load8<WIDE>(grad(r), count), pre[step] = load8<WIDE>(a(r), count);
      }
    };
    wide ? load.template operator()<true>() : load.template operator()<false>();
#pragma unroll
    for (int step = 0; step < STEPS; ++step) {
      const Row r = row_of_index(i + step * AT_ONCE);
      unsigned char* const to = place(r) + 2 * (LEFT + column);
      const uint2 grad_words[2] = {{grads[step].x, grads[step].y}, {grads[step].z, grads[step].w}};
      const uint2 pre_words[2] = {{pre[step].x, pre[step].y}, {pre[step].z, pre[step].w}};
#pragma unroll
      for (int half = 0; half < 2; ++half) {  // or registers spill
        float v[4] = {}, other[4];
        if (inside(r) && x < s.w) {
          unpack4<T>(v, grad_words[half]), unpack4<T>(other, pre_words[half]);
          through_activation<4>(v, other, affine, p.act);
          if (!wide)
#pragma unroll
            for (int j = 0; j < 4; ++j) v[j] = x + 4 * half + j < s.w ? v[j] : 0.f;
        }
        if (i + step * AT_ONCE < 32) sum += (v[0] + v[1]) + (v[2] + v[3]);
        if (i + step * AT_ONCE < rows) put(to + 8 * half, make_uint2(pack<T>(v[0], v[1]), pack<T>(v[2], v[3])));
      }
    }
  }
#pragma unroll 1
  for (int i = lane; i < 2 * G::IMAGES * plan.rows; i += 32) {  // four columns to the left and to the right
    const int image = G::IMAGES == 2 && i >= 2 * plan.rows;
    const Row r{image, i / 2 - image * plan.rows};
    const int side = i % 2 * (LEFT + 8 * G::NT), first = at.x + side - LEFT;
    float v[4] = {}, other[4];
    if (inside(r) && first >= 0 && first < s.w) {
      load_or_zeros<4>(v, grad(r) - x, 1, first, s.w, true, false);
      load_or_zeros<4>(other, a(r) - x, 1, first, s.w, true, false);
      through_activation<4>(v, other, affine, p.act);
#pragma unroll
      for (int j = 0; j < 4; ++j) v[j] = first + j < s.w ? v[j] : 0.f;
    }
    put(place(r) + 2 * side, make_uint2(pack<T>(v[0], v[1]), pack<T>(v[2], v[3])));
  }
}

// act(x) of the tile, or x where there is no affine; zeros outside of the plane, which every activation keeps
template <class T, class G>
__device__ __forceinline__ void load_input(unsigned char* input, const Where& at, const DepthwiseGradients& p,
                                           const MmaPlan& plan, int c, int lane) {
  constexpr int STEPS = G::NT;
  const DepthwiseShape& s = p.shape;
  const int x = at.x + lane % G::NT * 8;
  const auto from = rows_of<G>(static_cast<const T*>(p.x), p.x_stride, at, c, at.y, x);
  const auto own = [&](int step) { return own_row<G>(lane / G::NT + step * 32 / G::NT); };
  uint4 words[STEPS];
  const auto load = [&]<bool WIDE>() {
#pragma unroll
    for (int step = 0; step < STEPS; ++step) {
      const Row r = own(step);
      words[step] = load8<WIDE>(from(r), at.n + r.image < s.n && at.y + r.row < s.h ? s.w - x : 0);
    }
  };
  plan.load_bytes == 16 ? load.template operator()<true>() : load.template operator()<false>();
#pragma unroll
  for (int step = 0; step < STEPS; ++step) put(input + own_offset<G>(own(step), lane % G::NT), words[step]);
  if (!p.affine) return;
#pragma unroll 1  // the code is already long
  for (int step = 0; step < STEPS; ++step) {
    unsigned char* const place = input + own_offset<G>(own(step), lane % G::NT);
    float v[8];
    unpack8<T>(v, get<uint4>(place));
    activate<T, 8>(v, p.act);
    put(place, make_uint4(pack<T>(v[0], v[1]), pack<T>(v[2], v[3]), pack<T>(v[4], v[5]), pack<T>(v[6], v[7])));
  }
}

// act(x) -> x' in the fragments of the rows S(m) and S(m) + 2: words of two rows, [i][1] of the rows m + 8
template <class T, class G>
__device__ __forceinline__ void normalise(uint32_t (&in)[2][G::NT][2], const Where& at, const DepthwiseGradients& p,
                                          int c, int lane) {
  const DepthwiseShape& s = p.shape;
  const InputAffine affine = affine_of(p.affine, c, s.c);
#pragma unroll
  for (int i = 0; i < 4 * G::NT; ++i) {
    uint32_t& word = (&in[0][0][0])[i];
    const float2 v = unpack<T>(word);
    word = pack<T>(affine(v.x), affine(v.y));
  }
  if (at.n + G::IMAGES <= s.n && at.y + G::ROWS <= s.h && at.x + 8 * G::NT <= s.w) return;
#pragma unroll
  for (int i = 0; i < 4 * G::NT; ++i) {  // [set][column tile][half], zero outside of the plane
    const int set = i / (2 * G::NT), half = i % 2;
    const int left = s.h - (at.y + row_of<G::IMAGES>(lane % 4 * 2 + half * 8) + 2 * set);  // rows
    const bool column = at.x + i / 2 % G::NT * 8 + lane / 4 < s.w, image = at.n + (G::IMAGES == 2 ? half : 0) < s.n;
    (&in[0][0][0])[i] &= !column || !image || left <= 0 ? 0u : left == 1 ? 0xffffu : ~0u;
  }
}

// dx of the tile: the results [image][S(m) or S(m) + 2][column] in float32, and what the residual connection adds
template <class T, class G>
__device__ __forceinline__ void store_results(const unsigned char* results, const unsigned char* input, Sums& sums,
                                              const Where& at, const DepthwiseGradients& p, const MmaPlan& plan, int c,
                                              int lane) {
  constexpr int AT_ONCE = 32 / G::NT, STEPS = 2;
  const DepthwiseShape& s = p.shape;
  const float mean = p.affine ? p.affine[c] : 0.f;
  const int column = lane % G::NT * 8, x = at.x + column;
  const auto grad = rows_of<G>(static_cast<const T*>(p.grad), p.grad_stride, at, c, at.y, x);
  const auto dx = rows_of<G>(static_cast<T*>(p.dx), p.dx_stride, at, c, at.y, 0);
  const bool wide = plan.load_bytes == 16;
  const auto inside = [&](const Row& r) { return at.n + r.image < s.n && at.y + r.row < s.h && x < s.w; };
#pragma unroll 1
  for (int i = lane / G::NT; i < 32; i += STEPS * AT_ONCE) {
    uint4 grads[STEPS];
    const auto load = [&]<bool WIDE>() {
#pragma unroll
      for (int step = 0; step < STEPS; ++step) {
        const Row r = own_row<G>(i + step * AT_ONCE);
        grads[step] = load8<WIDE>(grad(r), p.residual && inside(r) ? s.w - x : 0);
      }
    };
    wide ? load.template operator()<true>() : load.template operator()<false>();
#pragma unroll
    for (int step = 0; step < STEPS; ++step) {
      const Row r = own_row<G>(i + step * AT_ONCE);
      if (!inside(r)) continue;
      const auto* const result = reinterpret_cast<const float*>(
          results + r.image * 8 * G::RESULT_PITCH + row_offset(r.row, 16 * G::RESULT_PITCH, G::RESULT_PITCH));
      float v[8], other[8];
      load4(v, result + column), load4(v + 4, result + column + 4);
      unpack8<T>(other, grads[step]);
#pragma unroll
      for (int j = 0; j < 8; ++j) v[j] += other[j];
      const uint4 words =
          make_uint4(pack<T>(v[0], v[1]), pack<T>(v[2], v[3]), pack<T>(v[4], v[5]), pack<T>(v[6], v[7]));
      store8_words(dx(r), x, s.w, words, plan.store_bytes);
      if (!p.affine) continue;
      unpack8<T>(v, words), unpack8<T>(other, get<uint4>(input + own_offset<G>(r, lane % G::NT)));
      if (!wide)
#pragma unroll
        for (int j = 0; j < 8; ++j) v[j] = x + j < s.w ? v[j] : 0.f;
#pragma unroll
      for (int j = 0; j < 8; ++j) sums.dx += v[j], sums.dx_centred = fmaf(v[j], other[j] - mean, sums.dx_centred);
    }
  }
}

// What the next tile reads, from memory into L2: one row and 32 columns a lane
template <class T, class G>
__device__ __forceinline__ void prefetch(const Where& at, const DepthwiseGradients& p, int c, int lane) {
  const int n = at.n + lane / G::ROWS, y = at.y + lane % G::ROWS;
  if (n >= p.shape.n || y >= p.shape.h) return;
  const auto row = [&](const void* data, const Strides& s) {
    prefetch_to_l2(static_cast<const T*>(data) + n * s.n + c * s.c + y * s.h + at.x);
  };
  row(p.grad, p.grad_stride), row(p.a, p.a_stride), row(p.x, p.x_stride);
}

template <class T, int NT>
__global__ void __launch_bounds__(32 * MmaPlan::kWarps, 4)
    depthwise_bwd_mma_kernel(const __grid_constant__ DepthwiseGradients p, const __grid_constant__ MmaPlan plan) {
  using G = Tile<NT, WINDOW>;
  CMX_DYNAMIC_SHARED(shared);
  const DepthwiseShape& s = p.shape;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, warps = blockDim.x / 32;
  const int c = blockIdx.x % s.c, split = blockIdx.x / s.c;
  const int pairs = (s.kh + 1) / 2, taps = s.kh * s.kw;

  uint2* const filter = reinterpret_cast<uint2*>(shared);  // [pair of filter rows][block][lane]
  unsigned char* const stages = shared + pairs * WINDOW * 256;
  unsigned char* const tile = stages + warp * plan.stage_bytes;              // da
  unsigned char* const input = tile + plan.stage_bytes - 32 * G::OWN_PITCH;  // act(x)
  begin_chained();
  expand_filter<T, WINDOW, true>(filter, static_cast<const T*>(p.weight) + static_cast<int64_t>(c) * taps, s.kh, s.kw,
                                 warp, warps, lane);
  __syncthreads();

  // ldmatrix of a pair of rows: lane i brings row i % 16 of the product, of filter row i / 16 of the pair
  const auto at_row = [&](int m, int r) {
    const int image = G::IMAGES == 2 ? m / 8 * 2 * plan.half_plane : 0;
    return image + row_offset(row_of<G::IMAGES>(m) + r, plan.half_plane, G::PITCH);
  };
  const int pair_at[2] = {at_row(lane % 16, lane / 16), at_row(lane % 16, lane / 16 + 2)};
  // transposed, they are columns of da, of both filter rows, by rows m: 0-7 of the first, of the second, then 8-15
  const int m = lane % 8 + lane / 16 * 8, second = lane / 8 % 2;
  const int transposed_at[2] = {at_row(m, second), at_row(m, second + 2)};
  // act(x), transposed: its rows 0-7 and 8-15 of a column tile, then of the next
  constexpr int OWN_HALF = G::ROWS / 2 * G::OWN_PITCH;
  const int input_at = own_offset<G>({G::IMAGES == 2 ? lane % 16 / 8 : 0, row_of<G::IMAGES>(lane % 16)}, lane / 16);

  Sums sums;
  float dweight[PAIRS][WINDOW][4] = {};
  const int first = split * warps + warp, step = plan.splits * warps;
  for (int unit = first; unit < plan.units; unit += step) {
    const Where at = where(unit, plan, G::IMAGES, G::ROWS, G::ROWS);
    load_gradient<T, G>(tile, sums.da, at, p, plan, c, lane);
    if (p.need_weight || p.affine) load_input<T, G>(input, at, p, plan, c, lane);
    if (unit + step < plan.units) prefetch<T, G>(where(unit + step, plan, G::IMAGES, G::ROWS, G::ROWS), p, c, lane);
    __syncwarp();  // da and act(x) are there

    const uint32_t address = shared_address(tile);
    if (p.need_weight) {
      uint32_t in[2][NT][2];  // of the rows S(m), and S(m) + 2
#pragma unroll
      for (int set = 0; set < 2; ++set)
#pragma unroll
        for (int i = 0; i < NT; i += 2) {
          uint32_t two[4];
          load_matrices<true>(two, shared_address(input) + input_at + set * OWN_HALF + 16 * i);
          in[set][i][0] = two[0], in[set][i][1] = two[1], in[set][i + 1][0] = two[2], in[set][i + 1][1] = two[3];
        }
      if (p.affine) normalise<T, G>(in, at, p, c, lane);
#pragma unroll
      for (int pair = 0; pair <= PAIRS; ++pair) {
        if (pair > pairs) break;
#pragma unroll
        for (int block = 0; block < G::BLOCKS; ++block) {
          uint32_t columns[4];
          load_matrices<true>(columns, address + transposed_at[pair % 2] + pair / 2 * 2 * G::PITCH + 16 * block);
#pragma unroll
          for (int d = 0; d < WINDOW; ++d) {
            const int i = block - d;
            if (i < 0 || i >= NT) continue;
            if (pair < PAIRS && pair < pairs) multiply_k16<T>(dweight[pair][d], columns, in[0][i], dweight[pair][d]);
            if (pair > 0) multiply_k16<T>(dweight[pair - 1][d], columns, in[1][i], dweight[pair - 1][d]);
          }
        }
      }
    }

    if (p.dx) {
      float acc[2][NT][4] = {};  // rows S(m), and S(m) + 2
      convolve<T, G>(acc, address, pair_at, filter, pairs, lane);
      __syncwarp();  // da has been read: the results take its place
#pragma unroll
      for (int set = 0; set < 2; ++set)
#pragma unroll
        for (int i = 0; i < NT; ++i) {
          unsigned char* const to = tile + (16 * set + lane / 4) * G::RESULT_PITCH + 32 * i + lane % 4 * 8;
          put(to, make_float2(acc[set][i][0], acc[set][i][1]));
          put(to + 8 * G::RESULT_PITCH, make_float2(acc[set][i][2], acc[set][i][3]));
        }
      __syncwarp();
      store_results<T, G>(tile, input, sums, at, p, plan, c, lane);
    }
    __syncwarp();  // the stage is free
  }

  // this block's parts: dweight [c][kh][kw], dbias [c], sums [2][c]
  const int matrices = pairs * WINDOW * 16 * 8;  // of the weight gradient; the other sums behind them
  float* const mine = reinterpret_cast<float*>(tile);
#pragma unroll
  for (int pair = 0; pair < PAIRS; ++pair)
#pragma unroll
    for (int d = 0; d < WINDOW; ++d)
#pragma unroll
      for (int e = 0; e < 4; ++e)
        if (pair < pairs)
          mine[(pair * WINDOW + d) * 128 + (lane / 4 + e / 2 * 8) * 8 + lane % 4 * 2 + e % 2] = dweight[pair][d][e];
  float totals[3] = {sums.da, sums.dx, sums.dx_centred};
#pragma unroll
  for (int bits = 16; bits; bits /= 2)
#pragma unroll
    for (int i = 0; i < 3; ++i) totals[i] += __shfl_xor_sync(ALL_LANES, totals[i], bits);
  if (lane == 0)
    for (int i = 0; i < 3; ++i) mine[matrices + i] = totals[i];
  __syncthreads();  // the sums of all warps are there

  const int part = (blockIdx.x - c) / s.c;  // split, which would take a register through the loop
  float* const out = p.partials + static_cast<int64_t>(part) * s.c * (taps + 3);
  const auto of_warp = [&](int w) { return reinterpret_cast<const float*>(stages + w * plan.stage_bytes); };
  for (int i = threadIdx.x; i < taps + 3; i += blockDim.x) {
    const int ky = i / s.kw, kx = i % s.kw, from_left = kx - s.kw / 2 + LEFT;  // 8 d + m - n
    float sum = 0;
    for (int w = 0; w < warps; ++w) {
      const float* const matrix = of_warp(w);
      if (i >= taps)
        sum += matrix[matrices + i - taps];
      else
        for (int d = 0; d < WINDOW; ++d)
          for (int n = 0; n < 8; ++n) {
            const int column = from_left + n - 8 * d;
            if (column >= 0 && column < 8) sum += matrix[(ky / 2 * WINDOW + d) * 128 + (ky % 2 * 8 + column) * 8 + n];
          }
    }
    out[i < taps ? c * taps + taps - 1 - i : s.c * i + c] = sum;
  }
}

template <class T>
cudaError_t launch_tile(const DepthwiseGradients& p, const MmaPlan& plan, cudaStream_t stream) {
  return plan.column_tiles == 2 ? launch_mma(depthwise_bwd_mma_kernel<T, 2>, p, plan, stream)
                                : launch_mma(depthwise_bwd_mma_kernel<T, 4>, p, plan, stream);
}

}  // namespace

cudaError_t depthwise_bwd_mma(const DepthwiseGradients& p, const MmaPlan& plan, cudaStream_t stream) {
  if (!plan.blocks) return cudaErrorInvalidValue;
  return p.shape.dtype == Dtype::bfloat16 ? launch_tile<bf16>(p, plan, stream) : launch_tile<fp16>(p, plan, stream);
}

}  // namespace cmx
