// Depthwise convolution as products of small matrices: what both tensor-core kernels share.
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
__device__ __forceinline__ uint32_t weight_bits(const T* weight, bool inside) {
  return inside ? get<uint16_t>(weight) : 0u;
}

// This lane's two numbers of T for filter row `row` and block `b`: k = 2 (lane % 4) and the next, n = lane / 4
template <class T, int WINDOW>
__device__ __forceinline__ uint32_t toeplitz(const T* row, bool row_inside, int b, int kw, int lane) {
  const int kx = 8 * b + 2 * (lane % 4) - lane / 4 - 4 * (WINDOW - 1) + (kw - 1) / 2;
  const uint32_t low = weight_bits(row + kx, row_inside && kx >= 0 && kx < kw);
  const uint32_t high = weight_bits(row + kx + 1, row_inside && kx + 1 >= 0 && kx + 1 < kw);
  return low | high << 16;
}

// The same of the matrix that picks the columns of the outputs themselves: T[k][n] = (8 b + k == n + offset)
template <class T>
__device__ __forceinline__ uint32_t identity(int b, int offset, int lane) {
  constexpr uint32_t one = is_bf16<T> ? 0x3f80u : 0x3c00u;
  const int k = 8 * b + 2 * (lane % 4), wanted = lane / 4 + offset;
  return (k == wanted ? one : 0u) | (k + 1 == wanted ? one << 16 : 0u);
}

// v four times, in registers the compiler cannot know to be equal: it keeps them, as operands of a product, instead of
// rebuilding the four from one in front of every product
__device__ __forceinline__ void four_registers(float (&to)[4], float v) {
#pragma unroll
  for (int i = 0; i < 4; ++i) to[i] = __shfl_sync(ALL_LANES, v, i);
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

// Moments of eight outputs as they were stored, of which `valid` exist
template <class T>
__device__ __forceinline__ void add_moments(RunningMoments& moments, const uint4& words, int valid, Act act) {
  const float2 a = unpack<T>(words.x), b = unpack<T>(words.y), c = unpack<T>(words.z), d = unpack<T>(words.w);
  float v[8] = {a.x, a.y, b.x, b.y, c.x, c.y, d.x, d.y};
  activate<float, 8>(v, act);  // the sums are float32
  moments.add<8>(v, valid);
}

struct ChannelConstants {
  float bias, scale, shift;
};

__device__ __forceinline__ ChannelConstants constants_of(const DepthwiseForward& p, int c) {
  return {p.bias ? p.bias[c] : 0.f, p.scale ? p.scale[c] : 1.f, p.shift ? p.shift[c] : 0.f};
}

// This warp's part of its channel's moments
__device__ __forceinline__ void store_moments(const RunningMoments& moments, const DepthwiseForward& p, int part, int c,
                                              int lane) {
  if (!p.partials) return;
  const PartMoments all = merge_warp(moments.result());
  if (lane == 0) store_part(p.partials, part, p.shape.c, c, all);
}

template <class Kernel>
cudaError_t launch_mma(Kernel kernel, const DepthwiseForward& p, const MmaPlan& plan, cudaStream_t stream) {
  if (plan.shared_bytes > 48 << 10)
    if (cudaError_t error =
            cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, plan.shared_bytes))
      return error;
  CMX_LAUNCH(kernel, dim3(plan.blocks), dim3(32 * plan.warps), plan.shared_bytes, stream, p, plan);
  return cudaGetLastError();
}

}  // namespace cmx
