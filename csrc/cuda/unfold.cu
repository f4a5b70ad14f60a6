// Patches as rows of 16 bytes: a block brings the pixels of some neighbouring patches to shared memory, row by row as they
// lie, and stores them patch by patch: planes of patches (NCHW), or the numbers of a patch side by side (channels_last).
#include "unfold.h"

#include "ptx.cuh"

namespace cmx {
namespace {

constexpr int LANES = 32, WARPS = UnfoldPlan::kThreads / LANES;

template <int LAST, int EACH>
__device__ __forceinline__ void unfold_block(const Patches& p, int block, uint16_t* tile) {
  const int tile_x = block % p.plan.tiles, row_of_patches = block / p.plan.tiles;
  const int n = row_of_patches / p.h, i = row_of_patches % p.h, first = tile_x * p.plan.columns;
  const int left = p.w - first, columns = left < p.plan.columns ? left : p.plan.columns, width = columns * p.pw,
            rows = p.c * p.ph;
  const Strides& s = p.from_stride;
  const uint16_t* const from = static_cast<const uint16_t*>(p.from) + n * s.n + static_cast<int64_t>(i) * p.ph * s.h +
                               static_cast<int64_t>(first) * p.pw * s.w;
#pragma unroll 1
  for (int row = threadIdx.x / LANES, c = row / p.ph, a = row % p.ph; row < rows; row += WARPS, a += WARPS) {
    for (; a >= p.ph; a -= p.ph) ++c;
    const uint16_t* const line = from + c * s.c + a * s.h;
    uint16_t* const to = tile + row * p.plan.pitch;
    if (p.plan.vector_loads) {
#pragma unroll 1
      for (int j = threadIdx.x % LANES * 8; j < width; j += LANES * 8) copy_async<16>(to + j, line + j, true);
    } else {
#pragma unroll 4
      for (int j = threadIdx.x % LANES; j < width; j += LANES) put(to + j, get<uint16_t>(line + j * s.w));
    }
  }
  commit_copies();
  wait_for_copies<0>();
  __syncthreads();

  uint16_t* const to = static_cast<uint16_t*>(p.to) + n * p.image + (static_cast<int64_t>(i) * p.w + first) * p.pixel;
  const int along = LAST ? p.k / EACH : columns / EACH, lines = LAST ? columns : p.k;  // pieces side by side
  const int k_end = rows * p.pw, lines_step = UnfoldPlan::kThreads / along, step = UnfoldPlan::kThreads % along;
  int outer = static_cast<int>(threadIdx.x) / along, piece = static_cast<int>(threadIdx.x) % along;
#pragma unroll 1
  for (; outer < lines; outer += lines_step, piece += step) {
    if (piece >= along) {
      piece -= along;
      if (++outer == lines) break;
    }
    const int inner = piece * EACH;
    const int k = LAST ? inner : outer, j = LAST ? outer : inner;
    const int row = k / p.pw;
    int b = k - row * p.pw, at = row * p.plan.pitch + j * p.pw + b;
    uint16_t v[EACH];
#pragma unroll
    for (int e = 0; e < EACH; ++e) {
      v[e] = k + (LAST ? e : 0) < k_end ? get<uint16_t>(tile + at) : uint16_t(0);
      const bool next_row = LAST && ++b == p.pw;
      at += !LAST ? p.pw : next_row ? p.plan.pitch + 1 - p.pw : 1;
      if (next_row) b = 0;
    }
    uint16_t* const out = to + k * p.row + j * p.pixel;
    if constexpr (EACH == 8) {
      uint4 words;
      memcpy(&words, v, 16);
      put(out, words);
    } else {
      put(out, v[0]);
    }
  }
}

template <int LAST, int EACH>
__global__ void __launch_bounds__(UnfoldPlan::kThreads, 4) unfold_kernel(const __grid_constant__ Unfold p) {
  begin_chained();
  CMX_DYNAMIC_SHARED(memory);
  uint16_t* const tile = reinterpret_cast<uint16_t*>(memory);
  const int block = blockIdx.x, of_image = p.image.plan.blocks;
  if (block < of_image)
    unfold_block<LAST, EACH>(p.image, block, tile);
  else
    unfold_block<1, 8>(p.weight, block - of_image, tile);
}

}  // namespace

cudaError_t unfold(const Unfold& p, cudaStream_t stream) {
  const UnfoldPlan &image = p.image.plan, &weight = p.weight.plan;
  const int64_t blocks = int64_t(image.blocks) + weight.blocks;
  if (!image.blocks || blocks > INT32_MAX) return cudaErrorInvalidValue;
  const Launch how{.grid = static_cast<unsigned>(blocks),
                   .threads = UnfoldPlan::kThreads,
                   .shared_bytes = std::max(image.shared_bytes, weight.shared_bytes),
                   .stream = stream};
  if (p.image.row == 1) return launch(unfold_kernel<1, 8>, how, p);
  return launch(image.each == 8 ? unfold_kernel<0, 8> : unfold_kernel<0, 1>, how, p);
}

}  // namespace cmx
