// BatchNorms in eval mode to what the kernels take, those of a whole network in one launch; an operator's vectors. No torch here.
#pragma once

#include <driver_types.h>

#include "plan.h"

namespace cmx {

// scale = gamma / sqrt(var + eps), shift = beta - mean * scale
struct Fold {
  static constexpr int kMost = 64;  // units of a launch
  const void* vector[kMost][5];     // bias, mean, var, gamma, beta: [channels] in `dtype`
  float* rows;                      // [units][3][channels]: bias, scale, shift
  int units, channels;
  float eps;
  Dtype dtype;
};

cudaError_t fold(const Fold& p, cudaStream_t stream);

// Vectors of a 16-bit type as float32
struct Widen {
  static constexpr int kMost = 3;
  const void* vector[kMost];  // dense [channels] in `dtype`
  float* rows;                // [vectors][channels]
  int vectors, channels;
  Dtype dtype;
};

cudaError_t widen(const Widen& p, cudaStream_t stream);

}  // namespace cmx
