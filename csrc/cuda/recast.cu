// Kept 16-bit copies of weights: a warp reads the samples of a run, a 64th of it, and converts the run where they differ.
#include "recast.h"

#include "epilogue.cuh"

namespace cmx {
namespace {

constexpr int LANES = 32, WARPS = 8, EACH = kRecastSamples / LANES;

template <class T>
__global__ void __launch_bounds__(LANES* WARPS) recast_kernel(const __grid_constant__ Recast p) {
  const int lane = threadIdx.x % LANES, run = blockIdx.x * WARPS + threadIdx.x / LANES;
  if (run >= p.first_run[p.weights]) return;
  int i = 0;
  while (run >= p.first_run[i + 1]) ++i;
  const KeptWeight& w = p.weight[i];
  const int64_t of_weight = run - p.first_run[i], begin = of_weight * kRecastRun;
  const int count = static_cast<int>(w.count - begin < kRecastRun ? w.count - begin : kRecastRun);
  const float* const from = w.from + begin;
  T* const to = static_cast<T*>(w.to) + begin;
  uint32_t* const samples = w.samples + of_weight * kRecastSamples;
  uint32_t now[EACH];  // bits: a NaN is equal to itself
  int changed = p.all;
#pragma unroll
  for (int j = 0; j < EACH; ++j) {
    const int k = j * LANES + lane;
    if (k >= count) continue;
    now[j] = reinterpret_cast<const uint32_t*>(from)[k];
    changed |= now[j] != samples[k];
  }
#pragma unroll
  for (int bit = LANES / 2; bit; bit /= 2) changed |= __shfl_xor_sync(~0u, changed, bit);
  if (!changed) return;
#pragma unroll 4
  for (int k = lane; k < count; k += LANES) to[k] = from_float<T>(from[k]);
  __threadfence();  // who sees the new samples, on another stream, sees the run
  __syncwarp();
#pragma unroll
  for (int j = 0; j < EACH; ++j)
    if (j * LANES + lane < count) samples[j * LANES + lane] = now[j];
}

}  // namespace

cudaError_t recast(Recast p, cudaStream_t stream) {
  p.first_run[0] = 0;
  for (int i = 0; i < p.weights; ++i) {
    const int64_t next = p.first_run[i] + recast_runs(p.weight[i].count);
    if (next > INT32_MAX - WARPS) return cudaErrorInvalidValue;
    p.first_run[i + 1] = static_cast<int>(next);
  }
  const int blocks = static_cast<int>(ceil_div(p.first_run[p.weights], WARPS));
  if (blocks == 0) return cudaSuccess;
  const Launch how{.grid = blocks, .threads = LANES * WARPS, .stream = stream, .chained = false};
  return launch(p.dtype == Dtype::bfloat16 ? recast_kernel<bf16> : recast_kernel<fp16>, how, p);
}

}  // namespace cmx
