// The cost model for Python, through ctypes (cmx_kernels/cost_model.py): on every machine, with or without CUDA.
#include <cstring>

#include "cuda/product_cost.h"

using namespace cmx;

#define CMX_EXPORT extern "C" __attribute__((visibility("default")))

// As in cmx_kernels/cost_model.py
struct Prediction {
  int kernel, blocks, threads, shared_bytes;
  int unfolded;  // patches are, before the product
  int relaid;    // tensors are, from channels_last to NCHW and back
  double bytes, flop, floor_us, predicted_us, memory_us, issue_us, tensor_us, ffma_us, shared_us;
  const char* why_not_wgmma;  // null: it is, or this GPU has none
};

CMX_EXPORT const char* cmx_cost_gpu(int index) {
  return index < static_cast<int>(std::size(kGpus)) ? kGpus[index].name : nullptr;
}

static const Gpu* named(const char* name) {
  for (const NamedGpu& g : kGpus)
    if (!std::strcmp(g.name, name)) return &g.gpu;
  return nullptr;
}

// Instructions of act for one number of `dtype`; with `slope`, of act and its derivative
CMX_EXPORT double cmx_cost_activation(int act, int dtype, int slope) {
  return slope ? gradient_instructions(static_cast<Act>(act))
               : activation_instructions(static_cast<Act>(act), static_cast<Dtype>(dtype));
}

template <class Shape>
static Prediction prediction(const Shape& s, const Cost& c, const Gpu& gpu, int kernel, int blocks, int threads,
                             int shared_bytes) {
  const double us = 1e6 / (gpu.multiprocessors * gpu.ghz * 1e9);
  return {kernel,
          blocks,
          threads,
          shared_bytes,
          0,
          0,
          bytes_of(s),
          flop_of(s),
          floor_seconds(s, gpu) * 1e6,
          c.seconds(gpu) * 1e6,
          c.memory * us,
          c.idle * c.issue * us,
          c.idle * c.tensor * us,
          c.idle * c.ffma * us,
          c.idle * c.shared * us,
          nullptr};
}

static Strides dense(const DepthwiseShape& s, bool channels_last) {
  const int64_t plane = int64_t(s.h) * s.w;
  return channels_last ? Strides{plane * s.c, 1, int64_t(s.w) * s.c, s.c} : Strides{plane * s.c, plane, s.w, 1};
}

// `shape`: n c h w kh kw dtype act. 0, or 1 for a GPU that is not in the table
CMX_EXPORT int cmx_cost_depthwise(const char* gpu_name, const int* shape, int channels_last, Prediction* out) {
  const Gpu* const found = named(gpu_name);
  if (!found) return 1;
  const Gpu& gpu = *found;
  const DepthwiseShape s{shape[0], shape[1], shape[2], shape[3], shape[4], shape[5], static_cast<Dtype>(shape[6])};
  const Strides strides = dense(s, channels_last);
  const DepthwiseChoice choice =
      choose_depthwise(s, memory_of(nullptr, strides, nullptr, strides, s), gpu, static_cast<Act>(shape[7]));
  const bool ffma = choice.kernel == DepthwiseKernel::ffma;
  *out = prediction(s, choice.cost, gpu, static_cast<int>(choice.kernel), ffma ? choice.ffma.blocks : choice.mma.blocks,
                    ffma ? choice.ffma.channels * choice.ffma.patches_x * choice.ffma.patches_y : 32 * choice.mma.warps,
                    ffma ? choice.ffma.shared_bytes : choice.mma.shared_bytes);
  return 0;
}

