// Elementwise work and sums per channel between the products: four passes that read what they need once.
//
// Neighbouring threads take neighbouring numbers, four at a time: of the pixels of one channel, or, where channels lie
// side by side, of the channels of one pixel. A block keeps its channels; its threads' sums are added in their order.
#include "moments.cuh"
#include "neighbours.cuh"
#include "training.h"

namespace cmx {
namespace {

constexpr int THREADS = RowsPlan::kThreads;

template <class T>
__device__ __forceinline__ void load4(float* v, const void* data, int64_t at, int valid, bool vector) {
  const T* const from = static_cast<const T*>(data) + at;
  if (vector) return load4_vector(v, from);
#pragma unroll
  for (int j = 0; j < 4; ++j) v[j] = j < valid ? to_float(from[j]) : 0.f;
}

template <class T>
__device__ __forceinline__ void store4(void* data, int64_t at, const float* v, int valid, bool vector) {
  T* const to = static_cast<T*>(data) + at;
  if (!vector) {
#pragma unroll
    for (int j = 0; j < 4; ++j)
      if (j < valid) to[j] = from_float<T>(v[j]);
  } else if constexpr (sizeof(T) == 4) {
    put(to, make_float4(v[0], v[1], v[2], v[3]));
  } else {
    put(to, make_uint2(pack<T>(v[0], v[1]), pack<T>(v[2], v[3])));
  }
}

__device__ __forceinline__ int64_t offset(const RowStrides& s, int64_t n, int c, int64_t pixel) {
  return n * s.n + c * s.c + pixel * s.p;
}

// X of four numbers: (act(x) - mean) * scale + shift
__device__ __forceinline__ void apply(float* v, const InputAffine* affine, bool wanted, Act act) {
  if (!wanted) return;
  activate<float, 4>(v, act);
#pragma unroll
  for (int j = 0; j < 4; ++j) v[j] = affine[j](v[j]);
}

template <RowsMode MODE>
__device__ __forceinline__ PartMoments combine(const PartMoments& a, const PartMoments& b) {
  if constexpr (MODE == RowsMode::moments) return merge(a, b);
  return {a.count + b.count, a.mean + b.mean, 0.f};
}

template <class T, int WHAT>
__global__ void __launch_bounds__(THREADS, 8)
    training_rows_kernel(const __grid_constant__ Rows p, const __grid_constant__ RowsPlan plan) {
  constexpr RowsMode MODE = static_cast<RowsMode>(WHAT);
  CMX_DYNAMIC_SHARED(shared);
  const bool along_channels = plan.lanes_c > 1;
  const int lane_c = threadIdx.x % plan.lanes_c, lane_u = threadIdx.x / plan.lanes_c, lanes_u = THREADS / plan.lanes_c;
  const int group = blockIdx.x % plan.groups, split = blockIdx.x / plan.groups;
  const int c = along_channels ? (group * plan.lanes_c + lane_c) * 4 : group;
  const int channels = c >= p.c ? 0 : along_channels ? (p.c - c < 4 ? p.c - c : 4) : 1;

  InputAffine affine[2][4];
  GradientAffine gradient[4];
#pragma unroll
  for (int j = 0; j < 4; ++j) {
    const int channel = j < channels ? c + j : c;
    if (!channels) continue;
    if constexpr (MODE == RowsMode::gradient) {
      gradient[j] = gradient_affine(p.rows[0], channel, p.c);
    } else if constexpr (MODE != RowsMode::moments) {
      affine[0][j] = affine_of(p.rows[0], channel, p.c);
      affine[1][j] = affine_of(p.rows[1], channel, p.c);
    }
  }

  RunningMoments running[MODE == RowsMode::moments ? 4 : 1];
  float sums[2][4] = {};
  if (channels) {
    const int64_t per_image = along_channels ? p.pixels : (p.pixels + 3) / 4, units = p.n * per_image;
    for (int64_t unit = static_cast<int64_t>(split) * lanes_u + lane_u; unit < units;
         unit += static_cast<int64_t>(plan.splits) * lanes_u) {
      const int64_t n = unit / per_image, i = unit % per_image, pixel = along_channels ? i : 4 * i;
      const int valid = along_channels ? channels : p.pixels - pixel < 4 ? static_cast<int>(p.pixels - pixel) : 4;
      float v[4], w[4];
      load4<T>(v, p.in[0], offset(p.in_stride[0], n, c, pixel), valid, plan.vector);
      if (p.in[1]) load4<T>(w, p.in[1], offset(p.in_stride[1], n, c, pixel), valid, plan.vector);
      if constexpr (MODE == RowsMode::sum) {
        apply(v, affine[0], p.rows[0], p.act);
        if (p.in[1]) {
          apply(w, affine[1], p.rows[1], p.act);
#pragma unroll
          for (int j = 0; j < 4; ++j) v[j] += w[j];
        }
        store4<T>(p.out, offset(p.out_stride, n, c, pixel), v, valid, plan.vector);
      } else if constexpr (MODE == RowsMode::gradient) {
        float slope[4];
        activate_with_slope<4>(w, slope, p.act);
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          v[j] = pre_gradient(v[j], w[j], slope[j], gradient[j], p.act);
          sums[0][j] += j < valid ? v[j] : 0.f;
        }
        store4<T>(p.out, offset(p.out_stride, n, c, pixel), v, valid, plan.vector);
      } else if constexpr (MODE == RowsMode::moments) {
        activate<float, 4>(v, p.act);
        if (along_channels) {
#pragma unroll
          for (int j = 0; j < 4; ++j)
            if (j < valid) running[j].template add<1>(v + j, 1);
        } else {
          running[0].template add<4>(v, valid);
        }
      } else {  // v: the gradient, w: the pre-activation
        activate<float, 4>(w, p.act);
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          const float g = j < valid ? v[j] : 0.f;
          sums[0][j] += g, sums[1][j] = fmaf(g, w[j] - affine[1][j].mean, sums[1][j]);
        }
      }
    }
  }
  if constexpr (MODE == RowsMode::sum) return;

