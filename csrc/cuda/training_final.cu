// The second stage of every reduction: the blocks' parts, in their order, in float64. Small beside the first. And BatchNorm,
// which stands between these and the next operator.
#include "platform.cuh"
#include "training.h"

namespace cmx {
namespace {

constexpr int THREADS = 128;

// The sum over the block, in every thread
__device__ __forceinline__ double block_sum(double* shared, double v) {
  shared[threadIdx.x] = v;
  for (int step = THREADS / 2; step; step /= 2) {
    __syncthreads();
    if (static_cast<int>(threadIdx.x) < step) shared[threadIdx.x] += shared[threadIdx.x + step];
  }
  __syncthreads();
  const double sum = shared[0];
  __syncthreads();
  return sum;
}

__global__ void __launch_bounds__(THREADS)
    moments_final_kernel(const float* partials, int64_t parts, int c_count, float* moments) {
  CMX_DYNAMIC_SHARED(bytes);
  double* const shared = reinterpret_cast<double*>(bytes);
  const int c = blockIdx.x;
  double count = 0, sum = 0, squares = 0;
  for (int64_t i = threadIdx.x; i < parts; i += THREADS) {
    const float* const from = partials + (i * c_count + c) * 3;
    count += from[0], sum += static_cast<double>(from[0]) * from[1];
  }
  count = block_sum(shared, count);
  const double mean = block_sum(shared, sum) / count;
  for (int64_t i = threadIdx.x; i < parts; i += THREADS) {
    const float* const from = partials + (i * c_count + c) * 3;
    const double d = from[1] - mean;
    squares += from[2] + from[0] * d * d;
  }
  squares = block_sum(shared, squares);
  if (threadIdx.x == 0) {
    moments[c] = static_cast<float>(mean);
    moments[c_count + c] = static_cast<float>(squares / count);
  }
}

__global__ void __launch_bounds__(THREADS)
    channel_sums_final_kernel(const float* partials, int64_t parts, int c_count, float* sums) {
  CMX_DYNAMIC_SHARED(bytes);
  double* const shared = reinterpret_cast<double*>(bytes);
  const int c = blockIdx.x;
  double first = 0, second = 0;
  for (int64_t i = threadIdx.x; i < parts; i += THREADS) {
    const float* const from = partials + (i * c_count + c) * 2;
    first += from[0], second += from[1];
  }
  first = block_sum(shared, first), second = block_sum(shared, second);
  if (threadIdx.x == 0) sums[c] = static_cast<float>(first), sums[c_count + c] = static_cast<float>(second);
}

__global__ void __launch_bounds__(THREADS) sums_final_kernel(const __grid_constant__ SumsFinal p) {
  const int64_t all = p.count[0] + p.count[1] + p.count[2];
  int64_t i = static_cast<int64_t>(blockIdx.x) * THREADS + threadIdx.x;
  if (i >= all) return;
  const float* from = p.partials + i;
  int which = 0;
  while (i >= p.count[which]) i -= p.count[which++];
  float* const to = p.out[which];
  if (!to) return;
  double sum = 0;
  for (int64_t part = 0; part < p.parts; ++part, from += all) sum += *from;
  to[i] = static_cast<float>(sum);
}

template <class P>
__global__ void __launch_bounds__(THREADS) batchnorm_kernel(const __grid_constant__ P p) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * THREADS + threadIdx.x;
  if (i < p.c) p.channel(i);
}

template <class P>
cudaError_t launch_channels(const P& p, cudaStream_t stream) {
  if (!p.c) return cudaSuccess;
  const int64_t blocks = ceil_div(p.c, THREADS);
  if (blocks > INT32_MAX) return cudaErrorInvalidValue;
  return launch(batchnorm_kernel<P>, {.grid = blocks, .threads = THREADS, .stream = stream, .chained = false}, p);
}

}  // namespace

cudaError_t batchnorm_channels(const BatchNormRows& p, cudaStream_t stream) { return launch_channels(p, stream); }
cudaError_t batchnorm_channels(const BatchNormGradients& p, cudaStream_t stream) { return launch_channels(p, stream); }

cudaError_t moments_final(const float* partials, int64_t parts, int c, float* moments, cudaStream_t stream) {
  if (!c) return cudaSuccess;
  const Launch how{.grid = c, .threads = THREADS, .shared_bytes = 8 * THREADS, .stream = stream, .chained = false};
  return launch(moments_final_kernel, how, partials, parts, c, moments);
}

cudaError_t channel_sums_final(const float* partials, int64_t parts, int c, float* sums, cudaStream_t stream) {
  if (!c) return cudaSuccess;
  const Launch how{.grid = c, .threads = THREADS, .shared_bytes = 8 * THREADS, .stream = stream, .chained = false};
  return launch(channel_sums_final_kernel, how, partials, parts, c, sums);
}

cudaError_t sums_final(const SumsFinal& p, cudaStream_t stream) {
  const int64_t all = p.count[0] + p.count[1] + p.count[2];
  if (!all) return cudaSuccess;
  const int64_t blocks = ceil_div(all, THREADS);
  if (blocks > INT32_MAX) return cudaErrorInvalidValue;
  return launch(sums_final_kernel, {.grid = blocks, .threads = THREADS, .stream = stream, .chained = false}, p);
}

}  // namespace cmx
