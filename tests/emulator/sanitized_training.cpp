// The kernels of training under a sanitizer: buffers of exactly the right size, ragged shapes, every thread order, right
// values on small integers, which are exact in every type. Arguments: forward, backward; both if none.
#include <cmath>
#include <cstdio>
#include <cstring>
#include <random>
#include <stdexcept>
#include <vector>

#include "cuda/cost.h"
#include "cuda/depthwise.h"
#include "cuda/platform.cuh"
#include "cuda/training.h"

using namespace cmx;

struct Case {
  int n, c, h, w, kh, kw;
};

static const Gpu gpu{90, 1, 227 << 10, 1.755, 4.3};
static std::mt19937 dice(7);

template <class T>
static std::vector<T> integers(int64_t count, int range) {
  std::vector<T> v(count);
  for (T& x : v) x = T(float(int(dice() % (2 * range + 1)) - range));
  return v;
}

static void check(cudaError_t error) {
  if (error != cudaSuccess) throw std::runtime_error("CUDA error " + std::to_string(static_cast<int>(error)));
}

static int report(const char* what, const Case& k, int bad) {
  if (bad) std::printf("%s %dx%dx%dx%d kernel %dx%d: %d wrong\n", what, k.n, k.c, k.h, k.w, k.kh, k.kw, bad);
  return bad;
}

// A 1x1 kernel of ones on x' = 2 (x - 1) + 3: y and its mean are exact
template <class T>
static int forward(const Case& k, Dtype dtype, DepthwiseKernel kernel) {
  const int64_t plane = int64_t(k.h) * k.w, count = k.n * k.c * plane;
  const std::vector<T> x = integers<T>(count, 2);
  std::vector<T> weight(k.c * k.kh * k.kw, T(0.f)), y(count, T(float(NAN)));
  for (int c = 0; c < k.c; ++c) weight[(c * k.kh + (k.kh - 1) / 2) * k.kw + (k.kw - 1) / 2] = T(1.f);
  std::vector<float> affine(3 * k.c), moments(2 * k.c);
  for (int c = 0; c < k.c; ++c) affine[c] = 1, affine[k.c + c] = 2, affine[2 * k.c + c] = 3;
  DepthwiseForward p{};
  p.x = x.data(), p.weight = weight.data(), p.y = y.data(), p.affine = affine.data();
  p.shape = {k.n, k.c, k.h, k.w, k.kh, k.kw, dtype};
  p.x_stride = p.y_stride = {k.c * plane, plane, k.w, 1};
  const Memory m = memory_of(p.x, p.x_stride, p.y, p.y_stride, p.shape);
  std::vector<float> partials;
  int64_t parts = 0;
  const auto room = [&](int64_t count) {
    parts = count;
    partials.assign(parts * k.c * 3, NAN);
    p.partials = partials.data();
  };
  if (kernel == DepthwiseKernel::ffma) {
    FfmaPlan plan = ffma_plan(p.shape, m, gpu);
    plan.blocks = static_cast<int>(std::min<int64_t>(plan.items, 2));  // several tiles a block
    room(plan.parts(p.shape));
    check(depthwise_fwd_ffma(p, plan, nullptr));
  } else {
    const bool whole = kernel == DepthwiseKernel::mma_plane;
    const MmaPlan plan = whole ? mma_plane_plan(p.shape, m, gpu) : mma_plan(p.shape, m, gpu);
    room(plan.parts());
    check(whole ? depthwise_fwd_mma_plane(p, plan, nullptr) : depthwise_fwd_mma(p, plan, nullptr));
  }
  check(moments_final(partials.data(), parts, k.c, moments.data(), nullptr));
  int bad = 0;
  std::vector<double> sum(k.c);
  for (int64_t i = 0; i < count; ++i) {
    const float wanted = 2 * float(x[i]) + 1;
    bad += float(y[i]) != wanted;
    sum[i / plane % k.c] += wanted;
  }
  for (int c = 0; c < k.c; ++c) bad += !(std::fabs(moments[c] - sum[c] / (k.n * plane)) < 1e-5);
  return report("forward", k, bad);
}

