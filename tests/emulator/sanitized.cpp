// The kernels under a sanitizer: buffers of exactly the right size, ragged shapes, several thread orders, right values.
// Compiled with g++ -DCMX_EMULATED for AddressSanitizer and ThreadSanitizer, with nvcc for compute-sanitizer.
// Arguments: kernel names (ffma, mma, mma_plane, mma_last); all of them if none. Ends with 1 where a value is wrong.
#include <cmath>
#include <cstdio>
#include <cstring>
#include <random>

#include "buffers.h"
#include "cuda/depthwise.h"

using namespace cmx;

struct Case {
  int n, c, h, w, kh, kw;
};

// The formula without scale, bias and activation, on small integers: exact in every type
template <class T>
static int wrong(const char* kernel, const Case& k, Dtype dtype) {
  const DepthwiseShape s{k.n, k.c, k.h, k.w, k.kh, k.kw, dtype};
  const int64_t plane = int64_t(k.h) * k.w, count = k.n * k.c * plane;
  const Buffer<T> x = allocate<T>(count), weight = allocate<T>(k.c * k.kh * k.kw), y = allocate<T>(count);
  std::mt19937 dice(7);
  for (int64_t i = 0; i < count; ++i) x[i] = T(float(int(dice() % 5) - 2)), y[i] = T(NAN);
  for (int i = 0; i < k.c * k.kh * k.kw; ++i) weight[i] = T(float(int(dice() % 3) - 1));
  const bool last = !std::strcmp(kernel, "mma_last");
  const Strides strides = last ? Strides{k.c * plane, 1, int64_t(k.w) * k.c, k.c} : Strides{k.c * plane, plane, k.w, 1};
  DepthwiseForward p{};
  p.x = x.get(), p.weight = weight.get(), p.y = y.get();
  p.shape = s, p.x_stride = p.y_stride = strides, p.act = Act::none, p.residual = true;

  const Gpu gpu{90, 1, 227 << 10, 1.755, 4.3};
  const Memory m = memory_of(p.x, strides, p.y, strides, s);
  if (!std::strcmp(kernel, "ffma")) {
    FfmaPlan plan = ffma_plan(s, m, gpu);
    plan.blocks = static_cast<int>(std::min<int64_t>(plan.groups * plan.units, 2));  // several tiles a block
    check(depthwise_fwd_ffma(p, plan, nullptr));
  } else if (!std::strcmp(kernel, "mma")) {
    MmaPlan plan = mma_plan(s, m, gpu);
    plan.splits = 1, plan.blocks = s.c;  // several tiles a warp
    check(depthwise_fwd_mma(p, plan, nullptr));
  } else if (last) {
    check(depthwise_fwd_mma_last(p, mma_last_plan(s, m, gpu), nullptr));
  } else {
    check(depthwise_fwd_mma_plane(p, mma_plane_plan(s, m, gpu), nullptr));
  }
  check(finish());

  int bad = 0;
  for (int64_t nc = 0; nc < int64_t(k.n) * k.c; ++nc) {
    const auto at = [&](int row, int column) {
      return nc / k.c * strides.n + nc % k.c * strides.c + row * strides.h + column * strides.w;
    };
    for (int i = 0; i < k.h; ++i)
      for (int j = 0; j < k.w; ++j) {
        float sum = float(x[at(i, j)]);
        for (int ky = 0; ky < k.kh; ++ky)
          for (int kx = 0; kx < k.kw; ++kx) {
            const int r = i + ky - (k.kh - 1) / 2, q = j + kx - (k.kw - 1) / 2;
            if (r >= 0 && r < k.h && q >= 0 && q < k.w)
              sum += float(weight[(nc % k.c * k.kh + ky) * k.kw + kx]) * float(x[at(r, q)]);
          }
        bad += !(float(y[at(i, j)]) == float(T(sum)));
      }
  }
  if (bad)
    std::printf("%s %dx%dx%dx%d kernel %dx%d: %d wrong\n", kernel, k.n, k.c, k.h, k.w, k.kh, k.kw, bad);
  return bad;
}

static int all_wrong(const char* kernel) {
  // more tiles than the stages of four warps, too
  const Case ragged[] = {{1, 2, 5, 7, 3, 4},   {3, 1, 17, 19, 7, 7}, {1, 1, 34, 36, 9, 5}, {3, 1, 9, 14, 5, 12},
                         {1, 1, 6, 33, 2, 20}, {1, 1, 3, 24, 1, 31}, {10, 1, 9, 33, 3, 3},
                         {1, 70, 5, 16, 3, 3}};
  const Case planes[] = {{3, 1, 16, 16, 7, 7}, {30, 1, 16, 16, 9, 9}, {1, 1, 32, 32, 9, 9}, {14, 1, 32, 32, 7, 7}};
  // accesses of 2 to 16 bytes; a group that is not full, and several tiles a block
  const Case lasts[] = {{1, 3, 5, 7, 3, 4},  {2, 2, 17, 19, 7, 7},  {1, 20, 3, 5, 3, 3},
                        {5, 24, 9, 3, 2, 2}, {1, 8, 5, 33, 13, 20}, {1, 4, 3, 24, 1, 31}};
  const auto in_bf16 = [&](const Case& k) { return wrong<bf16>(kernel, k, Dtype::bfloat16); };
  const auto in_float = [&](const Case& k) { return wrong<float>(kernel, k, Dtype::float32); };
  if (!std::strcmp(kernel, "mma_plane")) return in_orders(planes, in_bf16);
  if (!std::strcmp(kernel, "mma_last")) return in_orders(lasts, in_bf16);
  const int bad = in_orders(ragged, in_bf16);
  return bad || std::strcmp(kernel, "ffma") ? bad : in_orders(ragged, in_float);
}

int main(int count, char** names) {
  const char* all[] = {"", "ffma", "mma", "mma_plane", "mma_last"};
  int bad = 0;
  try {
    for (int i = 1; i < (count > 1 ? count : 5); ++i) bad += all_wrong(count > 1 ? names[i] : all[i]);
  } catch (const std::exception& e) {
    std::printf("%s\n", e.what());
    return 1;
  }
  return bad != 0;
}
