// 16-bit copies of float32 weights that are kept between calls and brought up to date on the device, where nothing but its
// memory tells that a weight was written to: in a graph, or through .data. No torch here.
#pragma once

#include <driver_types.h>

#include "plan.h"

namespace cmx {

struct KeptWeight {
  const float* from;
  void* to;           // [count] in `dtype`
  uint32_t* samples;  // [recast_samples(count)] bits of `from` when it was last converted
  int64_t count;
};

// A run of so many numbers is converted where one of its samples, its first numbers, has changed
inline constexpr int64_t kRecastRun = 8192, kRecastSamples = 128;

inline int64_t recast_runs(int64_t count) { return ceil_div(count, kRecastRun); }
inline int64_t recast_samples(int64_t count) { return recast_runs(count) * kRecastSamples; }

struct Recast {
  static constexpr int kMost = 64;  // weights of a launch
  KeptWeight weight[kMost];
  int first_run[kMost + 1];  // set by the launcher
  int weights;
  Dtype dtype;  // of the copies
  bool all;     // whatever the samples say
};

cudaError_t recast(Recast p, cudaStream_t stream);

}  // namespace cmx
