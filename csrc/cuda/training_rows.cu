// Elementwise work and sums per channel between the products: four passes that read what they need once.
//
// Neighbouring threads take neighbouring numbers, 16 bytes each: of the pixels of one channel or, where channels lie side by
// side, of the channels of one pixel. A block keeps its channels; its threads' sums are added in their order.
#include "moments.cuh"
#include "neighbours.cuh"
#include "training.h"

namespace cmx {
namespace {

constexpr int THREADS = RowsPlan::kThreads;

template <class T>
constexpr int kNumbers = 16 / sizeof(T);  // of a unit

// The first `valid` numbers of a unit, zeros behind them; WHOLE: all, in one access. `bytes`: 8 where `valid` is 4 or 8
template <class T, bool WHOLE>
__device__ __forceinline__ void load_unit(float* v, const void* data, int64_t at, int valid, int bytes) {
  const T* const from = static_cast<const T*>(data) + at;
  if constexpr (WHOLE && sizeof(T) == 4) {
    load4(v, from);
  } else if constexpr (WHOLE) {
    unpack8<T>(v, get<uint4>(from));
  } else {
#pragma unroll
    for (int j = 0; j < kNumbers<T>; ++j) v[j] = bytes != 8 && j < valid ? to_float(from[j]) : 0.f;
    if constexpr (sizeof(T) == 2)
#pragma unroll
      for (int j = 0; j < 8; j += 4)
        if (bytes == 8 && j < valid) load4_vector(v + j, from + j);
  }
}

template <class T, bool WHOLE>
__device__ __forceinline__ void store_unit(void* data, int64_t at, const float* v, int valid, int bytes) {
  T* const to = static_cast<T*>(data) + at;
  if constexpr (WHOLE) {
    uint4 words;
    if constexpr (sizeof(T) == 4)
      memcpy(&words, v, 16);
    else
      words = make_uint4(pack<T>(v[0], v[1]), pack<T>(v[2], v[3]), pack<T>(v[4], v[5]), pack<T>(v[6], v[7]));
    store16(to, words);
  } else {
#pragma unroll
    for (int j = 0; j < kNumbers<T>; ++j)
      if (bytes != 8 && j < valid) to[j] = from_float<T>(v[j]);
    if constexpr (sizeof(T) == 2)
#pragma unroll
      for (int j = 0; j < 8; j += 4)
        if (bytes == 8 && j < valid) put(to + j, make_uint2(pack<T>(v[j], v[j + 1]), pack<T>(v[j + 2], v[j + 3])));
  }
}

// Where a thread's unit lies in a tensor, and how far on the next one, in this image or in a later one
struct Place {
  int64_t at, step, over;

