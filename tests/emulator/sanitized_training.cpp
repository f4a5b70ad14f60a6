// The kernels of training under a sanitizer: buffers of exactly the right size, ragged shapes, several thread orders, right
// values on small integers, which are exact in every type. As tests/emulator/sanitized.cpp, for the CPU and for a GPU.
// Arguments: forward, backward_ffma, backward_mma, backward_mma_large, rows; all of them if none.
#include <cmath>
#include <cstdio>
#include <cstring>
#include <random>
#include <vector>

#include "buffers.h"
#include "cuda/cost.h"
#include "cuda/depthwise.h"
#include "cuda/training.h"

using namespace cmx;

struct Case {
  int n, c, h, w, kh, kw;
};

static const Gpu gpu{90, 1, 99 << 10, 1.755, 4.3};  // shared memory that every GPU has
static std::mt19937 dice(7);

template <class T>
static Buffer<T> filled(int64_t count, float value) {
  Buffer<T> v = allocate<T>(count);
  for (int64_t i = 0; i < count; ++i) v[i] = T(value);
  return v;
}

template <class T>
static Buffer<T> integers(int64_t count, int range) {
  Buffer<T> v = allocate<T>(count);
  for (int64_t i = 0; i < count; ++i) v[i] = T(float(int(dice() % (2 * range + 1)) - range));
  return v;
}

template <class T>
static Buffer<T> unknown(int64_t count) {
  return filled<T>(count, NAN);
}

static int report(const char* what, const Case& k, int bad) {
  if (bad) std::printf("%s %dx%dx%dx%d kernel %dx%d: %d wrong\n", what, k.n, k.c, k.h, k.w, k.kh, k.kw, bad);
  return bad;
}

// A 1x1 kernel of ones on x' = 2 (x - 1) + 3: y and its mean are exact
template <class T>
static int forward(const Case& k, Dtype dtype, DepthwiseKernel kernel) {
  const int64_t plane = int64_t(k.h) * k.w, count = k.n * k.c * plane;
  const Buffer<T> x = integers<T>(count, 2), weight = filled<T>(k.c * k.kh * k.kw, 0), y = unknown<T>(count);
  for (int c = 0; c < k.c; ++c) weight[(c * k.kh + (k.kh - 1) / 2) * k.kw + (k.kw - 1) / 2] = T(1.f);
  const Buffer<float> affine = allocate<float>(3 * k.c), moments = unknown<float>(2 * k.c);
  for (int c = 0; c < k.c; ++c) affine[c] = 1, affine[k.c + c] = 2, affine[2 * k.c + c] = 3;
  DepthwiseForward p{};
  p.x = x.get(), p.weight = weight.get(), p.y = y.get(), p.affine = affine.get();
  p.shape = {k.n, k.c, k.h, k.w, k.kh, k.kw, dtype};
  const bool last = kernel == DepthwiseKernel::mma_last;
  p.x_stride = p.y_stride =
      last ? Strides{k.c * plane, 1, int64_t(k.w) * k.c, k.c} : Strides{k.c * plane, plane, k.w, 1};
  const Memory m = memory_of(p.x, p.x_stride, p.y, p.y_stride, p.shape);
  Buffer<float> partials;
  int64_t parts = 0;
  const auto room = [&](int64_t count) {
    parts = count;
    partials = unknown<float>(parts * k.c * 3);
    p.partials = partials.get();
  };
  if (kernel == DepthwiseKernel::ffma) {
    FfmaPlan plan = ffma_plan(p.shape, m, gpu);
    plan.blocks = static_cast<int>(std::min<int64_t>(plan.groups * plan.units, 2));  // several tiles a block
    room(plan.parts());
    check(depthwise_fwd_ffma(p, plan, nullptr));
  } else {
    const bool whole = kernel == DepthwiseKernel::mma_plane;
    const MmaPlan plan = last    ? mma_last_plan(p.shape, m, gpu)
                         : whole ? mma_plane_plan(p.shape, m, gpu)
                                 : mma_plan(p.shape, m, gpu);
    room(plan.parts());
    check(last    ? depthwise_fwd_mma_last(p, plan, nullptr)
          : whole ? depthwise_fwd_mma_plane(p, plan, nullptr)
                  : depthwise_fwd_mma(p, plan, nullptr));
  }
  check(moments_final(partials.get(), parts, k.c, moments.get(), nullptr));
  check(finish());
  int bad = 0;
  std::vector<double> sum(k.c);
  for (int64_t i = 0; i < count; ++i) {
    const float wanted = 2 * float(x[i]) + 1;
    bad += !(float(y[i]) == wanted);
    sum[last ? i % k.c : i / plane % k.c] += wanted;
  }
  for (int c = 0; c < k.c; ++c) bad += !(std::fabs(moments[c] - sum[c] / (k.n * plane)) < 1e-5);
  return report("forward", k, bad);
}

