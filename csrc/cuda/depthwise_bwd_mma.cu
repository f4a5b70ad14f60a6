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
#include "depthwise_bwd_mma.cuh"

namespace cmx {
namespace {

constexpr int PAIRS = kMmaBackwardPairs, WINDOW = kMmaBackwardWindow;

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
  const int input_at = own_offset<G>({G::IMAGES == 2 ? lane % 16 / 8 : 0, row_of<G::IMAGES>(lane % 16)}, lane / 16);

  GradientSums sums;
  float dweight[PAIRS][WINDOW][4] = {};
  const int first = split * warps + warp, step = plan.splits * warps;
  for (int unit = first; unit < plan.units; unit += step) {
    const Where at = where(unit, plan, G::IMAGES, G::ROWS, G::ROWS);
    load_gradient<T, G, 1>(tile, sums.da, at, p, plan, c, lane);
    if (p.need_weight || p.affine) load_input<T, G, 1>(input, at, p, plan, c, lane);
    if (unit + step < plan.units) prefetch<T, G>(where(unit + step, plan, G::IMAGES, G::ROWS, G::ROWS), p, c, lane);
    __syncwarp();  // da and act(x) are there

    const uint32_t address = shared_address(tile);
    if (p.need_weight) {
      uint32_t in[2][NT][2];  // of the rows S(m), and S(m) + 2
      load_columns<G>(in, shared_address(input) + input_at);
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
      convolve<T, G>(acc, address, pair_at, filter, 0, pairs, lane);
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
      store_results<T, G, 1>(tile, input, sums, at, p, plan, c, lane);
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
    const int ky = i / s.kw, kx = i % s.kw, from_left = kx - s.kw / 2 + G::LEFT;  // 8 d + m - n
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
  if (plan.shared_tiles) return depthwise_bwd_mma_large(p, plan, stream);
  return p.shape.dtype == Dtype::bfloat16 ? launch_tile<bf16>(p, plan, stream) : launch_tile<fp16>(p, plan, stream);
}

}  // namespace cmx