  __device__ __forceinline__ Place(const RowStrides& s, const RowsPlan& plan, int64_t n, int c, int64_t unit,
                                   int pixels) {
    const int64_t of_unit = pixels * s.p;
    at = n * s.n + c * s.c + unit * of_unit;
    step = plan.step_images * s.n + plan.step_units * of_unit;
    over = step + s.n - plan.of_image * of_unit;
  }
  __device__ __forceinline__ void go_on(bool into_next_image) { at += into_next_image ? over : step; }
};

// X of N numbers, to be stored in T: (act(x) - mean) * scale + shift, of one channel or one each
template <class T, int N, int CHANNELS>
__device__ __forceinline__ void apply(float* v, const InputAffine (&affine)[CHANNELS], bool wanted, Act act) {
  if (!wanted) return;
  activate<T, N>(v, act);
#pragma unroll
  for (int j = 0; j < N; ++j) v[j] = affine[j % CHANNELS](v[j]);
}

template <RowsMode MODE>
__device__ __forceinline__ PartMoments combine(const PartMoments& a, const PartMoments& b) {
  if constexpr (MODE == RowsMode::moments) return merge(a, b);
  return {a.count + b.count, a.mean + b.mean, 0.f};
}

template <class T, int WHAT, bool ALONG_CHANNELS, bool WHOLE>
__global__ void __launch_bounds__(THREADS, (ALONG_CHANNELS ? 4 : 7) - !WHOLE)
    training_rows_kernel(const __grid_constant__ Rows p, const __grid_constant__ RowsPlan plan) {
  constexpr RowsMode MODE = static_cast<RowsMode>(WHAT);
  constexpr int N = kNumbers<T>, CHANNELS = ALONG_CHANNELS ? N : 1;            // of a thread's units
  constexpr int SUMS = ALONG_CHANNELS ? N : 4, STEP = ALONG_CHANNELS ? 1 : N;  // pixels from unit to unit
  CMX_DYNAMIC_SHARED(shared);
  const int lane_c = threadIdx.x % plan.lanes_c, lane_u = threadIdx.x / plan.lanes_c, lanes_u = THREADS / plan.lanes_c;
  const int group = blockIdx.x % plan.groups, split = blockIdx.x / plan.groups;
  const int c = (group * plan.lanes_c + lane_c) * CHANNELS, left_c = p.c - c;
  const int channels = left_c < 0 ? 0 : left_c < CHANNELS ? left_c : CHANNELS;

  InputAffine affine[2][CHANNELS];
  GradientAffine gradient[CHANNELS];
#pragma unroll
  for (int j = 0; j < CHANNELS; ++j) {
    const int channel = j < channels ? c + j : c;
    if (!channels) continue;
    if constexpr (MODE == RowsMode::gradient) {
      gradient[j] = gradient_affine(p.rows[0], channel, p.c);
    } else if constexpr (MODE != RowsMode::moments) {
      affine[0][j] = affine_of(p.rows[0], channel, p.c);
      affine[1][j] = affine_of(p.rows[1], channel, p.c);
    }
  }

  RunningMoments running[MODE == RowsMode::moments ? CHANNELS : 1];
  float sums[2][SUMS] = {};
  const int64_t units = channels ? p.n * plan.of_image : 0, step = static_cast<int64_t>(plan.splits) * lanes_u;
  int64_t unit = static_cast<int64_t>(split) * lanes_u + lane_u, i = unit % plan.of_image;
  Place in(p.in_stride, plan, unit / plan.of_image, c, i, STEP),
      out(p.out_stride, plan, unit / plan.of_image, c, i, STEP);
  while (unit < units) {
    const int64_t left = p.pixels - i * STEP;
    const int valid = WHOLE ? N : ALONG_CHANNELS ? channels : left < N ? static_cast<int>(left) : N;
    float v[N], w[N];
    load_unit<T, WHOLE>(v, p.in[0], in.at, valid, plan.bytes);
    if (p.in[1]) load_unit<T, WHOLE>(w, p.in[1], in.at, valid, plan.bytes);
    if constexpr (MODE == RowsMode::sum) {
      apply<T, N>(v, affine[0], p.rows[0], p.act);
      if (p.in[1]) {
        apply<T, N>(w, affine[1], p.rows[1], p.act);
#pragma unroll
        for (int j = 0; j < N; ++j) v[j] += w[j];
      }
      store_unit<T, WHOLE>(p.out, out.at, v, valid, plan.bytes);
    } else if constexpr (MODE == RowsMode::gradient) {
      float slope[N];
      activate_with_slope<N>(w, slope, p.act);
#pragma unroll
      for (int j = 0; j < N; ++j) v[j] = pre_gradient(v[j], w[j], slope[j], gradient[j % CHANNELS]);
      zeros_of_relu<N>(v, slope, p.act);
      store_unit<T, WHOLE>(p.out, out.at, v, valid, plan.bytes);
#pragma unroll
      for (int j = 0; j < N; ++j)
        if (j < valid) sums[0][j % SUMS] += v[j];
    } else if constexpr (MODE == RowsMode::moments) {
      activate<float, N>(v, p.act);
      if constexpr (ALONG_CHANNELS) {
#pragma unroll
        for (int j = 0; j < N; ++j)
          if (j < valid) running[j].template add<1>(v + j, 1);
      } else {
        running[0].template add<N>(v, valid);
      }
    } else {  // v: the gradient, zero where there is none; w: the pre-activation
      activate<float, N>(w, p.act);
#pragma unroll
      for (int j = 0; j < N; ++j)
        sums[0][j % SUMS] += v[j],
            sums[1][j % SUMS] = fmaf(v[j], w[j] - affine[1][j % CHANNELS].mean, sums[1][j % SUMS]);
    }
    unit += step, i += plan.step_units;
    const bool into_next_image = i >= plan.of_image;
    if (into_next_image) i -= plan.of_image;
    in.go_on(into_next_image), out.go_on(into_next_image);
  }
  if constexpr (MODE == RowsMode::sum) return;

  PartMoments* const all = reinterpret_cast<PartMoments*>(shared) + lane_c * SUMS;  // [lane_u][lane_c][SUMS]
  const int row = plan.lanes_c * SUMS;
#pragma unroll
  for (int j = 0; j < SUMS; ++j) {
    const RunningMoments none{};
    if constexpr (MODE == RowsMode::moments)
      all[lane_u * row + j] = (j < CHANNELS ? running[j % CHANNELS] : none).result();
    else
      all[lane_u * row + j] = PartMoments{sums[0][j], sums[1][j], 0.f};
  }
  for (int step = 1; step < lanes_u; step *= 2) {
    __syncthreads();
    if (lane_u % (2 * step) == 0 && lane_u + step < lanes_u)
#pragma unroll
      for (int j = 0; j < SUMS; ++j)
        all[lane_u * row + j] = combine<MODE>(all[lane_u * row + j], all[(lane_u + step) * row + j]);
  }
  if (lane_u != 0 || !channels) return;
  if (!ALONG_CHANNELS) all[0] = combine<MODE>(combine<MODE>(all[0], all[1]), combine<MODE>(all[2], all[3]));
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

template <class T, bool ALONG_CHANNELS, bool WHOLE>
cudaError_t launch_mode(const Rows& p, const RowsPlan& plan, cudaStream_t stream) {
  constexpr int kShared = THREADS * (ALONG_CHANNELS ? kNumbers<T> : 4) * sizeof(PartMoments);
  const auto run = [&](auto kernel) {
    const Launch how{
        .grid = plan.blocks, .threads = THREADS, .shared_bytes = kShared, .stream = stream, .chained = false};
    return launch(kernel, how, p, plan);
  };
  switch (p.mode) {
    case RowsMode::sum: return run(training_rows_kernel<T, 0, ALONG_CHANNELS, WHOLE>);
    case RowsMode::gradient: return run(training_rows_kernel<T, 1, ALONG_CHANNELS, WHOLE>);
    case RowsMode::moments: return run(training_rows_kernel<T, 2, ALONG_CHANNELS, WHOLE>);
    case RowsMode::sums: return run(training_rows_kernel<T, 3, ALONG_CHANNELS, WHOLE>);
  }
  return cudaErrorInvalidValue;
}

template <class T>
cudaError_t launch_layout(const Rows& p, const RowsPlan& plan, cudaStream_t stream) {
  if (plan.bytes == 16)
    return plan.along_channels ? launch_mode<T, true, true>(p, plan, stream)
                               : launch_mode<T, false, true>(p, plan, stream);
  return plan.along_channels ? launch_mode<T, true, false>(p, plan, stream)
                             : launch_mode<T, false, false>(p, plan, stream);
}

}  // namespace

cudaError_t training_rows(const Rows& p, const RowsPlan& plan, cudaStream_t stream) {
  if (!plan.blocks) return cudaSuccess;
  switch (p.dtype) {
    case Dtype::float32: return launch_layout<float>(p, plan, stream);
    case Dtype::float16: return launch_layout<fp16>(p, plan, stream);
    case Dtype::bfloat16: return launch_layout<bf16>(p, plan, stream);
  }
  return cudaErrorInvalidValue;
}

}  // namespace cmx
