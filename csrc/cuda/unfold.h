// Patches as rows of 16 bytes, which TMA and the tensor cores want, in front of a product of 1x1 patches. No torch here.
#pragma once

#include <driver_types.h>

#include "product_plan.h"

namespace cmx {

// to[n][k][i][j] = from[n][c][i ph + a][j pw + b], k = (c, a, b), and zeros behind these; of 16-bit numbers, anywhere
struct Patches {
  const void* from;
  void* to;
  int n, c, ph, pw, h, w;     // h x w patches of an image
  int k;                      // c ph pw, rounded up to whole pieces of 16 bytes
  Strides from_stride;        // in elements
  int64_t image, row, pixel;  // strides of `to`: of n, k, and of j; pixels lie there one after the other
  UnfoldPlan plan;
};

// Of the patches of a product, dense: planes, or channels_last
inline Patches patches_of(const ProductShape& s, const void* from, const Strides& strides, void* to, bool last,
                          const Gpu& gpu) {
  const int k = unfolded(s).c_in;
  const int64_t plane = s.plane(), row = last ? 1 : plane, pixel = last ? k : 1;
  return {from, to, s.n,     s.c_in,    s.ph, s.pw,  s.h,
          s.w,  k,  strides, k * plane, row,  pixel, unfold_plan(s, from, strides, last, gpu)};
}

// Of its weight, as rows [c_out][k]: every channel's is an image of one patch.
inline Patches weight_rows_of(ProductShape s, const void* weight, const Strides& strides, void* to, const Gpu& gpu) {
  s.n = s.c_out, s.h = s.w = 1;
  return patches_of(s, weight, strides, to, true, gpu);
}

// Both in one launch; no blocks of the weight where it lies well already. Enqueues on `stream`, on the current device.
struct Unfold {
  Patches image, weight;  // the weight [n][c][ph][pw], one patch an image, to dense [n][k]
};

cudaError_t unfold(const Unfold& p, cudaStream_t stream);

}  // namespace cmx