// da = grad, X = x + 1: integers throughout
template <class T>
static int backward(const Case& k, Dtype dtype, DepthwiseKernel kernel, bool large = false) {
  const int64_t plane = int64_t(k.h) * k.w, count = k.n * k.c * plane;
  const int taps = k.kh * k.kw;
  const Buffer<T> x = integers<T>(count, 2), grad = integers<T>(count, 2), a = integers<T>(count, 2),
                  weight = integers<T>(k.c * taps, 1), dx = unknown<T>(count);
  const Buffer<float> coefficients = filled<float>(4 * k.c, 0), affine = filled<float>(3 * k.c, 0),
                      dweight = unknown<float>(k.c * taps), dbias = unknown<float>(k.c), sums = unknown<float>(2 * k.c);
  for (int c = 0; c < k.c; ++c) coefficients[c] = affine[k.c + c] = affine[2 * k.c + c] = 1;
  DepthwiseGradients p{};
  p.grad = grad.get(), p.a = a.get(), p.x = x.get(), p.weight = weight.get(), p.dx = dx.get();
  p.coefficients = coefficients.get(), p.affine = affine.get();
  p.shape = {k.n, k.c, k.h, k.w, k.kh, k.kw, dtype};
  p.grad_stride = p.a_stride = p.x_stride = p.dx_stride = {k.c * plane, plane, k.w, 1};
  p.residual = p.need_weight = true;
  BackwardPlan plan = depthwise_bwd_ffma_plan(p, gpu);
  plan.splits = static_cast<int>(std::min<int64_t>(plan.tile.units, 2));  // several tiles a block
  plan.tile.blocks = plan.tile.groups * plan.splits;
  MmaPlan mma = depthwise_bwd_mma_plan(p, gpu);
  const bool tensor_cores = kernel == DepthwiseKernel::mma;
  if (tensor_cores && (!mma.blocks || mma.shared_tiles != large)) return 0;
  mma.splits = 1, mma.blocks = k.c;  // several tiles a warp
  const int64_t splits = tensor_cores ? mma.splits : plan.splits;
  const Buffer<float> partials = unknown<float>(splits * k.c * (taps + 3));
  p.partials = partials.get();
  check(tensor_cores ? depthwise_bwd_mma(p, mma, nullptr) : depthwise_bwd_ffma(p, plan, nullptr));
  check(
      sums_final({p.partials, splits, {k.c * taps, k.c, 2 * k.c}, {dweight.get(), dbias.get(), sums.get()}}, nullptr));
  check(finish());
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
          dw[c * taps + t] += (float(x[here]) + 1) * da;
        }
        const float stored = float(T(float(sum)));
        bad += !(float(dx[here]) == stored);
        total[c] += stored, total[k.c + c] += stored * float(x[here]);
      }
  for (int i = 0; i < k.c * taps; ++i) bad += !(dweight[i] == dw[i]);
  for (int c = 0; c < k.c; ++c) bad += !(dbias[c] == db[c]);
  for (int i = 0; i < 2 * k.c; ++i) bad += !(sums[i] == total[i]);
  return report("backward", k, bad);
}