// Both gradients. `shape`: as above, and the kernel: 0 ffma, 1 mma, -1 the one that would run. 2 where it does not take it.
CMX_EXPORT int cmx_cost_depthwise_backward(const char* gpu_name, const int* shape, int channels_last, Prediction* out) {
  const Gpu* const gpu = named(gpu_name);
  if (!gpu) return 1;
  const DepthwiseShape s{shape[0], shape[1], shape[2], shape[3], shape[4], shape[5], static_cast<Dtype>(shape[6])};
  const Strides strides = dense(s, channels_last);
  const Memory m = memory_of(nullptr, strides, nullptr, strides, s);
  const Act act = static_cast<Act>(shape[7]);
  const PlanesChoice planes = choose_planes(s, m, m, *gpu, act);
  const bool relaid = planes.pays && shape[8] < 0;
  BackwardChoice choice = relaid ? planes.choice : choose_backward(s, m, m, *gpu, act);
  if (shape[8] >= 0) choice.kernel = static_cast<DepthwiseKernel>(shape[8]);
  const MmaPlan& mma = choice.mma;
  if (choice.kernel == DepthwiseKernel::ffma)
    *out = prediction(s, backward_ffma_cost(s, act, choice.ffma, *gpu), *gpu, 0, choice.ffma.tile.blocks,
                      BackwardPlan::kThreads, choice.ffma.shared_bytes);
  else if (mma.blocks)
    *out = prediction(s, backward_mma_cost(s, act, mma, *gpu), *gpu, 1, mma.blocks, 32 * mma.warps, mma.shared_bytes);
  else
    return 2;
  out->bytes = backward_bytes_of(s), out->flop *= 2, out->floor_us = backward_floor_seconds(s, *gpu) * 1e6;
  if (relaid) out->relaid = 1, out->predicted_us += planes.copies * 1e6;
  return 0;
}

// `shape`: n c_in c_out h w ph pw dtype act use, h and w of the output; 16-bit types. `kernel` is the tile.
CMX_EXPORT int cmx_cost_product(const char* gpu_name, const int* shape, int channels_last, Prediction* out) {
  const Gpu* const gpu = named(gpu_name);
  if (!gpu) return 1;
  const ProductShape s{shape[0], shape[1], shape[2], shape[3],
                       shape[4], shape[5], shape[6], static_cast<Dtype>(shape[7])};
  const ProductUse use = static_cast<ProductUse>(shape[9]);
  const int64_t height = int64_t(s.h) * s.ph, width = int64_t(s.w) * s.pw;
  const bool trains = use != ProductUse::inference && !channels_last;
  const Strides x = trains ? channels_first(s.n, height, width) : dense_strides(s.c_in, height, width, channels_last),
                y = dense_strides(s.c_out, s.h, s.w, channels_last);
  const PatchChoice choice = choose_patches(s, product_memory_of(nullptr, x, nullptr, nullptr, y, s), nullptr, x,
                                            nullptr, y, *gpu, static_cast<Act>(shape[8]), true, use);
  const WgmmaPlan& wgmma = choice.product.wgmma;
  const ProductPlan& plan = choice.product.plan;
  const Cost& cost = choice.product.cost;
  *out = wgmma.blocks ? prediction(s, cost, *gpu, kProductTileCount, wgmma.blocks, wgmma.kThreads, wgmma.kShared)
                      : prediction(s, cost, *gpu, plan.tile, plan.blocks(), kProductThreads, plan.shared_bytes);
  out->bytes = bytes_of(s, use), out->floor_us = floor_seconds(s, *gpu, use) * 1e6;
  if (choice.unfold.blocks) {
    const double us = 1e6 / (gpu->multiprocessors * gpu->ghz * 1e9);
    out->unfolded = 1, out->predicted_us += choice.unfold_cost.seconds(*gpu) * 1e6;
    out->memory_us += choice.unfold_cost.memory * us,
        out->issue_us += choice.unfold_cost.idle * choice.unfold_cost.issue * us;
  }
  if (gpu->arch == 90 && !wgmma.blocks)
    out->why_not_wgmma = choice.memory.why_no_tiles ? choice.memory.why_no_tiles
                                                    : "predicted to be slower for so few pixels and channels";
  return 0;
}
