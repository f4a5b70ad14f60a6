// The matrix product, pooling and the float32 epilogue on the CPU, for ctypes (tests/emulated_product.py).
#include <cmath>
#include <cstdio>
#include <vector>

#include "cuda/fold.h"
#include "cuda/platform.cuh"
#include "cuda/product.h"
#include "cuda/recast.h"
#include "cuda/training.h"
#include "cuda/unfold.h"
#include "launched.h"

using namespace cmx;

struct Run {
  int order;  // 0 forward, 1 reverse, 2 random; + 3: copies arrive at once
  unsigned seed;
  char* message;  // what the emulator found, 1000 bytes
};

// 0, a cudaError, -1: no plan, -2: `message` says
template <class F>
static int emulate(const Run& run, const F& call) {
  emulator::machine.order = static_cast<emulator::Machine::Order>(run.order % 3);
  emulator::machine.copies_arrive_at_once = run.order >= 3;
  emulator::machine.seed = run.seed;
  try {
    return call();
  } catch (const std::exception& e) {
    std::snprintf(run.message, 1000, "%s", e.what());
    return -2;
  }
}

#define CMX_EXPORT extern "C" __attribute__((visibility("default")))

// `tile` of product_mma, or the one of product_wgmma; `layout` tells what was read. `found`: null, or of training [2][c_out],
// the moments, or with `like` the sums.
CMX_EXPORT int cmx_emulate_product(const ProductForward* call, int tile, int multiprocessors, int* layout, float* found,
                                   const Run* run) {
  ProductForward p = *call;
  const ProductMemory m = product_memory_of(p);
  *layout = static_cast<int>(m.layout);
  const WgmmaPlan wgmma = wgmma_plan(p.shape, m, Gpu{90, multiprocessors, 227 << 10, 1.755, 4.3});
  const bool hopper = tile == kProductTileCount;
  const ProductPlan plan = hopper ? ProductPlan{} : product_plan(p.shape, m, tile);
  if (!(hopper ? wgmma.blocks : plan.blocks())) return -1;
  if (found && !hopper && !kProductTiles[tile].has_statistics()) return -1;
  const int parts = hopper ? wgmma.parts : plan.parts(), c = p.shape.c_out;
  std::vector<float> partials(found ? parts * c * 3 : 0, NAN);
  if (found) p.partials = partials.data();
  return emulate(*run, [&]() -> int {
    if (const cudaError_t error = hopper ? product_fwd_wgmma(p, wgmma, nullptr) : product_fwd_mma(p, plan, nullptr))
      return error;
    if (!found) return cudaSuccess;
    return p.like ? channel_sums_final(p.partials, parts, c, found, nullptr)
                  : moments_final(p.partials, parts, c, found, nullptr);
  });
}

CMX_EXPORT int cmx_emulate_pool_head(const PoolHeadForward* p, const Run* run) {
  return emulate(*run, [&] { return pool_head_fwd(*p, nullptr); });
}

CMX_EXPORT int cmx_emulate_epilogue(const EpilogueInplace* p, const Run* run) {
  return emulate(*run, [&] { return epilogue_inplace(*p, Gpu{90, 1, 227 << 10, 1.755, 4.3}, nullptr); });
}

CMX_EXPORT int cmx_emulate_recast(const KeptWeight* weight, int dtype, bool all, const Run* run) {
  Recast p{};
  p.weight[0] = *weight, p.weights = 1, p.dtype = static_cast<Dtype>(dtype), p.all = all;
  return emulate(*run, [&] { return recast(p, nullptr); });
}

// One unit: its vectors, bias, scale and shift of it
CMX_EXPORT int cmx_emulate_fold(const void* const* vectors, float* rows, int channels, float eps, int dtype,
                                const Run* run) {
  Fold p{};
  for (int i = 0; i < 5; ++i) p.vector[0][i] = vectors[i];
  p.rows = rows, p.units = 1, p.channels = channels, p.eps = eps, p.dtype = static_cast<Dtype>(dtype);
  return emulate(*run, [&] { return fold(p, nullptr); });
}

CMX_EXPORT int cmx_emulate_widen(const void* const* vectors, int count, float* rows, int channels, int dtype,
                                 const Run* run) {
  Widen p{};
  for (int i = 0; i < count; ++i) p.vector[i] = vectors[i];
  p.rows = rows, p.vectors = count, p.channels = channels, p.dtype = static_cast<Dtype>(dtype);
  return emulate(*run, [&] { return widen(p, nullptr); });
}

// `shape`: n c_in c_out h w ph pw, h and w in patches
CMX_EXPORT int cmx_emulate_unfold(const void* x, void* patches, const void* weight, void* rows, const int* shape,
                                  const int64_t* of_x, const int64_t* of_weight, bool last, int multiprocessors,
                                  const Run* run) {
  const auto strides = [](const int64_t* s) { return Strides{s[0], s[1], s[2], s[3]}; };
  const Gpu gpu{90, multiprocessors, 227 << 10, 1.755, 4.3};
  const ProductShape s{shape[0], shape[1], shape[2], shape[3], shape[4], shape[5], shape[6], Dtype::bfloat16};
  const Unfold p{patches_of(s, x, strides(of_x), patches, last, gpu),
                 weight_rows_of(s, weight, strides(of_weight), rows, gpu)};
  if (!p.image.plan.blocks) return -1;
  return emulate(*run, [&] { return unfold(p, nullptr); });
}
