// Gradients of the depthwise convolution on tensor cores, in one pass: bf16 and fp16, kernels above 9 x 9, any size.
//
// The products are those of depthwise_bwd_mma.cu. But a warp's registers do not hold the sums of so large a filter, so a block
// works on one tile at a time: its warps bring the tile together, and each sums dweight for pairs of filter rows of its own.
// Of dx each takes two column tiles and a share of the pairs; the shares are added in shared memory, in a fixed order.
#include "depthwise_bwd_mma.cuh"

namespace cmx {
namespace {

constexpr int WARPS = MmaPlan::kWarps, PAIRS = kMmaLargePairs;

// x' of the tile beside act(x), on the places where this thread has stored act(x); zeros outside of the plane
template <class T, class G>
__device__ __forceinline__ void normalise(unsigned char* to, const unsigned char* input, const Where& at,
                                          const DepthwiseGradients& p, int c, int thread) {
  const DepthwiseShape& s = p.shape;
  const InputAffine affine = affine_of(p.affine, c, s.c);
  const int x = at.x + thread % G::NT * 8;
#pragma unroll
  for (int i = thread / G::NT; i < 32; i += 32 * WARPS / G::NT) {
    const Row r = own_row<G>(i);
    const int offset = own_offset<G>(r, thread % G::NT);
    const bool inside = at.n + r.image < s.n && at.y + r.row < s.h;
    float v[8];
    unpack8<T>(v, get<uint4>(input + offset));
#pragma unroll
    for (int j = 0; j < 8; ++j) v[j] = inside && x + j < s.w ? affine(v[j]) : 0.f;
    put(to + offset, make_uint4(pack<T>(v[0], v[1]), pack<T>(v[2], v[3]), pack<T>(v[4], v[5]), pack<T>(v[6], v[7])));
  }
}

template <class T, int NT, int WINDOW>
__global__ void __launch_bounds__(32 * WARPS, mma_large_blocks(WINDOW))
    depthwise_bwd_mma_large_kernel(const __grid_constant__ DepthwiseGradients p, const __grid_constant__ MmaPlan plan) {
  using G = Tile<NT, WINDOW>;
  constexpr int COUNT = 2, SHARES = WARPS * COUNT / NT;  // of dx: column tiles of a warp, parts of the filter
  CMX_DYNAMIC_SHARED(shared);
  const DepthwiseShape& s = p.shape;
  const int thread = threadIdx.x, lane = thread % 32, warp = thread / 32;
  const int c = blockIdx.x % s.c, split = blockIdx.x / s.c;
  const int pairs = (s.kh + 1) / 2, taps = s.kh * s.kw;
  const int most = (pairs + WARPS - 1) / WARPS, first = warp * most;  // of dweight: pairs of a warp
  const int share = warp / (NT / COUNT), left = warp % (NT / COUNT) * COUNT;
  const int of_share = (pairs + SHARES - 1) / SHARES, begin = share * of_share,
            end = begin + of_share < pairs ? begin + of_share : pairs;

  uint2* const filter = reinterpret_cast<uint2*>(shared);                         // [pair of filter rows][block][lane]
  unsigned char* const tile = shared + pairs * WINDOW * 256;                      // da
  unsigned char* const normalised = tile + plan.stage_bytes - 32 * G::OWN_PITCH;  // x'
  unsigned char* const input = p.affine ? normalised - 32 * G::OWN_PITCH : normalised;  // act(x)
  begin_chained();
  expand_filter<T, WINDOW, true>(filter, static_cast<const T*>(p.weight) + static_cast<int64_t>(c) * taps, s.kh, s.kw,
                                 warp, WARPS, lane);

  // as in depthwise_bwd_mma.cu: rows of da for dx, transposed columns of da and of x' for dweight
  const auto at_row = [&](int m, int r) {
    const int image = G::IMAGES == 2 ? m / 8 * 2 * plan.half_plane : 0;
    return image + row_offset(row_of<G::IMAGES>(m) + r, plan.half_plane, G::PITCH);
  };
  const int pair_at[2] = {at_row(lane % 16, lane / 16), at_row(lane % 16, lane / 16 + 2)};
  const int m = lane % 8 + lane / 16 * 8, second = lane / 8 % 2;
  const int transposed_at[2] = {at_row(m, second), at_row(m, second + 2)};
  const int input_at = own_offset<G>({G::IMAGES == 2 ? lane % 16 / 8 : 0, row_of<G::IMAGES>(lane % 16)}, lane / 16);
  const uint32_t address = shared_address(tile);

  GradientSums sums;
  float dweight[PAIRS][WINDOW][4] = {};
  for (int unit = split; unit < plan.units; unit += plan.splits) {
    const Where at = where(unit, plan, G::IMAGES, G::ROWS, G::ROWS);
    load_gradient<T, G, WARPS>(tile, sums.da, at, p, plan, c, thread);
    if (p.need_weight || p.affine) load_input<T, G, WARPS>(input, at, p, plan, c, thread);
    if (p.need_weight && p.affine) normalise<T, G>(normalised, input, at, p, c, thread);
    if (warp == 0 && unit + plan.splits < plan.units)
      prefetch<T, G>(where(unit + plan.splits, plan, G::IMAGES, G::ROWS, G::ROWS), p, c, lane);
    __syncthreads();  // da, act(x) and x' are there, and the filter

    if (p.need_weight && first < pairs) {
      uint32_t in[2][NT][2];  // of the rows S(m), and S(m) + 2
      load_columns<G>(in, shared_address(normalised) + input_at);
#pragma unroll
      for (int j = 0; j <= PAIRS; ++j) {
        if (j > most) break;  // for all warps, or each product costs a WARPSYNC: pairs behind the filter are not kept
        const int pair = first + j < pairs ? first + j : pairs;
        const uint32_t from = address + (pair & 1 ? transposed_at[1] : transposed_at[0]) + (pair >> 1) * 2 * G::PITCH;
#pragma unroll
        for (int block = 0; block < G::BLOCKS; ++block) {
          uint32_t columns[4];
          load_matrices<true>(columns, from + 16 * block);
#pragma unroll
          for (int d = 0; d < WINDOW; ++d) {
            const int i = block - d;
            if (i < 0 || i >= NT) continue;
            if (j < PAIRS && j < most) multiply_k16<T>(dweight[j][d], columns, in[0][i], dweight[j][d]);
            if (j > 0) multiply_k16<T>(dweight[j - 1][d], columns, in[1][i], dweight[j - 1][d]);
          }
        }
      }
    }

    if (p.dx) {
      float acc[2][COUNT][4] = {};  // rows S(m), and S(m) + 2
      if (begin < end) convolve<T, G>(acc, address + 16 * left, pair_at, filter, begin, end, lane);
#pragma unroll
      for (int turn = SHARES - 1; turn >= 0; --turn) {
        __syncthreads();  // da has been read: the results take its place; then, the shares before are there
        if (share != turn) continue;
#pragma unroll
        for (int i = 0; i < 4 * COUNT; ++i) {  // [set][column tile][rows m, m + 8]
          const int set = i / (2 * COUNT), of = i / 2 % COUNT, below = i % 2;
          unsigned char* const to =
              tile + (16 * set + lane / 4 + 8 * below) * G::RESULT_PITCH + 32 * (left + of) + lane % 4 * 8;
          float2 v = make_float2(acc[set][of][2 * below], acc[set][of][2 * below + 1]);
          if (turn < SHARES - 1) {
            const float2 before = get<float2>(to);
            v = make_float2(v.x + before.x, v.y + before.y);
          }
          put(to, v);
        }
      }
      __syncthreads();
      store_results<T, G, WARPS>(tile, input, sums, at, p, plan, c, thread);
    }
    __syncthreads();  // the stage is free
  }

  // this block's parts: dweight [c][kh][kw], dbias [c], sums [2][c]
  float* const matrices = reinterpret_cast<float*>(tile);  // [warp][block][16][8]
  float* const totals = matrices + WARPS * WINDOW * 128;   // [warp][4]
  const int part = (blockIdx.x - c) / s.c;
  float* const out = p.partials + static_cast<int64_t>(part) * s.c * (taps + 3);
  float total[3] = {sums.da, sums.dx, sums.dx_centred};
#pragma unroll
  for (int bits = 16; bits; bits /= 2)
#pragma unroll
    for (int i = 0; i < 3; ++i) total[i] += __shfl_xor_sync(ALL_LANES, total[i], bits);
  if (lane == 0)
    for (int i = 0; i < 3; ++i) totals[4 * warp + i] = total[i];
#pragma unroll
  for (int j = 0; j < PAIRS; ++j) {
#pragma unroll
    for (int d = 0; d < WINDOW; ++d)
#pragma unroll
      for (int e = 0; e < 4; ++e)
        matrices[(warp * WINDOW + d) * 128 + (lane / 4 + e / 2 * 8) * 8 + lane % 4 * 2 + e % 2] = dweight[j][d][e];
    __syncthreads();  // one pair of every warp is there
    for (int i = thread; i < WARPS * 2 * s.kw; i += 32 * WARPS) {
      const int of = i / (2 * s.kw), row = i / s.kw % 2, kx = i % s.kw, ky = 2 * (of * most + j) + row;
      if (j >= most || ky >= s.kh) continue;
      const int from_left = kx - s.kw / 2 + G::LEFT;  // 8 d + m - n
      float sum = 0;
      for (int d = 0; d < WINDOW; ++d)
        for (int n = 0; n < 8; ++n) {
          const int column = from_left + n - 8 * d;
          if (column >= 0 && column < 8) sum += matrices[(of * WINDOW + d) * 128 + (row * 8 + column) * 8 + n];
        }
      out[c * taps + taps - 1 - (ky * s.kw + kx)] = sum;
    }
    __syncthreads();  // and has been read
  }
  if (thread < 3) {
    float sum = 0;
    for (int w = 0; w < WARPS; ++w) sum += totals[4 * w + thread];
    out[s.c * (taps + thread) + c] = sum;
  }
}

template <class T>
cudaError_t launch_large(const DepthwiseGradients& p, const MmaPlan& plan, cudaStream_t stream) {
  const auto run = [&]<class, int NT, int WINDOW>() {
    return launch_mma(depthwise_bwd_mma_large_kernel<T, NT, WINDOW>, p, plan, stream);
  };
  return plan.column_tiles == 2 ? dispatch_window<T, 2>(plan, run) : dispatch_window<T, 4>(plan, run);
}

}  // namespace

cudaError_t depthwise_bwd_mma_large(const DepthwiseGradients& p, const MmaPlan& plan, cudaStream_t stream) {
  return p.shape.dtype == Dtype::bfloat16 ? launch_large<bf16>(p, plan, stream) : launch_large<fp16>(p, plan, stream);
}

}  // namespace cmx