// The passes around products, without an activation: out = 2 x + 3 y + 5 (sum), da = 2 x + 3 y (gradient), moments, sums
template <class T>
static int rows(const Case& k, Dtype dtype, bool last) {
  const int64_t plane = int64_t(k.h) * k.w, count = k.n * k.c * plane;
  const Buffer<T> x = integers<T>(count, 2), y = integers<T>(count, 2), out = unknown<T>(count);
  const Buffer<float> first = filled<float>(4 * k.c, 0), second = filled<float>(3 * k.c, 0),
                      found = unknown<float>(2 * k.c);
  int bad = 0;
  for (const RowsMode mode : {RowsMode::sum, RowsMode::gradient, RowsMode::moments, RowsMode::sums}) {
    const bool gradient = mode == RowsMode::gradient;
    for (int c = 0; c < k.c; ++c) {  // gradient: p, q, r, mean; else mean, scale, shift
      first[c] = gradient ? 2 : 0, first[k.c + c] = gradient ? 3 : 2, first[2 * k.c + c] = gradient ? 0 : 5;
      second[k.c + c] = 3;
    }
    Rows p{};
    p.in[0] = x.get(), p.in[1] = mode == RowsMode::moments ? nullptr : y.get();
    p.out = mode == RowsMode::sum || gradient ? out.get() : nullptr;
    p.rows[0] = first.get(), p.rows[1] = second.get();
    const RowStrides dense = last ? RowStrides{k.c * plane, 1, k.c} : RowStrides{k.c * plane, plane, 1};
    p.in_stride = p.out_stride = dense;
    p.n = k.n, p.pixels = plane, p.c = k.c, p.dtype = dtype, p.mode = mode;
    const RowsPlan plan = rows_plan(p, gpu);
    const Buffer<float> partials = unknown<float>(plan.splits * 3 * int64_t(k.c));
    p.partials = partials.get();
    check(training_rows(p, plan, nullptr));
    const int64_t sums = gradient ? k.c : 2 * k.c;
    if (mode == RowsMode::moments) check(moments_final(p.partials, plan.splits, k.c, found.get(), nullptr));
    if (gradient || mode == RowsMode::sums)
      check(sums_final({p.partials, plan.splits, {sums, 0, 0}, {found.get(), nullptr, nullptr}}, nullptr));
    check(finish());
    std::vector<double> total(2 * k.c);
    for (int64_t i = 0; i < count; ++i) {
      const int64_t c = last ? i % k.c : i / plane % k.c;
      const double v = 2 * float(x[i]) + 3 * float(y[i]) + (gradient ? 0 : 5);
      if (p.out) bad += !(float(out[i]) == v);
      total[c] += gradient ? v : double(float(x[i])), total[k.c + c] += double(float(x[i])) * float(y[i]);
    }
    for (int c = 0; c < k.c && mode == RowsMode::moments; ++c)
      bad += !(std::fabs(found[c] - total[c] / (k.n * plane)) < 1e-5);
    for (int i = 0; i < sums && (gradient || mode == RowsMode::sums); ++i) bad += !(found[i] == total[i]);
  }
  return report(last ? "rows, channels last" : "rows", k, bad);
}

int main(int count, char** names) {
  const Case ragged[] = {{1, 3, 5, 7, 3, 4},   {3, 1, 17, 19, 7, 7}, {1, 2, 34, 36, 9, 5}, {5, 1, 9, 14, 5, 12},
                         {1, 1, 6, 33, 2, 20}, {17, 1, 9, 16, 4, 9}, {1, 1, 33, 40, 8, 8}, {3, 1, 9, 14, 26, 11}};
  const Case planes[] = {{3, 1, 16, 16, 7, 7}, {1, 1, 32, 32, 9, 9}};
  const auto wanted = [&](const char* name) { return count == 1 || !std::strcmp(names[1], name); };
  int bad = 0;
  try {
    bad += in_orders(ragged, [&](const Case& k) {
      int bad = 0;
      if (wanted("forward")) {
        bad += forward<float>(k, Dtype::float32, DepthwiseKernel::ffma);
        bad += forward<bf16>(k, Dtype::bfloat16, DepthwiseKernel::mma);
        if (k.c > 1) bad += forward<bf16>(k, Dtype::bfloat16, DepthwiseKernel::mma_last);
      }
      if (wanted("backward_ffma")) {
        bad += backward<float>(k, Dtype::float32, DepthwiseKernel::ffma);
        bad += backward<bf16>(k, Dtype::bfloat16, DepthwiseKernel::ffma);
      }
      if (wanted("backward_mma")) bad += backward<bf16>(k, Dtype::bfloat16, DepthwiseKernel::mma);
      if (wanted("backward_mma_large")) bad += backward<bf16>(k, Dtype::bfloat16, DepthwiseKernel::mma, true);
      for (const bool last : {false, true})
        if (wanted("rows")) bad += rows<bf16>(k, Dtype::bfloat16, last) + rows<float>(k, Dtype::float32, last);
      return bad;
    });
    bad += in_orders(planes, [&](const Case& k) {
      int bad = 0;
      if (wanted("forward")) bad += forward<bf16>(k, Dtype::bfloat16, DepthwiseKernel::mma_plane);
      if (wanted("backward_mma")) bad += backward<bf16>(k, Dtype::bfloat16, DepthwiseKernel::mma);
      return bad;
    });
  } catch (const std::exception& e) {
    std::printf("%s\n", e.what());
    return 1;
  }
  return bad != 0;
}
