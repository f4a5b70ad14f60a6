// The activations by themselves: what they compute before it is rounded (emulated), and in how many instructions (nvcc).
#include "cuda/epilogue.cuh"

namespace cmx {

constexpr int NUMBERS = 64;  // of a thread: what surrounds them counts little for each

// act of numbers, for a result of type T, behind them; with SLOPE the derivative behind that
template <class T, int ACT, int SLOPE>
__global__ void __launch_bounds__(32) activation_kernel(float* all) {
  float v[NUMBERS], slope[NUMBERS];
#pragma unroll
  for (int i = 0; i < NUMBERS; ++i) v[i] = all[32 * i + threadIdx.x];
  if constexpr (SLOPE)
    activate_with_slope<NUMBERS>(v, slope, static_cast<Act>(ACT));
  else
    activate<T, NUMBERS>(v, static_cast<Act>(ACT));
#pragma unroll
  for (int i = 0; i < NUMBERS; ++i) {
    all[32 * (NUMBERS + i) + threadIdx.x] = v[i];
    if constexpr (SLOPE) all[32 * (2 * NUMBERS + i) + threadIdx.x] = slope[i];
  }
}

#ifdef CMX_EMULATED
// GELU of 32 * NUMBERS numbers, for results of `bytes`, behind them
extern "C" __attribute__((visibility("default"))) int cmx_gelu(float* numbers, int bytes) {
  constexpr int GELU = static_cast<int>(Act::gelu);
  return launch(bytes == 4 ? activation_kernel<float, GELU, 0> : activation_kernel<bf16, GELU, 0>,
                {1, 32, 0, nullptr, 1, false}, numbers);
}
#else
#define CMX_EACH(act)                                                \
  template __global__ void activation_kernel<float, act, 0>(float*); \
  template __global__ void activation_kernel<bf16, act, 0>(float*);  \
  template __global__ void activation_kernel<float, act, 1>(float*);
CMX_EACH(0)
CMX_EACH(1)
CMX_EACH(2)
CMX_EACH(3)
#endif

}  // namespace cmx
