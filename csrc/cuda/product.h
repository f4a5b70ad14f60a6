// pointwise_block, patch_embed and pool_head on CUDA: parameters, kernels, and who chooses among them. No torch here.
#pragma once

#include <driver_types.h>

#include "product_plan.h"

namespace cmx {

// y = scale * act(weight x' + bias) + shift, x' the patches of x: x'[(c, a, b)][n, i, j] = x[n][c][i ph + a][j pw + b]
// With `partials`, for training: y = weight x' + bias, and a first stage of statistics of y as it is stored (training.h)
struct ProductForward {
  const void *x, *weight;             // [n, c_in, >= h ph, >= w pw] and dense [c_out, c_in, ph, pw], in `dtype`
  void* y;                            // [n, c_out, h, w] in `dtype`; rows of pixels follow each other without a gap
  const float *bias, *scale, *shift;  // [c_out] or null
  ProductShape shape;
  Strides x_stride, y_stride;  // in elements
  Act act;
  float* partials;    // [parts][c_out][3]: moments of act(y), for moments_final; with `like`:
  const void* like;   // of the size and the strides of y; partials [parts][c_out][2]: sum(y), sum(y (act(like) - mean))
  const float* mean;  // [c_out]
  ProductUse use() const { return !partials ? ProductUse::inference : like ? ProductUse::sums : ProductUse::moments; }
};

// What its plan needs to know: `like` lies as y does, and is read as y is written.
inline ProductMemory product_memory_of(const ProductForward& p) {
  const intptr_t both = reinterpret_cast<intptr_t>(p.y) | reinterpret_cast<intptr_t>(p.like);
  return product_memory_of(p.x, p.x_stride, p.weight, reinterpret_cast<const void*>(both), p.y_stride, p.shape);
}

// 16-bit types. Enqueues on `stream`, on the current device; neither allocates nor waits.
cudaError_t product_fwd(const ProductForward& p, const Gpu& gpu, cudaStream_t stream);

// Whether its patches are to be unfolded first (unfold.h), which leaves a product of 1x1.
bool product_unfolds(const ProductForward& p, const Gpu& gpu);

// The parts of its statistics. `partials`: any address, to say that they are wanted.
int64_t product_parts(const ProductForward& p, const Gpu& gpu);

// With a given plan; the emulator's tests call every one of them.
cudaError_t product_fwd_mma(const ProductForward& p, const ProductPlan& plan, cudaStream_t stream);
cudaError_t product_fwd_wgmma(const ProductForward& p, const WgmmaPlan& plan, cudaStream_t stream);

// Whether this binary has code for sm_90a and the driver knows tensor maps. Asked on a device of compute capability 9.0.
bool product_wgmma_runs();

// y = mean over the plane of x, times weight^T, plus bias
struct PoolHeadForward {
  const void *x, *weight;  // [n, c, h, w] and dense [classes, c] in `dtype`
  const float* bias;       // [classes] or null
  float* pooled;           // [n, c], scratch
  void* y;                 // dense [n, classes] in `dtype`
  int n, c, h, w, classes;
  Dtype dtype;
  Strides x_stride;
  bool vector_loads;  // set by the launcher
};

cudaError_t pool_head_fwd(const PoolHeadForward& p, cudaStream_t stream);

// y = scale * act(y + bias) + shift, float32 and dense: planes [n * channels][h * w], or channels_last [n * h * w][channels]
struct EpilogueInplace {
  float* y;
  const float *bias, *scale, *shift;  // [channels] or null
  int64_t rows, columns, channels;
  Act act;
  bool channels_last;
};

cudaError_t epilogue_inplace(const EpilogueInplace& p, const Gpu& gpu, cudaStream_t stream);

}  // namespace cmx
