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

template <class T, int NT, int K>
__global__ void __launch_bounds__(32 * MmaPlan::kWarps, MmaPlan::kBlocksPerSm)
    depthwise_fwd_mma_plane_kernel(const __grid_constant__ DepthwiseForward p, const __grid_constant__ MmaPlan plan) {
  using G = Plane<NT, K>;
  constexpr int STAGES = MmaPlan::kPlaneStages;
  CMX_DYNAMIC_SHARED(shared);
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, warps = blockDim.x / 32;
  const int c = blockIdx.x % p.shape.c, split = blockIdx.x / p.shape.c;
  const int first = split * warps + warp, step = plan.splits * warps, images = p.shape.n;
  unsigned char* const ring = shared + warp * (STAGES * G::STAGE);

  // this lane's blocks of 8 columns: at row lane / NT and every 32 / NT rows below, block lane % NT
  const T* const from = static_cast<const T*>(p.x) + c * p.x_stride.c + lane * 8;
  T* const to = static_cast<T*>(p.y) + c * p.y_stride.c + lane * 8;
  const int mine = G::row(lane / NT + G::BEFORE) + lane % NT * 16;
  const auto load = [&](unsigned char* stage, int unit) {
#pragma unroll
    for (int image = 0; image < G::IMAGES; ++image) {
      const int n = unit * G::IMAGES + image;
      const bool inside = G::IMAGES == 1 || n < images;
      const T* const plane = inside ? from + n * p.x_stride.n : from;
#pragma unroll
      for (int i = 0; i < G::MOVES; ++i)
        copy_async<16>(stage + image * G::IMAGE + mine + i * G::MOVE, plane + i * 256, inside);
    }
  };

  for (int i = lane; i < STAGES * G::STAGE / 16; i += 32)
    put(ring + i * 16, make_uint4(0, 0, 0, 0));  // rows around the plane
  begin_chained();
  __syncwarp();
#pragma unroll
  for (int i = 0; i < STAGES; ++i) {
    if (first + i * step < plan.units) load(ring + i * G::STAGE, first + i * step);
    commit_copies();
  }

  uint32_t filter[G::PAIRS][2][2];  // [pair of filter rows][block][row of the pair]
  const T* const weight = static_cast<const T*>(p.weight) + static_cast<int64_t>(c) * K * K;
#pragma unroll
  for (int ky = 0; ky < 2 * G::PAIRS; ++ky)
#pragma unroll
    for (int b = 0; b < 2; ++b) filter[ky / 2][b][ky % 2] = toeplitz<T, 2>(weight + ky * K, ky < K, b, K, lane);
  const ChannelConstants k = constants_of(p, c);
  const InputAffine affine = affine_of(p.affine, c, p.shape.c);
  RunningMoments moments;
  float bias4[4], shift4[4];
  four_registers(bias4, k.bias);
  four_registers(shift4, k.shift);
  const uint32_t own[2] = {identity<T>(0, 4, lane), identity<T>(1, 4, lane)};

  // ldmatrix: lane i brings row i % 16 of the product and, for pairs of rows, row i / 16 of the pair
  const int m = lane % 16, second = lane / 16, image_of_m = G::IMAGES == 2 ? m / 8 * G::IMAGE : 0;
  const int row_of_m = row_of<G::IMAGES>(m);
  const int pair_at[2] = {image_of_m + G::row(row_of_m + second), image_of_m + G::row(row_of_m + second + 2)};
  const auto blocks_at = [&](int r) { return image_of_m + G::row(row_of_m + r) + second * 16; };  // one row, two blocks
  const bool left_half = lane % 4 < 2;                                                            // of a column tile
  constexpr int OTHER = G::IMAGES == 2 ? G::IMAGE : 8 * G::PITCH;  // from row m of a product to m + 8

  int stage = 0;
  for (int unit = first; unit < plan.units; unit += step) {
    wait_for_copies<STAGES - 1>();
    unsigned char* const tile = ring + stage * G::STAGE;
    if (p.affine) {  // on the blocks that this lane has loaded itself
#pragma unroll
      for (int image = 0; image < G::IMAGES; ++image)
#pragma unroll
        for (int i = 0; i < G::MOVES; ++i)
          affine_on_load<T>(tile + image * G::IMAGE + mine + i * G::MOVE, 0, 8, affine, p.in_act);
    }
    __syncwarp();

    const uint32_t at = shared_address(tile);
    float acc[2][NT + 1][4];  // [row set][column tile]; NT: the first columns, of the tile that wraps
#pragma unroll
    for (int s = 0; s <= G::PAIRS; ++s) {
      const bool last = s == G::PAIRS;  // only the last filter row of the second set is left
      uint32_t in[NT][4];
#pragma unroll
      for (int b = 0; b < NT; ++b) {
        if (!last) {
          load_matrices(in[b], at + pair_at[s & 1] + (s >> 1) * 2 * G::PITCH + b * 16);
        } else if (b % 2 == 0) {
          uint32_t two[4];
          load_matrices(two, at + blocks_at(2 * G::PAIRS) + b * 16);
          in[b][0] = two[0], in[b][1] = two[1], in[b + 1][0] = two[2], in[b + 1][1] = two[3];
        }
      }
#pragma unroll
      for (int set = 0; set < 2; ++set) {
        const int pair = s - set;
        if (pair < 0 || pair >= G::PAIRS) continue;
        const auto multiply = [&](int i, int b, const float* plus, const uint32_t* block) {
          if (pair == G::PAIRS - 1)
            multiply_k8<T>(acc[set][i], block, filter[pair][b], plus);
          else
            multiply_k16<T>(acc[set][i], block, filter[pair][b], plus);
        };
#pragma unroll
        for (int b = 0; b < NT; ++b) {
          multiply(b, 0, pair == 0 ? bias4 : acc[set][b], in[b]);
          if (b == 0)
            multiply(NT, 1, pair == 0 ? bias4 : acc[set][NT], in[b]);
          else
            multiply(b - 1, 1, acc[set][b - 1], in[b]);
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
    if (!p.partials) activate<T, 2 * NT * 4>(&out[0][0][0], p.act);

    // the results take the place of the rows that their residuals come from
#pragma unroll
    for (int set = 0; set < 2; ++set) {
      uint32_t in[NT][2];
      if (p.residual) {
#pragma unroll
        for (int b = 0; b < NT; b += 2) {
          uint32_t two[4];
          load_matrices(two, at + blocks_at(G::BEFORE + 2 * set) + b * 16);
          in[b][0] = two[0], in[b][1] = two[1], in[b + 1][0] = two[2], in[b + 1][1] = two[3];
        }
      }
      __syncwarp();
#pragma unroll
      for (int i = 0; i < NT; ++i) {
        float rest[4] = {shift4[0], shift4[1], shift4[2], shift4[3]};
        if (p.residual) {
          multiply_k8<T>(rest, in[i], &own[0], shift4);
          if (i < NT - 1) {
            multiply_k8<T>(rest, in[i + 1], &own[1], rest);
          } else {
            float wrapped[4];
            multiply_k8<T>(wrapped, in[0], &own[1], shift4);
#pragma unroll
            for (int e = 0; e < 4; ++e) rest[e] = left_half ? rest[e] : wrapped[e];
          }
        }
        const int column = i == NT - 1 && !left_half ? 2 * (lane % 4) - 4 : 8 * i + 4 + 2 * (lane % 4);
        unsigned char* const row = tile + G::row(row_of<1>(lane / 4) + G::BEFORE + 2 * set) + 2 * column;
        const float* const v = out[set][i];
        put(row, pack<T>(fmaf(v[0], k.scale, rest[0]), fmaf(v[1], k.scale, rest[1])));
        put(row + OTHER, pack<T>(fmaf(v[2], k.scale, rest[2]), fmaf(v[3], k.scale, rest[3])));
      }
    }
    __syncwarp();

#pragma unroll
    for (int image = 0; image < G::IMAGES; ++image) {
      const int n = unit * G::IMAGES + image;
      if (G::IMAGES == 1 || n < images)
#pragma unroll
        for (int i = 0; i < G::MOVES; ++i)
          put(to + n * p.y_stride.n + i * 256, get<uint4>(tile + image * G::IMAGE + mine + i * G::MOVE));
    }
    if (p.partials) {
#pragma unroll
      for (int image = 0; image < G::IMAGES; ++image)
        if (G::IMAGES == 1 || unit * G::IMAGES + image < images)
#pragma unroll 1  // the code is already long
          for (int i = 0; i < G::MOVES; ++i)
            add_moments<T>(moments, get<uint4>(tile + image * G::IMAGE + mine + i * G::MOVE), 8, p.act);
    }
    // no barrier: every lane refills just the blocks that it has read itself
    if (unit + STAGES * step < plan.units) load(tile, unit + STAGES * step);
    commit_copies();
    stage = stage + 1 == STAGES ? 0 : stage + 1;
  }
  wait_for_copies<0>();
  store_moments(moments, p, split * warps + warp, c, lane);
}

template <class T>
cudaError_t launch_plane(const DepthwiseForward& p, const MmaPlan& plan, cudaStream_t stream) {
  const bool wide = plan.column_tiles == 4;
  switch (p.shape.kw) {
    case 7:
      return wide ? launch_mma(depthwise_fwd_mma_plane_kernel<T, 4, 7>, p, plan, stream)
                  : launch_mma(depthwise_fwd_mma_plane_kernel<T, 2, 7>, p, plan, stream);
    case 9:
      return wide ? launch_mma(depthwise_fwd_mma_plane_kernel<T, 4, 9>, p, plan, stream)
                  : launch_mma(depthwise_fwd_mma_plane_kernel<T, 2, 9>, p, plan, stream);
    default: return cudaErrorInvalidValue;
  }
}

}  // namespace

cudaError_t depthwise_fwd_mma_plane(const DepthwiseForward& p, const MmaPlan& plan, cudaStream_t stream) {
  if (!plan.blocks) return cudaErrorInvalidValue;
  return p.shape.dtype == Dtype::bfloat16 ? launch_plane<bf16>(p, plan, stream) : launch_plane<fp16>(p, plan, stream);
}

}  // namespace cmx