// da = grad, X = x: integers throughout
template <class T>
static int backward(const Case& k, Dtype dtype) {
  const int64_t plane = int64_t(k.h) * k.w, count = k.n * k.c * plane;
  const int taps = k.kh * k.kw;
  const std::vector<T> x = integers<T>(count, 2), grad = integers<T>(count, 2), a = integers<T>(count, 2),
                       weight = integers<T>(k.c * taps, 1);
  std::vector<T> dx(count, T(float(NAN)));
  std::vector<float> coefficients(4 * k.c), affine(3 * k.c), dweight(k.c * taps), dbias(k.c), sums(2 * k.c);
  for (int c = 0; c < k.c; ++c) coefficients[c] = affine[k.c + c] = 1;
  DepthwiseGradients p{};
  p.grad = grad.data(), p.a = a.data(), p.x = x.data(), p.weight = weight.data(), p.dx = dx.data();
  p.coefficients = coefficients.data(), p.affine = affine.data();
  p.shape = {k.n, k.c, k.h, k.w, k.kh, k.kw, dtype};
  p.grad_stride = p.a_stride = p.x_stride = p.dx_stride = {k.c * plane, plane, k.w, 1};
  p.residual = p.need_weight = true;
  BackwardPlan plan = depthwise_bwd_plan(p, gpu);
  plan.splits = static_cast<int>(std::min<int64_t>(plan.items(p.shape), 2));  // several tiles a block
  plan.tile.blocks = plan.tile.groups * plan.splits;
  std::vector<float> partials(plan.splits * int64_t(k.c) * (taps + 3), NAN);
  p.partials = partials.data();
  check(depthwise_bwd_ffma(p, plan, nullptr));
  check(sums_final({p.partials, plan.splits, {k.c * taps, k.c, 2 * k.c}, {dweight.data(), dbias.data(), sums.data()}},
                   nullptr));
  std::vector<double> dw(k.c * taps), db(k.c), total(2 * k.c);
  int bad = 0;
  for (int64_t nc = 0; nc < int64_t(k.n) * k.c; ++nc)
    for (int i = 0; i < k.h; ++i)
      for (int j = 0; j < k.w; ++j) {
        const int64_t here = nc * plane + i * k.w + j;
        const int c = static_cast<int>(nc % k.c);
        double sum = float(grad[here]);
        db[c] += float(grad[here]);
        for (int t = 0; t < taps; ++t) {
          const int y = i - t / k.kw + (k.kh - 1) / 2, z = j - t % k.kw + (k.kw - 1) / 2;
          if (y < 0 || y >= k.h || z < 0 || z >= k.w) continue;
          const double da = float(grad[nc * plane + y * k.w + z]);
          sum += float(weight[c * taps + t]) * da;
          dw[c * taps + t] += float(x[here]) * da;
        }
        const float stored = float(T(float(sum)));
        bad += float(dx[here]) != stored;
        total[c] += stored, total[k.c + c] += stored * float(x[here]);
      }
  for (int i = 0; i < k.c * taps; ++i) bad += dweight[i] != dw[i];
  for (int c = 0; c < k.c; ++c) bad += dbias[c] != db[c];
  for (int i = 0; i < 2 * k.c; ++i) bad += sums[i] != total[i];
  return report("backward", k, bad);
}

int main(int count, char** names) {
  const Case ragged[] = {
      {1, 3, 5, 7, 3, 4}, {3, 1, 17, 19, 7, 7}, {1, 2, 34, 36, 9, 5}, {5, 1, 9, 14, 5, 12}, {1, 1, 6, 33, 2, 20}};
  const Case planes[] = {{3, 1, 16, 16, 7, 7}, {1, 1, 32, 32, 9, 9}};
  const auto wanted = [&](const char* name) { return count == 1 || !std::strcmp(names[1], name); };
  int bad = 0;
  try {
    for (int order = 0; order < 6; ++order) {
      emulator::machine.order = static_cast<emulator::Machine::Order>(order % 3);
      emulator::machine.copies_arrive_at_once = order >= 3;
      for (const Case& k : ragged) {
        if (wanted("forward")) {
          bad += forward<float>(k, Dtype::float32, DepthwiseKernel::ffma);
          bad += forward<bf16>(k, Dtype::bfloat16, DepthwiseKernel::mma);
        }
        if (wanted("backward") && order < 3) {
          bad += backward<float>(k, Dtype::float32);
          bad += backward<bf16>(k, Dtype::bfloat16);
        }
      }
      for (const Case& k : planes)
        if (wanted("forward")) bad += forward<bf16>(k, Dtype::bfloat16, DepthwiseKernel::mma_plane);
    }
  } catch (const std::exception& e) {
    std::printf("%s\n", e.what());
    return 1;
  }
  return bad != 0;
}
