// Gradients of the depthwise convolution on the float32 pipes, in one pass: any dtype, kernel, size and strides.
//
// A block owns a few channels and every splits-th of their tiles. For each tile it brings da with its halo and act(x) - mean
// without, as float32, into shared memory. With the filter turned by 180 degrees (ky', kx'), both gradients slide over da:
//   dx[i][j] += weight[ky'][kx'] * da[i + ky'][j + kx']             a thread: 4 rows x 8 columns of one channel
//   dweight[ky'][kx'] += x'[i][j] * da[i + ky'][j + kx']            a thread: a filter row, every row_parts-th row of the tile
// The sums of the second, of da and of dx stay in registers over all tiles of the block; at the end they are added in the
// order of the threads and written as the block's part.
#include "depthwise_ffma.cuh"
#include "moments.cuh"

namespace cmx {
namespace {

constexpr int THREADS = BackwardPlan::kThreads;

// Calls f(channel, row, column of the tile, y, x) for every four neighbours of a tile that this thread brings
template <class F>
__device__ __forceinline__ void each_four(const Place& at, const FfmaPlan& plan, int lanes, int rows, int columns,
                                          int up, int left, const F& f) {
  const int at_once = plan.channels_first ? plan.channels : 1;
  const int ch0 = threadIdx.x % at_once, rest = threadIdx.x / at_once;
  const int four0 = rest % lanes, row0 = rest / lanes, row_step = THREADS / (at_once * lanes);
  if (row0 >= row_step) return;
  for (int ch = ch0; ch < at.channels; ch += at_once)
    for (int row = row0; row < rows; row += row_step)
      for (int column = four0 * 4; column < columns; column += lanes * 4)
        f(ch, row, column, at.y + row - up, at.x + column - left);
}

// da of the tile and its halo, zeros outside of the plane
template <class T>
__device__ __forceinline__ void load_gradient(float* tile, const Place& at, const DepthwiseGradients& p,
                                              const BackwardPlan& whole) {
  const DepthwiseShape& s = p.shape;
  const FfmaPlan& plan = whole.tile;
  each_four(at, plan, whole.load_lanes, plan.tile_rows, plan.pitch, s.kh / 2, plan.left,
            [&](int ch, int row, int column, int y, int x) {
              const int c = at.c + ch;
              const bool inside = y >= 0 && y < s.h;
              const T* const grad = static_cast<const T*>(p.grad) + at.n * p.grad_stride.n + c * p.grad_stride.c;
              const T* const a = static_cast<const T*>(p.a) + at.n * p.a_stride.n + c * p.a_stride.c;
              float v[4], pre[4];
              load_or_zeros<4>(v, grad + y * p.grad_stride.h, p.grad_stride.w, x, s.w, inside, plan.vector_loads);
              load_or_zeros<4>(pre, a + y * p.a_stride.h, p.a_stride.w, x, s.w, inside, plan.vector_loads);
              through_activation<4>(v, pre, gradient_affine(p.coefficients, c, s.c), p.act);
#pragma unroll
              for (int j = 0; j < 4; ++j) v[j] = inside && x + j >= 0 && x + j < s.w ? v[j] : 0.f;
              put(tile + ch * plan.channel_pitch + row * plan.pitch + column, make_float4(v[0], v[1], v[2], v[3]));
            });
}

// act(x) - mean of the tile, or x where there is no affine
template <class T>
__device__ __forceinline__ void load_input(float* tile, const Place& at, const DepthwiseGradients& p,
                                           const BackwardPlan& plan) {
  const DepthwiseShape& s = p.shape;
  each_four(at, plan.tile, plan.x_load_lanes, plan.tile.patches_y * ROWS, plan.x_pitch - 4, 0, 0,
            [&](int ch, int row, int column, int y, int x) {
              const int c = at.c + ch;
              const T* const from = static_cast<const T*>(p.x) + at.n * p.x_stride.n + c * p.x_stride.c;
              float v[4];
              load_or_zeros<4>(v, from + y * p.x_stride.h, p.x_stride.w, x, s.w, y < s.h, plan.tile.vector_loads);
              if (p.affine) {
                const float mean = p.affine[c];
                activate<float, 4>(v, p.act);
#pragma unroll
                for (int j = 0; j < 4; ++j) v[j] -= mean;
              }
              put(tile + ch * plan.x_channel_pitch + row * plan.x_pitch + column, make_float4(v[0], v[1], v[2], v[3]));
            });
}

// What a thread sums over the tiles of its channel
struct Sums {
  float da = 0, dx = 0, dx_centred = 0;
};

// One patch: sum of da, dx, its sums; and x' in the place of act(x) - mean. `da` and `x` are at the patch.
template <class T, int KW>
__device__ __forceinline__ void patch_gradient(Sums& sums, const float* da, float* x, const float* weights, int64_t n,
                                               int c, int y, int column, const DepthwiseGradients& p,
                                               const BackwardPlan& plan) {
  const DepthwiseShape& s = p.shape;
  const FfmaPlan& t = plan.tile;
#pragma unroll
  for (int i = 0; i < ROWS; ++i) {
    float v[COLUMNS];
    load4(v, da + (i + s.kh / 2) * t.pitch + t.left);
    load4(v + 4, da + (i + s.kh / 2) * t.pitch + t.left + 4);
#pragma unroll
    for (int j = 0; j < COLUMNS; ++j) sums.da += v[j];
  }
  float acc[ROWS * COLUMNS] = {};
  if (p.dx) convolve<KW>(acc, da, weights, s, t);
  const InputAffine affine = affine_of(p.affine, c, s.c);
#pragma unroll
  for (int i = 0; i < ROWS; ++i) {
    if (y + i >= s.h) {
      put(x + i * plan.x_pitch, make_float4(0, 0, 0, 0)), put(x + i * plan.x_pitch + 4, make_float4(0, 0, 0, 0));
      continue;
    }
    float centred[COLUMNS];
    load4(centred, x + i * plan.x_pitch);
    load4(centred + 4, x + i * plan.x_pitch + 4);
    if (p.dx) {
      float* const out = acc + i * COLUMNS;
      if (p.residual) {
        const T* const row =
            static_cast<const T*>(p.grad) + n * p.grad_stride.n + c * p.grad_stride.c + (y + i) * p.grad_stride.h;
        float grad[COLUMNS];
        load_or_zeros<4>(grad, row, p.grad_stride.w, column, s.w, true, t.vector_loads);
        load_or_zeros<4>(grad + 4, row, p.grad_stride.w, column + 4, s.w, true, t.vector_loads);
#pragma unroll
        for (int j = 0; j < COLUMNS; ++j) out[j] += grad[j];
      }
      T* const row = static_cast<T*>(p.dx) + n * p.dx_stride.n + c * p.dx_stride.c + (y + i) * p.dx_stride.h;
      store8(row, p.dx_stride.w, out, column, s.w, t.vector_stores);
#pragma unroll
      for (int j = 0; j < COLUMNS; ++j) {
        const float stored = column + j < s.w ? to_float(from_float<T>(out[j])) : 0.f;
        sums.dx += stored, sums.dx_centred = fmaf(stored, centred[j], sums.dx_centred);
      }
    }
#pragma unroll
    for (int j = 0; j < COLUMNS; ++j)
      centred[j] = column + j < s.w ? fmaf(centred[j], affine.scale, affine.shift) : 0.f;
    put(x + i * plan.x_pitch, make_float4(centred[0], centred[1], centred[2], centred[3]));
    put(x + i * plan.x_pitch + 4, make_float4(centred[4], centred[5], centred[6], centred[7]));
  }
}

// Taps of one filter row, as the weights lie: position FIRST + tap, from the start of `da`, which is at a multiple of four
template <int FIRST, int TAPS>
__device__ __forceinline__ void add_taps(float (&g)[TAPS], const float* da, const float* x, int part,
                                         const BackwardPlan& plan) {
  constexpr int WINDOW = (COLUMNS + FIRST + TAPS + 2) / 4 * 4;
  for (int row = part; row < plan.tile.patches_y * ROWS; row += plan.row_parts) {
    const float *d = da + row * plan.tile.pitch, *from = x + row * plan.x_pitch;
    for (int j = 0; j < plan.tile.patches_x * COLUMNS; j += COLUMNS) {
      float v[WINDOW], here[COLUMNS];
      load4(here, from + j), load4(here + 4, from + j + 4);
#pragma unroll
      for (int i = 0; i < WINDOW; i += 4) load4(v + i, d + j + i);
#pragma unroll
      for (int tap = 0; tap < TAPS; ++tap)
#pragma unroll
        for (int i = 0; i < COLUMNS; ++i) g[tap] = fmaf(here[i], v[i + FIRST + tap], g[tap]);
    }
  }
}

template <class T, int KW>
__global__ void __launch_bounds__(THREADS, 4)
    depthwise_bwd_ffma_kernel(const __grid_constant__ DepthwiseGradients p, const __grid_constant__ BackwardPlan plan) {
  constexpr int FIRST = KW ? (4 - KW / 2 % 4) % 4 : 0, TAPS = KW ? KW : BackwardPlan::kChunk;
  CMX_DYNAMIC_SHARED(shared);
  const DepthwiseShape& s = p.shape;
  const FfmaPlan& t = plan.tile;
  float* const da = reinterpret_cast<float*>(shared);
  float* const weights = da + t.channels * t.channel_pitch;
  float* const x = weights + t.channels * t.weight_channel_pitch;
  const int tid = threadIdx.x, group = blockIdx.x % t.groups, split = blockIdx.x / t.groups;

  const int patches = t.patches_x * t.patches_y;
  const int ch = t.channels_first ? tid % t.channels : tid / patches;
  const int patch = t.channels_first ? tid / t.channels : tid % patches;
  const int patch_y = patch / t.patches_x * ROWS, patch_x = patch % t.patches_x * COLUMNS;

  const int task = tid % plan.tasks, part = tid / plan.tasks;
  const int ky = task % s.kh, chunk = task / s.kh % plan.chunks, task_ch = task / (s.kh * plan.chunks);

  begin_chained();
  Place at = place_of(0, group, t, s);
  load_weights<T, true>(weights, p.weight, at, s, t);
  Sums sums;
  float g[TAPS] = {};
  for (int64_t unit = split; unit < t.units; unit += plan.splits) {
    at = place_of(unit, group, t, s);
    load_gradient<T>(da, at, p, plan);
    load_input<T>(x, at, p, plan);
    __syncthreads();
    if (ch < at.channels && patch < patches)
      patch_gradient<T, KW>(sums, da + ch * t.channel_pitch + patch_y * t.pitch + patch_x,
                            x + ch * plan.x_channel_pitch + patch_y * plan.x_pitch + patch_x,
                            weights + ch * t.weight_channel_pitch, at.n, at.c + ch, at.y + patch_y, at.x + patch_x, p,
                            plan);
    __syncthreads();  // x' is there
    if (p.need_weight && part < plan.row_parts && task_ch < at.channels)
      add_taps<FIRST, TAPS>(g, da + task_ch * t.channel_pitch + ky * t.pitch + chunk * BackwardPlan::kChunk,
                            x + task_ch * plan.x_channel_pitch, part, plan);
    __syncthreads();  // the tile is free
  }

  // the parts of this block: dweight [c][kh][kw], dbias [c], sums [2][c]
  const int taps = s.kh * s.kw;
  float* const out = p.partials + static_cast<int64_t>(split) * s.c * (taps + 3);
  float* const all = reinterpret_cast<float*>(shared);
  if (part < plan.row_parts) {
#pragma unroll
    for (int tap = 0; tap < TAPS; ++tap) all[(part * plan.tasks + task) * TAPS + tap] = g[tap];
  }
  __syncthreads();
  for (int i = tid; p.need_weight && i < plan.tasks * TAPS; i += THREADS) {
    const int of = i / TAPS, kx = (of / s.kh % plan.chunks) * BackwardPlan::kChunk + FIRST + i % TAPS - t.skip;
    const int c = at.c + of / (s.kh * plan.chunks);
    if (c >= s.c || kx < 0 || kx >= s.kw) continue;
    float sum = 0;
    for (int other = 0; other < plan.row_parts; ++other) sum += all[other * plan.tasks * TAPS + i];
    out[c * taps + taps - 1 - (of % s.kh * s.kw + kx)] = sum;
  }
  __syncthreads();
  const bool has_patch = ch < t.channels && patch < patches;
  float* const here = all + 3 * (ch * patches + patch);
  if (has_patch) here[0] = sums.da, here[1] = sums.dx, here[2] = sums.dx_centred;
  __syncthreads();
  if (has_patch && patch == 0 && at.c + ch < s.c) {
    float total[3] = {};
    for (int other = 0; other < patches; ++other)
#pragma unroll
      for (int i = 0; i < 3; ++i) total[i] += here[3 * other + i];
#pragma unroll
    for (int i = 0; i < 3; ++i) out[s.c * taps + i * s.c + at.c + ch] = total[i];
  }
}

}  // namespace

cudaError_t depthwise_bwd_ffma(const DepthwiseGradients& p, const BackwardPlan& plan, cudaStream_t stream) {
  return dispatch_ffma(p.shape, [&]<class T, int KW>() {
    return launch(depthwise_bwd_ffma_kernel<T, KW>, {plan.tile.blocks, THREADS, plan.shared_bytes, stream}, p, plan);
  });
}

}  // namespace cmx
