// y = scale * act(y + bias) + shift in place, float32: what follows a convolution of torch's own (cuDNN, with its TF32 flag).
//
// y is dense: a warp takes a row, a plane with one channel's constants, or the channels of a pixel of channels_last.
#include "epilogue.cuh"
#include "product.h"

namespace cmx {
namespace {

constexpr int LANES = 32, WARPS = 8;

__device__ __forceinline__ float constant(const float* v, int64_t c, float missing) { return v ? v[c] : missing; }

template <int LAST, int EACH>
__global__ void __launch_bounds__(LANES* WARPS) epilogue_inplace_kernel(const __grid_constant__ EpilogueInplace p) {
  const int lane = threadIdx.x % LANES;
  const int64_t step = static_cast<int64_t>(gridDim.x) * WARPS;
  for (int64_t row = static_cast<int64_t>(blockIdx.x) * WARPS + threadIdx.x / LANES; row < p.rows; row += step) {
    float* const y = p.y + row * p.columns;
    const int64_t c = row % p.channels;
#pragma unroll 2
    for (int64_t j = lane * EACH; j < p.columns; j += LANES * EACH) {
      float v[EACH];
      if constexpr (EACH == 4) {
        const float4 four = get<float4>(y + j);
        v[0] = four.x, v[1] = four.y, v[2] = four.z, v[3] = four.w;
      } else {
        v[0] = y[j];
      }
#pragma unroll
      for (int i = 0; i < EACH; ++i) v[i] += constant(p.bias, LAST ? j + i : c, 0.f);
      activate<float, EACH>(v, p.act);
#pragma unroll
      for (int i = 0; i < EACH; ++i)
        v[i] = fmaf(v[i], constant(p.scale, LAST ? j + i : c, 1.f), constant(p.shift, LAST ? j + i : c, 0.f));
      if constexpr (EACH == 4)
        put(y + j, make_float4(v[0], v[1], v[2], v[3]));
      else
        y[j] = v[0];
    }
  }
}

template <int LAST>
cudaError_t launch_layout(const EpilogueInplace& p, int blocks, cudaStream_t stream) {
  const bool vector = access_bytes(p.y, {p.columns}, 4) == 16;
  const Launch how{.grid = blocks, .threads = LANES * WARPS, .stream = stream, .chained = false};
  return launch(vector ? epilogue_inplace_kernel<LAST, 4> : epilogue_inplace_kernel<LAST, 1>, how, p);
}

}  // namespace

cudaError_t epilogue_inplace(const EpilogueInplace& p, const Gpu& gpu, cudaStream_t stream) {
  const int blocks = static_cast<int>(std::min<int64_t>(ceil_div(p.rows, WARPS), 32 * gpu.multiprocessors));
  return p.channels_last ? launch_layout<1>(p, blocks, stream) : launch_layout<0>(p, blocks, stream);
}

}  // namespace cmx
