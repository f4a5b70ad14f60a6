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
  RowStrides in_stride, out_stride;
  int64_t n, pixels;
  int c;
  Dtype dtype;
  Act act;
  RowsMode mode;
};

// A thread takes 16 bytes at a time, a unit: neighbouring pixels of a channel or, where these lie side by side, channels of a
// pixel. Then it goes on by step_images and step_units.
struct RowsPlan {
  static constexpr int kThreads = 128, kUnitsOfAThread = 4, kChannels = 64;
  bool along_channels;
  int lanes_c, groups, splits, blocks;  // threads side by side along the channels
  int bytes;                            // of an access: a unit's, of 16-bit types half of one, or a number's
  int64_t of_image, step_images, step_units;
};

inline RowsPlan rows_plan(const Rows& p, const Gpu& gpu) {
  RowsPlan plan{};
  const int64_t size = size_of(p.dtype), numbers = 16 / size;
  plan.along_channels = p.in_stride.p != 1 && p.in_stride.c == 1;
  plan.lanes_c = plan.along_channels ? static_cast<int>(RowsPlan::kChannels / numbers) : 1;
  plan.groups = plan.along_channels ? static_cast<int>(ceil_div(p.c, RowsPlan::kChannels)) : p.c;
  plan.of_image = plan.along_channels ? p.pixels : ceil_div(p.pixels, numbers);
  const int64_t units = p.n * plan.of_image, lanes = RowsPlan::kThreads / plan.lanes_c;
  if (!units || !plan.groups) return plan;
  const int64_t most = ceil_div(units, lanes * RowsPlan::kUnitsOfAThread);
  const int64_t wanted = ceil_div(int64_t(gpu.multiprocessors) * 64, plan.groups);
  plan.splits = static_cast<int>(std::max<int64_t>(1, std::min(most, wanted)));
  plan.blocks = plan.groups * plan.splits;
  const int64_t step = plan.splits * lanes;
  plan.step_images = step / plan.of_image, plan.step_units = step % plan.of_image;
  int64_t bits = (plan.along_channels ? p.c : p.pixels) * size | 16;
  const auto add = [&](const void* data, const RowStrides& s) {
    if (data) bits |= reinterpret_cast<intptr_t>(data) | (s.n | (plan.along_channels ? s.p : s.c)) * size;
  };
  add(p.in[0], p.in_stride), add(p.in[1], p.in_stride), add(p.out, p.out_stride);
  const int64_t bytes = bits & -bits;
  plan.bytes = static_cast<int>(bytes == 16 || bytes == 4 * size ? bytes : size);
  return plan;
}

cudaError_t training_rows(const Rows& p, const RowsPlan& plan, cudaStream_t stream);

}  // namespace cmx
