// What training needs beside the convolutions: statistics and gradients per channel. No torch, and no CUDA code.
#pragma once

#include <driver_types.h>

#include <algorithm>

#include "../batchnorm.h"
#include "../params.h"
#include "plan.h"

namespace cmx {

// partials [parts][c][3] (count, mean, sum of squared deviations) -> moments [2][c] (mean, biased variance); NaN of none
cudaError_t moments_final(const float* partials, int64_t parts, int c, float* moments, cudaStream_t stream);

// partials [parts][c][2], of many parts -> their sums [2][c]
cudaError_t channel_sums_final(const float* partials, int64_t parts, int c, float* sums, cudaStream_t stream);

// partials [parts][count[0] + count[1] + count[2]] -> their sums, out[i] [count[i]]; null: not wanted, and not read
struct SumsFinal {
  const float* partials;
  int64_t parts, count[3];
  float* out[3];
};
cudaError_t sums_final(const SumsFinal& p, cudaStream_t stream);

// p.channel(i) of every channel, on `stream`
cudaError_t batchnorm_channels(const BatchNormRows& p, cudaStream_t stream);
cudaError_t batchnorm_channels(const BatchNormGradients& p, cudaStream_t stream);

// ---- elementwise passes: training_rows.cu

enum class RowsMode : int {
  sum,       // out = X [+ skip], in 0 and 1 with the affines rows 0 and 1, where there are any
  gradient,  // out = da = (p grad + q (act(a) - mean) + r) act'(a) of grad in 0 and a in 1, rows[0] (p, q, r, mean); sum(da)
  moments,  // of act(in 0)
  sums,     // sum(in 0), sum(in 0 * (act(in 1) - mean)), mean of rows[1]
};

struct RowStrides {
  int64_t n, c, p;  // image, channel, pixel; c or p is 1
};

struct Rows {
  const void* in[2];
  void* out;
  const float* rows[2];
  float* partials;  // [splits][...]: [c][3] of moments, [c] or [2][c] of sums
  RowStrides in_stride[2], out_stride;
  int64_t n, pixels;
  int c;
  Dtype dtype;
  Act act;
  RowsMode mode;
};

struct RowsPlan {
  static constexpr int kThreads = 128, kUnitsOfAThread = 4;
  int lanes_c, groups, splits, blocks;  // lanes_c: threads side by side along the channels, 1: along the pixels
  bool vector;
};

inline RowsPlan rows_plan(const Rows& p, const Gpu& gpu) {
  RowsPlan plan{};
  const bool along_channels = p.in_stride[0].p != 1 && p.in_stride[0].c == 1;
  plan.lanes_c = along_channels ? 16 : 1;
  plan.groups = along_channels ? static_cast<int>(ceil_div(p.c, 4 * plan.lanes_c)) : p.c;
  const int64_t units = p.n * (along_channels ? p.pixels : ceil_div(p.pixels, 4));
  if (!units || !plan.groups) return plan;
  const int64_t most = ceil_div(units, RowsPlan::kThreads / plan.lanes_c * RowsPlan::kUnitsOfAThread);
  const int64_t wanted = ceil_div(int64_t(gpu.multiprocessors) * 64, plan.groups);
  plan.splits = static_cast<int>(std::max<int64_t>(1, std::min(most, wanted)));
  plan.blocks = plan.groups * plan.splits;
  const int64_t four = 4 * size_of(p.dtype);
  const auto aligned = [&](const void* data, const RowStrides& s) {
    const int64_t strides = s.n | (along_channels ? s.p : s.c);
    return !data || (reinterpret_cast<intptr_t>(data) % four == 0 && strides % 4 == 0);
  };
  plan.vector = (along_channels ? p.c : p.pixels) % 4 == 0 && aligned(p.in[0], p.in_stride[0]) &&
                aligned(p.in[1], p.in_stride[1]) && aligned(p.out, p.out_stride);
  return plan;
}

cudaError_t training_rows(const Rows& p, const RowsPlan& plan, cudaStream_t stream);

}  // namespace cmx
