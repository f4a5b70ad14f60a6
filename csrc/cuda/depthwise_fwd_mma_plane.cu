// Depthwise convolution on tensor cores where the plane is 32 x 32 or 16 x 16 and the kernel 7 x 7 or 9 x 9: the ConvMixers'
// own shapes, bf16 and fp16. How: depthwise_mma.cuh. Beyond depthwise_fwd_mma.cu:
//   the filter's fragments stay in registers;
//   a column tile covers the outputs 8 i + 4 .. 8 i + 11, so its window is two whole blocks of the plane as it lies in
//   memory, and no halo is kept: the last tile covers the last four columns and the first four ("wrap"), in two
//   accumulators of which each column takes one;
//   the last filter row, which has no partner, is an m16n8k8 product.
#include "depthwise_mma.cuh"

namespace cmx {
namespace {

// A plane of 8 NT x 8 NT under a K x K kernel
template <int NT, int K>
struct Plane {
  static constexpr int ROWS = 8 * NT, IMAGES = 32 / ROWS, BEFORE = (K - 1) / 2, PAIRS = (K + 1) / 2;
  static constexpr int PITCH = (NT | 1) * 16, HALF = ((2 * ((ROWS + K - 2) / 4) + 2) * PITCH + 127) / 128 * 128;
  static constexpr int IMAGE = 2 * HALF, STAGE = IMAGES * IMAGE;
  static_assert(K % 2 == 1 && K <= 9, "odd: the last filter row has no partner; up to 9: two blocks hold a window");
  static __device__ __forceinline__ constexpr int row(int r) { return row_offset(r, HALF, PITCH); }
  // blocks of 16 bytes that one lane moves, each four lane-rows below the one before
  static constexpr int MOVES = ROWS * NT / 32, MOVE = 32 / NT / 4 * 2 * PITCH;
};

// The taps of a channel in shared memory, for all warps: each row twice, eight zeros before and after it, once a number further
// left, so that any two neighbours are a word of one of both; behind them the bias, four times
template <class T, int K>
struct Taps {
  static constexpr int COPY = 24 * sizeof(T), ROW = 2 * COPY, BIAS = K * ROW, BYTES = BIAS + 16;
  static __device__ __forceinline__ void clear(unsigned char* taps) {
    for (int i = threadIdx.x; i < BIAS / 16; i += blockDim.x) put(taps + i * 16, make_uint4(0, 0, 0, 0));
  }
  static __device__ __forceinline__ void bring(unsigned char* taps, const T* weight, float bias) {
    for (int i = threadIdx.x; i < K * K; i += blockDim.x) {
      unsigned char* const to = taps + i / K * ROW + (8 + i % K) * sizeof(T);
      const uint16_t tap = get<uint16_t>(weight + i);
      put(to, tap), put(to + COPY - sizeof(T), tap);
    }
    if (threadIdx.x == 0) put(taps + BIAS, make_float4(bias, bias, bias, bias));
  }
  // Those of filter row ky and block b that are this lane's
  static __device__ __forceinline__ uint32_t fragment(const unsigned char* taps, int ky, int b, int lane) {
    const int kx = 8 + first_tap<2>(0, (K - 1) / 2, lane);
    return get<uint32_t>(taps + (kx % 2 * COPY + kx / 2 * 4) + ky * ROW + b * 16);
  }
};

// COMMON: as in a network's forward pass: GELU, the residual, neither an affine nor moments
template <class T, int NT, int K, bool COMMON>
__global__ void __launch_bounds__(32 * MmaPlan::kWarps, MmaPlan::kBlocksPerSm)
    depthwise_fwd_mma_plane_kernel(const __grid_constant__ DepthwiseForward p, const __grid_constant__ MmaPlan plan) {
  using G = Plane<NT, K>;
  const Act act = COMMON ? Act::gelu : p.act;
  const bool residual = COMMON || p.residual, with_affine = !COMMON && p.affine, moments_too = !COMMON && p.partials;
  constexpr int STAGES = MmaPlan::kPlaneStages;
  CMX_DYNAMIC_SHARED(shared);
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, warps = blockDim.x / 32;
  const int c = blockIdx.x % p.shape.c, split = blockIdx.x / p.shape.c;
  const int first = split * warps + warp, step = plan.splits * warps, images = p.shape.n;
  const uint32_t ring = shared_address(shared) + MmaPlan::kPlaneTaps + warp * (STAGES * G::STAGE);  // of this warp
  static_assert(Taps<T, K>::BYTES <= MmaPlan::kPlaneTaps);

  // this lane's blocks of 8 columns: at row lane / NT and every 32 / NT rows below, block lane % NT
  const uint32_t mine = kept(ring + G::row(lane / NT + G::BEFORE) + lane % NT * 16);
  const T* from = static_cast<const T*>(p.x) + c * p.x_stride.c + first * G::IMAGES * p.x_stride.n + lane * 8;
  T* to = static_cast<T*>(p.y) + c * p.y_stride.c + first * G::IMAGES * p.y_stride.n + lane * 8;
  const int64_t x_step = kept(step * G::IMAGES * p.x_stride.n), y_step = kept(step * G::IMAGES * p.y_stride.n);
  const auto load = [&](uint32_t stage, int unit) {
    if (unit >= plan.units) return;
#pragma unroll
    for (int image = 0; image < G::IMAGES; ++image) {
      const bool inside = G::IMAGES == 1 || unit * G::IMAGES + image < images;
      const T* const plane = inside ? from + image * p.x_stride.n : from;
#pragma unroll
      for (int i = 0; i < G::MOVES; ++i)
        copy_async<16>(shared_pointer(stage + mine + image * G::IMAGE + i * G::MOVE), plane + i * 256, inside);
    }
  };

  // zeros: the rows around the plane, as many as a lane's first move covers, and what surrounds the taps
  const int around = lane / NT % 8, row_around = around < G::BEFORE ? around : around + G::ROWS;
  if (around < K - 1)
#pragma unroll
    for (int i = 0; i < STAGES; ++i)
      put(shared_pointer(ring + i * G::STAGE + lane / NT / 8 * G::IMAGE + G::row(row_around) + lane % NT * 16),
          make_uint4(0, 0, 0, 0));
  Taps<T, K>::clear(shared);
  begin_chained();
  __syncthreads();
#pragma unroll
  for (int i = 0; i < STAGES; ++i) {
    load(i * G::STAGE, first + i * step);
    commit_copies();
    from += x_step;
  }

  const ChannelConstants k = constants_of(p, c);
  Taps<T, K>::bring(shared, static_cast<const T*>(p.weight) + static_cast<int64_t>(c) * K * K, k.bias);
  const InputAffine affine = affine_of(p.affine, c, p.shape.c);
  RunningMoments moments;
  __syncthreads();
  uint32_t filter[G::PAIRS][2][2];  // [pair of filter rows][block][row of the pair]
#pragma unroll
  for (int ky = 0; ky < K; ++ky)
#pragma unroll
    for (int b = 0; b < 2; ++b) filter[ky / 2][b][ky % 2] = Taps<T, K>::fragment(shared, ky, b, lane);
  const float4 bias = get<float4>(shared + Taps<T, K>::BIAS);
  const float bias4[4] = {bias.x, bias.y, bias.z, bias.w};
  const uint32_t own[2] = {kept(identity<T>(0, 4, lane)), kept(identity<T>(1, 4, lane))};

  // ldmatrix: lane i brings row i % 16 of the product and, for pairs of rows, row i / 16 of the pair; of one row, two blocks
  const int m = lane % 16, second = lane / 16, image_of_m = G::IMAGES == 2 ? m / 8 * G::IMAGE : 0;
  const auto at_row = [&](int r) { return ring + image_of_m + G::row(row_of<G::IMAGES>(m) + r); };
  const uint32_t pair_at[2] = {kept(at_row(second)), kept(at_row(second + 2))};
  const uint32_t last_at = kept(at_row(2 * G::PAIRS) + second * 16);
  const uint32_t own_at[2] = {kept(at_row(G::BEFORE) + second * 16), kept(at_row(G::BEFORE + 2) + second * 16)};
  // results: this lane's rows m = lane / 4 and m + 8 of a product, its columns of the first tile; from there to the last tile
  const auto result_at = [&](int set) {
    return ring + G::row(row_of<1>(lane / 4) + G::BEFORE + 2 * set) + 8 + lane % 4 * 4;
  };
  const uint32_t out_at[2] = {kept(result_at(0)), kept(result_at(1))};
  const int to_last = kept(lane % 4 < 2 ? (NT - 1) * 16 : -16);
  const bool left_half = to_last > 0;
  constexpr int OTHER = G::IMAGES == 2 ? G::IMAGE : 8 * G::PITCH;  // from row m of a product to m + 8

  uint32_t stage = 0;  // bytes from the first one
  for (int unit = first; unit < plan.units; unit += step) {
    wait_for_copies<STAGES - 1>();
    if (with_affine) {  // on the blocks that this lane has loaded itself
#pragma unroll
      for (int image = 0; image < G::IMAGES; ++image)
#pragma unroll
        for (int i = 0; i < G::MOVES; ++i)
          affine_on_load<T>(shared_pointer(stage + mine + image * G::IMAGE + i * G::MOVE), 0, 8, affine, p.in_act);
    }
    __syncwarp();

    float acc[2][NT + 1][4];  // [row set][column tile]; NT: the first columns, of the tile that wraps
#pragma unroll
    for (int s = 0; s <= G::PAIRS; ++s) {
      const bool last = s == G::PAIRS;  // only the last filter row of the second set is left
      uint32_t in[NT][4];
#pragma unroll
      for (int b = 0; b < NT; ++b) {
        if (!last) {
          load_matrices(in[b], stage + pair_at[s & 1] + (s >> 1) * 2 * G::PITCH + b * 16);
        } else if (b % 2 == 0) {
          uint32_t two[4];
          load_matrices(two, stage + last_at + b * 16);
          in[b][0] = two[0], in[b][1] = two[1], in[b + 1][0] = two[2], in[b + 1][1] = two[3];
        }
      }
      // all sums take a product before the first takes its second: each waits for the one before
#pragma unroll
      for (int b = 0; b < 2; ++b)
#pragma unroll
        for (int set = 0; set < 2; ++set) {
          const int pair = s - set;
          if (pair < 0 || pair >= G::PAIRS) continue;
#pragma unroll
          for (int block = 0; block < NT; ++block) {
            const int i = block - b < 0 ? NT : block - b;
            const float* const plus = pair == 0 && (b == 0 || i == NT) ? bias4 : acc[set][i];
            if (pair == G::PAIRS - 1)
              multiply_k8<T>(acc[set][i], in[block], filter[pair][b], plus);
            else
              multiply_k16<T>(acc[set][i], in[block], filter[pair][b], plus);
          }
        }
    }

    float out[2][NT][4];
#pragma unroll
    for (int set = 0; set < 2; ++set)
#pragma unroll
      for (int i = 0; i < NT; ++i)
#pragma unroll
        for (int e = 0; e < 4; ++e) out[set][i][e] = i < NT - 1 || left_half ? acc[set][i][e] : acc[set][NT][e];
    if (!moments_too) activate<T, 2 * NT * 4>(&out[0][0][0], act);

#pragma unroll
    for (int i = 0; i < 2 * NT * 4; ++i) (&out[0][0][0])[i] = fmaf((&out[0][0][0])[i], k.scale, k.shift);
    if (residual) {
#pragma unroll
      for (int set = 0; set < 2; ++set) {
        uint32_t in[NT - 1][4];  // two blocks side by side
#pragma unroll
        for (int i = 0; i < NT - 1; ++i) {
          load_matrices(in[i], stage + own_at[set] + i * 16);
          multiply_k16<T>(out[set][i], in[i], own, out[set][i]);
        }
        float (&last)[4] = out[set][NT - 1], wrapped[4];
        multiply_k8<T>(wrapped, &in[0][0], &own[1], last);
        multiply_k8<T>(last, &in[NT - 2][2], &own[0], last);
#pragma unroll
        for (int e = 0; e < 4; ++e) last[e] = left_half ? last[e] : wrapped[e];
      }
    }
    __syncwarp();  // the results take the place of the rows that their residuals come from
#pragma unroll
    for (int set = 0; set < 2; ++set)
#pragma unroll
      for (int i = 0; i < NT; ++i) {
        unsigned char* const row = shared_pointer(stage + out_at[set] + (i < NT - 1 ? i * 16 : to_last));
        const float* const v = out[set][i];
        put(row, pack<T>(v[0], v[1]));
        put(row + OTHER, pack<T>(v[2], v[3]));
      }
    __syncwarp();

#pragma unroll
    for (int image = 0; image < G::IMAGES; ++image) {
      if (G::IMAGES == 1 || unit * G::IMAGES + image < images)
#pragma unroll
        for (int i = 0; i < G::MOVES; ++i)
          put(to + image * p.y_stride.n + i * 256,
              get<uint4>(shared_pointer(stage + mine + image * G::IMAGE + i * G::MOVE)));
    }
    to += y_step;
    if (moments_too) {
#pragma unroll
      for (int image = 0; image < G::IMAGES; ++image)
        if (G::IMAGES == 1 || unit * G::IMAGES + image < images)
#pragma unroll 1  // the code is already long
          for (int i = 0; i < G::MOVES; ++i)
            add_moments<T>(moments, get<uint4>(shared_pointer(stage + mine + image * G::IMAGE + i * G::MOVE)), 8,
                           p.act);
    }
    // no barrier: every lane refills just the blocks that it has read itself
    load(stage, unit + STAGES * step);
    commit_copies();
    from += x_step;
    stage = stage == (STAGES - 1) * G::STAGE ? 0 : stage + G::STAGE;
  }
  wait_for_copies<0>();
  if (moments_too) store_moments(moments, p, split * warps + warp, c, lane);
}

template <class T, int NT, int K>
cudaError_t launch_size(const DepthwiseForward& p, const MmaPlan& plan, cudaStream_t stream) {
  const bool common = p.act == Act::gelu && p.residual && !p.affine && !p.partials;
  return launch_mma(
      common ? depthwise_fwd_mma_plane_kernel<T, NT, K, true> : depthwise_fwd_mma_plane_kernel<T, NT, K, false>, p,
      plan, stream);
}

template <class T>
cudaError_t launch_plane(const DepthwiseForward& p, const MmaPlan& plan, cudaStream_t stream) {
  const bool wide = plan.column_tiles == 4;
  switch (p.shape.kw) {
    case 7: return wide ? launch_size<T, 4, 7>(p, plan, stream) : launch_size<T, 2, 7>(p, plan, stream);
    case 9: return wide ? launch_size<T, 4, 9>(p, plan, stream) : launch_size<T, 2, 9>(p, plan, stream);
    default: return cudaErrorInvalidValue;
  }
}

}  // namespace

cudaError_t depthwise_fwd_mma_plane(const DepthwiseForward& p, const MmaPlan& plan, cudaStream_t stream) {
  if (!plan.blocks) return cudaErrorInvalidValue;
  return p.shape.dtype == Dtype::bfloat16 ? launch_plane<bf16>(p, plan, stream) : launch_plane<fp16>(p, plan, stream);
}

}  // namespace cmx
