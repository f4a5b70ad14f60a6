// bias, scale and shift of many units: a thread takes a channel of one.
#include "fold.h"

#include "epilogue.cuh"

namespace cmx {
namespace {

constexpr int THREADS = 256;

template <class T>
__global__ void __launch_bounds__(THREADS) fold_kernel(const __grid_constant__ Fold p) {
  const int c = blockIdx.x * THREADS + threadIdx.x;
  if (c >= p.channels) return;
  const auto value = [&](int i) { return to_float(static_cast<const T*>(p.vector[blockIdx.y][i])[c]); };
  const float scale = value(3) / sqrtf(value(2) + p.eps);
  float* const row = p.rows + static_cast<int64_t>(blockIdx.y) * 3 * p.channels + c;
  row[0] = value(0);
  row[p.channels] = scale;
  row[2 * p.channels] = value(4) - value(1) * scale;
}

template <class T>
__global__ void __launch_bounds__(THREADS) widen_kernel(const __grid_constant__ Widen p) {
  const int c = blockIdx.x * THREADS + threadIdx.x;
  if (c >= p.channels) return;
  p.rows[static_cast<int64_t>(blockIdx.y) * p.channels + c] = to_float(static_cast<const T*>(p.vector[blockIdx.y])[c]);
}

Launch launch_of(int channels, int rows, cudaStream_t stream) {
  return {.grid = dim3(static_cast<unsigned>(ceil_div(channels, THREADS)), static_cast<unsigned>(rows)),
          .threads = THREADS,
          .stream = stream,
          .chained = false};
}

}  // namespace

cudaError_t widen(const Widen& p, cudaStream_t stream) {
  const Launch how = launch_of(p.channels, p.vectors, stream);
  return p.dtype == Dtype::bfloat16 ? launch(widen_kernel<bf16>, how, p) : launch(widen_kernel<fp16>, how, p);
}

cudaError_t fold(const Fold& p, cudaStream_t stream) {
  const Launch how = launch_of(p.channels, p.units, stream);
  switch (p.dtype) {
    case Dtype::float32: return launch(fold_kernel<float>, how, p);
    case Dtype::float16: return launch(fold_kernel<fp16>, how, p);
    default: return launch(fold_kernel<bf16>, how, p);
  }
}

}  // namespace cmx
