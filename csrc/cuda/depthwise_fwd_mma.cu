// Depthwise convolution on tensor cores for any size and any kernel up to 31, bf16 and fp16. How: depthwise_mma.cuh.
//
// A block owns one channel and some of its tiles of 32 x 32 outputs (or two images of 16 x 16, for small planes). Its
// filter, expanded to Toeplitz fragments, lies in shared memory once; each warp works through tiles of its own, in a ring
// of stages that cp.async fills ahead, with no barrier between warps.
#include "depthwise_mma.cuh"

namespace cmx {
namespace {

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

template <class T, class G, int BYTES>
__device__ __forceinline__ void load(unsigned char* stage, const Where& at, const T* channel, const DepthwiseForward& p,
                                     const MmaPlan& plan, int lane) {
  const DepthwiseShape& s = p.shape;
  each_block<G>(stage, at, s, plan, lane, [&](unsigned char* to, int n, int y, int x) {
    const bool row_inside = n < s.n && y >= 0 && y < s.h;
    const T* const row = channel + n * p.x_stride.n + y * p.x_stride.h;
#pragma unroll
    for (int i = 0; i < 16; i += BYTES) {
      const int column = x + i / 2;  // w is a multiple of a piece: all of it is inside, or nothing
      const bool inside = row_inside && column >= 0 && column < s.w;
      if constexpr (BYTES >= 4)
        copy_async<BYTES>(to + i, inside ? row + column : channel, inside);
      else
        put<uint16_t>(to + i, inside ? get<uint16_t>(row + column) : uint16_t(0));
    }
  });
}

template <class T, class G>
__device__ __forceinline__ void load(unsigned char* stage, int unit, const T* channel, const DepthwiseForward& p,
                                     const MmaPlan& plan, int lane) {
  const Where at = where(unit, plan, G::IMAGES, G::ROWS, G::ROWS);
  switch (plan.load_bytes) {
    case 16: return load<T, G, 16>(stage, at, channel, p, plan, lane);
    case 8: return load<T, G, 8>(stage, at, channel, p, plan, lane);
    case 4: return load<T, G, 4>(stage, at, channel, p, plan, lane);
    default: return load<T, G, 2>(stage, at, channel, p, plan, lane);
  }
}

template <class T, int NT, int WINDOW>
__global__ void __launch_bounds__(32 * MmaPlan::kWarps, 4)
    depthwise_fwd_mma_kernel(const __grid_constant__ DepthwiseForward p, const __grid_constant__ MmaPlan plan) {
  using G = Tile<NT, WINDOW>;
  CMX_DYNAMIC_SHARED(shared);
  const DepthwiseShape& s = p.shape;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, warps = blockDim.x / 32;
  const int c = blockIdx.x % s.c, split = blockIdx.x / s.c;
  const int pairs = (s.kh + 1) / 2, before = (s.kh - 1) / 2;
  const T* const channel = static_cast<const T*>(p.x) + c * p.x_stride.c;

  uint2* const filter = reinterpret_cast<uint2*>(shared);  // [pair of filter rows][block][lane]
  unsigned char* const ring = shared + pairs * WINDOW * 256 + warp * (MmaPlan::kStages * plan.stage_bytes);

  const int first = split * warps + warp, step = plan.splits * warps;
  begin_chained();
#pragma unroll 1
  for (int i = 0; i < MmaPlan::kStages; ++i) {
    if (first + i * step < plan.units)
      load<T, G>(ring + i * plan.stage_bytes, first + i * step, channel, p, plan, lane);
    commit_copies();
  }

  const T* const weight = static_cast<const T*>(p.weight) + static_cast<int64_t>(c) * s.kh * s.kw;
  expand_filter<T, WINDOW, false>(filter, weight, s.kh, s.kw, warp, warps, lane);
  __syncthreads();

  const ChannelConstants k = constants_of(p, c);
  const InputAffine affine = affine_of(p.affine, c, p.shape.c);
  RunningMoments moments;
  float shift4[4];
  four_registers(shift4, k.shift);
  const uint32_t own[2] = {identity<T>(0, G::OFFSET, lane), identity<T>(1, G::OFFSET, lane)};

  // ldmatrix: lane i brings row i % 16 of the product, of filter row i / 16 of a pair
  const int m = lane % 16, second = lane / 16, image = G::IMAGES == 2 ? m / 8 * 2 * plan.half_plane : 0;
  const auto at_row = [&](int r) { return image + row_offset(row_of<G::IMAGES>(m) + r, plan.half_plane, G::PITCH); };
  const int pair_at[2] = {at_row(second), at_row(second + 2)};
  // results: this lane's rows m = lane / 4 and m + 8 of a product
  const int other = G::IMAGES == 2 ? 2 * plan.half_plane : 8 * G::PITCH;

  int stage = 0;
  for (int unit = first; unit < plan.units; unit += step) {
    wait_for_copies<MmaPlan::kStages - 1>();
    unsigned char* const tile = ring + stage * plan.stage_bytes;
    const Where at = where(unit, plan, G::IMAGES, G::ROWS, G::ROWS);
    if (p.affine)  // on the blocks that this lane has loaded itself
      each_block<G>(tile, at, s, plan, lane, [&](unsigned char* to, int n, int y, int x) {
        if (n < s.n && y >= 0 && y < s.h) affine_on_load<T>(to, -x, s.w - x, affine, p.in_act);
      });
    __syncwarp();

    const uint32_t tile_address = shared_address(tile);
    float acc[2][NT][4];  // rows S(m), and S(m) + 2
#pragma unroll
    for (int i = 0; i < 2 * NT * 4; ++i) (&acc[0][0][0])[i] = k.bias;

    convolve<T, G>(acc, tile_address, pair_at, filter, pairs, lane);
    if (!p.partials) activate<T, 2 * NT * 4>(&acc[0][0][0], p.act);

    // the results take the place of the rows that their residuals come from
#pragma unroll
    for (int set = 0; set < 2; ++set) {
      uint32_t in[G::OWN_BLOCKS + 1][2];
      if (p.residual) {
#pragma unroll
        for (int b = 0; b < G::OWN_BLOCKS; b += 2) {  // two blocks at once; the last may be alone
          uint32_t two[4];
          load_matrices(
              two, tile_address + at_row(before + 2 * set) + 16 * (G::OWN + b + (b + 1 < G::OWN_BLOCKS ? second : 0)));
          in[b][0] = two[0], in[b][1] = two[1], in[b + 1][0] = two[2], in[b + 1][1] = two[3];
        }
      }
      __syncwarp();
      const int to_row = row_offset(row_of<1>(lane / 4) + before + 2 * set, plan.half_plane, G::PITCH);
#pragma unroll
      for (int i = 0; i < NT; ++i) {
        float rest[4] = {shift4[0], shift4[1], shift4[2], shift4[3]};
        if (p.residual) {
          multiply_k8<T>(rest, in[i], &own[0], rest);
          if (G::OFFSET) multiply_k8<T>(rest, in[i + 1], &own[1], rest);
        }
        unsigned char* const to = tile + to_row + 16 * i + 4 * (lane % 4);
        const float* const v = acc[set][i];
        put(to, pack<T>(fmaf(v[0], k.scale, rest[0]), fmaf(v[1], k.scale, rest[1])));
        put(to + other, pack<T>(fmaf(v[2], k.scale, rest[2]), fmaf(v[3], k.scale, rest[3])));
      }
    }
    __syncwarp();

    T* const to = static_cast<T*>(p.y) + c * p.y_stride.c;
#pragma unroll
    for (int i = 0; i < G::IMAGES; ++i) {
      const unsigned char* from =
          tile + i * 2 * plan.half_plane + row_offset(lane / NT + before, plan.half_plane, G::PITCH) + lane % NT * 16;
#pragma unroll 2
      for (int r = lane / NT; r < G::ROWS; r += 32 / NT, from += 8 / NT * G::FOUR_ROWS)
        if (at.n + i < s.n && at.y + r < s.h) {
          const int x = at.x + lane % NT * 8;
          const uint4 v = get<uint4>(from);
          store8_words(to + (at.n + i) * p.y_stride.n + (at.y + r) * p.y_stride.h, x, s.w, v, plan.store_bytes);
          if (p.partials && x < s.w) add_moments<T>(moments, v, s.w - x, p.act);
        }
    }
    __syncwarp();  // the stage is free
    if (unit + MmaPlan::kStages * step < plan.units)
      load<T, G>(tile, unit + MmaPlan::kStages * step, channel, p, plan, lane);
    commit_copies();
    stage = stage + 1 == MmaPlan::kStages ? 0 : stage + 1;
  }
  wait_for_copies<0>();
  store_moments(moments, p, split * warps + warp, c, lane);
}

template <class T, int NT>
cudaError_t launch_window(const DepthwiseForward& p, const MmaPlan& plan, cudaStream_t stream) {
  switch (plan.window) {
    case 2: return launch_mma(depthwise_fwd_mma_kernel<T, NT, 2>, p, plan, stream);
    case 3: return launch_mma(depthwise_fwd_mma_kernel<T, NT, 3>, p, plan, stream);
    case 4: return launch_mma(depthwise_fwd_mma_kernel<T, NT, 4>, p, plan, stream);
    case 5: return launch_mma(depthwise_fwd_mma_kernel<T, NT, 5>, p, plan, stream);
    default: return cudaErrorInvalidValue;
  }
}

template <class T>
cudaError_t launch_tile(const DepthwiseForward& p, const MmaPlan& plan, cudaStream_t stream) {
  return plan.column_tiles == 2 ? launch_window<T, 2>(p, plan, stream) : launch_window<T, 4>(p, plan, stream);
}

}  // namespace

cudaError_t depthwise_fwd_mma(const DepthwiseForward& p, const MmaPlan& plan, cudaStream_t stream) {
  if (!plan.blocks) return cudaErrorInvalidValue;
  return p.shape.dtype == Dtype::bfloat16 ? launch_tile<bf16>(p, plan, stream) : launch_tile<fp16>(p, plan, stream);
}

}  // namespace cmx