  PartMoments* const all = reinterpret_cast<PartMoments*>(shared) + lane_c * 4;  // [lane_u][lane_c][4]
  const int row = plan.lanes_c * 4;
#pragma unroll
  for (int j = 0; j < 4; ++j)
    all[lane_u * row + j] = MODE == RowsMode::moments ? running[MODE == RowsMode::moments ? j : 0].result()
                                                      : PartMoments{sums[0][j], sums[1][j], 0.f};
  for (int step = 1; step < lanes_u; step *= 2) {
    __syncthreads();
    if (lane_u % (2 * step) == 0 && lane_u + step < lanes_u)
#pragma unroll
      for (int j = 0; j < 4; ++j)
        all[lane_u * row + j] = combine<MODE>(all[lane_u * row + j], all[(lane_u + step) * row + j]);
  }
  if (lane_u != 0 || !channels) return;
  if (!along_channels) all[0] = combine<MODE>(combine<MODE>(all[0], all[1]), combine<MODE>(all[2], all[3]));
  for (int j = 0; j < channels; ++j) {
    if constexpr (MODE == RowsMode::moments) {
      store_part(p.partials, split, p.c, c + j, all[j]);
    } else {
      constexpr int count = MODE == RowsMode::gradient ? 1 : 2;
      float* const to = p.partials + static_cast<int64_t>(split) * count * p.c + c + j;
      to[0] = all[j].count;
      if (count == 2) to[p.c] = all[j].mean;
    }
  }
}

template <class T>
cudaError_t launch_mode(const Rows& p, const RowsPlan& plan, cudaStream_t stream) {
  constexpr int kShared = THREADS * 4 * sizeof(PartMoments);
  const auto run = [&](auto kernel) {
    const Launch how{
        .grid = plan.blocks, .threads = THREADS, .shared_bytes = kShared, .stream = stream, .chained = false};
    return launch(kernel, how, p, plan);
  };
  switch (p.mode) {
    case RowsMode::sum: return run(training_rows_kernel<T, 0>);
    case RowsMode::gradient: return run(training_rows_kernel<T, 1>);
    case RowsMode::moments: return run(training_rows_kernel<T, 2>);
    case RowsMode::sums: return run(training_rows_kernel<T, 3>);
  }
  return cudaErrorInvalidValue;
}

}  // namespace

cudaError_t training_rows(const Rows& p, const RowsPlan& plan, cudaStream_t stream) {
  if (!plan.blocks) return cudaSuccess;
  switch (p.dtype) {
    case Dtype::float32: return launch_mode<float>(p, plan, stream);
    case Dtype::float16: return launch_mode<fp16>(p, plan, stream);
    case Dtype::bfloat16: return launch_mode<bf16>(p, plan, stream);
  }
  return cudaErrorInvalidValue;
}

}  // namespace cmx
