// The operators of training on CUDA tensors, behind torch's stable ABI. What they compute: cmx_kernels/ops/training.py.
#ifdef CMX_WITH_CUDA
#include <climits>
#include <tuple>

#include "bind_batchnorm.h"
#include "bind_cuda.h"
#include "cuda/depthwise.h"
#include "cuda/gpu.h"
#include "cuda/training.h"

namespace cmx {
namespace {

using Two = std::tuple<Tensor, Tensor>;
using Four = std::tuple<Tensor, Tensor, Tensor, Tensor>;

// x [N, C, H, W] on a device that runs the kernels
void check_input(const Tensor& x) {
  STD_TORCH_CHECK(x.is_cuda() && x.dim() == 4, "x: got shape ", shape_of(x),
                  ", wanted 4 dimensions [N, C, H, W] on a CUDA device");
  check_runs(x.get_device_index());
  for (int64_t d = 0; d < 4; d++)
    STD_TORCH_CHECK(x.size(d) <= INT_MAX, "x: got ", x.size(d), " along a dimension, wanted less than 2^31");
  STD_TORCH_CHECK(x.size(1) <= INT_MAX / 4, "x: got ", x.size(1), " channels, wanted less than 2^29");  // times 4 rows
}

void check_same(const Tensor& t, const char* name, const Tensor& x) {
  bool same =
      t.is_cuda() && t.get_device_index() == x.get_device_index() && t.scalar_type() == x.scalar_type() && t.dim() == 4;
  for (int64_t d = 0; same && d < 4; d++) same = t.size(d) == x.size(d);
  STD_TORCH_CHECK(same, name, ": got shape ", shape_of(t), ", wanted that of x, ", shape_of(x),
                  ", in x's dtype and on its device");
}

void check_weight(const Tensor& weight, const Tensor& x) {
  STD_TORCH_CHECK(
      weight.is_cuda() && weight.get_device_index() == x.get_device_index() && weight.scalar_type() == x.scalar_type(),
      "weight: wanted a tensor on x's device, in x's dtype");
  STD_TORCH_CHECK(weight.dim() == 4 && weight.size(0) == x.size(1) && weight.size(1) == 1, "weight: got shape ",
                  shape_of(weight), " with x of ", shape_of(x), ", wanted [C, 1, kh, kw]");
  STD_TORCH_CHECK(
      weight.size(2) >= 1 && weight.size(3) >= 1 && weight.size(2) <= kMaxKernel && weight.size(3) <= kMaxKernel,
      "weight: got a ", weight.size(2), "x", weight.size(3), " kernel, wanted 1 to ", kMaxKernel, " on each side");
  STD_TORCH_CHECK(weight.size(0) * (weight.size(2) * weight.size(3) + 3) <= INT_MAX, "weight: got shape ",
                  shape_of(weight), ", wanted less than 2^31 numbers, three more a channel counted");  // in 32 bits
}

// [rows, C] or [C] as dense float32; the tensor keeps its memory alive until the launch is enqueued
struct ChannelRows {
  Optional tensor;
  ChannelRows(const Optional& v, const char* name, int64_t rows, const Tensor& x) {
    if (!v) return;
    const bool vector = rows == 1 && v->dim() == 1 && v->size(0) == x.size(1);
    STD_TORCH_CHECK(v->is_cuda() && v->get_device_index() == x.get_device_index() &&
                        (vector || (v->dim() == 2 && v->size(0) == rows && v->size(1) == x.size(1))),
                    name, ": got shape ", shape_of(*v), ", wanted [", rows, ", ", x.size(1), "] on x's device");
    tensor = dense(v->scalar_type() == ScalarType::Float ? *v : torch::stable::to(*v, ScalarType::Float));
  }
  const float* data() const { return tensor ? static_cast<const float*>(tensor->const_data_ptr()) : nullptr; }
};

Tensor floats(std::vector<int64_t> size, const Tensor& x) {
  return torch::stable::empty(size, ScalarType::Float, std::nullopt, x.device());
}

float* data_of(const Tensor& t) { return t.numel() ? static_cast<float*>(t.mutable_data_ptr()) : nullptr; }

Tensor output_of(const Tensor& x) {
  const auto format =
      is_channels_last(x) ? torch::headeronly::MemoryFormat::ChannelsLast : torch::headeronly::MemoryFormat::Contiguous;
  return torch::stable::empty({x.size(0), x.size(1), x.size(2), x.size(3)}, x.scalar_type(), std::nullopt, x.device(),
                              std::nullopt, format);
}

DepthwiseShape depthwise_shape(const Tensor& x, const Tensor& weight) {
  const auto size = [](const Tensor& t, int64_t d) { return static_cast<int>(t.size(d)); };
  return {size(x, 0), size(x, 1), size(x, 2), size(x, 3), size(weight, 2), size(weight, 3), dtype_of(x, "x")};
}

Two depthwise_block_train(const Tensor& x, const Optional& affine, const Tensor& weight, const Optional& bias,
                          std::string act) {
  check_input(x);
  check_weight(weight, x);
  const int device = x.get_device_index();
  const DeviceGuard guard(device);
  const ChannelRows rows(affine, "affine", 3, x), bias32(bias, "bias", 1, x);
  const Tensor w = dense(weight), y = output_of(x), moments = floats({2, x.size(1)}, x);

  DepthwiseForward p{};
  p.shape = depthwise_shape(x, weight);
  p.x = x.const_data_ptr(), p.weight = w.const_data_ptr(), p.y = y.mutable_data_ptr();
  p.bias = bias32.data(), p.affine = rows.data();
  p.x_stride = strides_of(x), p.y_stride = strides_of(y);
  p.act = p.in_act = act_of(act);
  const Gpu& gpu = gpu_of(device);
  const int64_t parts = y.numel() ? depthwise_fwd_parts(p, gpu) : 0;
  const Tensor partials = floats({parts, x.size(1), 3}, x);
  p.partials = data_of(partials);
  const cudaStream_t stream = current_stream(device);
  if (y.numel()) check_cuda(depthwise_fwd(p, gpu, stream), "depthwise_block_train");
  check_cuda(moments_final(p.partials, parts, p.shape.c, data_of(moments), stream), "depthwise_block_train");
  return {y, moments};
}

Four depthwise_block_backward(const Tensor& grad, const Tensor& a, const Tensor& coefficients, const Tensor& x,
                              const Optional& affine, const Tensor& weight, std::string act, bool residual,
                              bool need_input, bool need_weight) {
  check_input(x);
  check_weight(weight, x);
  check_same(a, "a", x);
  check_same(grad, "grad", x);
  const int device = x.get_device_index();
  const DeviceGuard guard(device);
  const int64_t c = x.size(1), kh = weight.size(2), kw = weight.size(3);
  const ChannelRows rows(affine, "affine", 3, x), factors(coefficients, "coefficients", 4, x);
  const Tensor w = dense(weight);
  const Tensor dx = need_input ? output_of(x) : torch::stable::empty({0}, x.scalar_type(), std::nullopt, x.device()),
               dweight = need_weight ? floats({c, 1, kh, kw}, x) : floats({0}, x),
               dbias = need_weight ? floats({c}, x) : floats({0}, x),
               sums = need_input && affine ? floats({2, c}, x) : floats({0}, x);

  DepthwiseGradients p{};
  p.shape = depthwise_shape(x, weight);
  Tensor images[] = {grad, a, x, dx};
  const auto set_images = [&] {
    const auto& [grad, a, x, dx] = images;
    p.grad = grad.const_data_ptr(), p.a = a.const_data_ptr(), p.x = x.const_data_ptr();
    p.dx = dx.numel() ? dx.mutable_data_ptr() : nullptr;
    p.grad_stride = strides_of(grad), p.a_stride = strides_of(a), p.x_stride = strides_of(x);
    if (dx.numel()) p.dx_stride = strides_of(dx);
  };
  set_images();
  p.weight = w.const_data_ptr(), p.coefficients = factors.data(), p.affine = rows.data();
  p.act = act_of(act), p.residual = residual, p.need_weight = need_weight;
  const Gpu& gpu = gpu_of(device);
  const bool in_planes = x.numel() && depthwise_bwd_wants_planes(p, gpu);
  if (in_planes) {
    images[0] = dense(grad), images[1] = dense(a);
    images[2] = need_weight || affine ? dense(x) : images[1];  // else it is not read
    if (need_input) images[3] = output_of(images[1]);
    set_images();
  }
  const int64_t parts = x.numel() ? depthwise_bwd_parts(p, gpu) : 0;
  const Tensor partials = floats({parts, c * (kh * kw + 3)}, x);
  p.partials = data_of(partials);
  const cudaStream_t stream = current_stream(device);
  if (x.numel()) check_cuda(depthwise_bwd(p, gpu, stream), "depthwise_block_backward");
  if (Tensor result = dx; in_planes && need_input) torch::stable::copy_(result, images[3]);
  const SumsFinal final{p.partials, parts, {c * kh * kw, c, 2 * c}, {data_of(dweight), data_of(dbias), data_of(sums)}};
  check_cuda(sums_final(final, stream), "depthwise_block_backward");
  return {dx, dweight, dbias, sums};
}

// ---- the passes around torch's products: contiguous tensors, or all of them channels_last (training_products.py)

bool is_last(const Tensor& t) { return is_channels_last(t); }

RowStrides row_strides(const Tensor& t) {
  const int64_t c = t.size(1), pixels = t.size(2) * t.size(3);
  if (is_last(t)) return {c * pixels, 1, c};
  return {c * pixels, pixels, 1};
}

// [N, C, H, W] as a product reads it: [C, N, H, W] in memory, or channels_last as x
Tensor product_layout(const Tensor& x) {
  if (is_last(x)) return output_of(x);
  const Tensor t =
      torch::stable::empty({x.size(1), x.size(0), x.size(2), x.size(3)}, x.scalar_type(), std::nullopt, x.device());
  return torch::stable::transpose(t, 0, 1);
}

void check_dense(const Tensor& t, const char* name, const Tensor& x) {
  check_same(t, name, x);
  STD_TORCH_CHECK(is_last(x) ? is_last(t) : t.is_contiguous(), name,
                  ": wanted a contiguous tensor, or channels_last throughout; call .contiguous(memory_format=...)");
}

Rows rows_of(const Tensor& x, RowsMode mode, const std::string& act) {
  check_input(x);
  check_dense(x, "x", x);
  Rows p{};
  p.in[0] = x.numel() ? x.const_data_ptr() : nullptr, p.in_stride = row_strides(x);
  p.n = x.size(0), p.c = static_cast<int>(x.size(1)), p.pixels = x.size(2) * x.size(3);
  p.dtype = dtype_of(x, "x"), p.act = act_of(act), p.mode = mode;
  return p;
}

// Of the first one's layout
void add_input(Rows& p, const Tensor& t) { p.in[1] = t.numel() ? t.const_data_ptr() : nullptr; }

void set_output(Rows& p, const Tensor& t) {
  p.out = t.numel() ? t.mutable_data_ptr() : nullptr;
  p.out_stride = is_last(t) ? row_strides(t) : RowStrides{p.pixels, p.n * p.pixels, 1};
}

// Runs the pass, then its second stage
void run_rows(Rows& p, const Tensor& x, const Tensor* result, const char* op) {
  const int device = x.get_device_index();
  const RowsPlan plan = rows_plan(p, gpu_of(device));
  const cudaStream_t stream = current_stream(device);
  const int64_t each = p.mode == RowsMode::moments ? 3 : p.mode == RowsMode::sums ? 2 : 1;
  const Tensor partials = result ? floats({plan.splits, each * p.c}, x) : floats({0}, x);
  p.partials = data_of(partials);
  check_cuda(training_rows(p, plan, stream), op);
  if (!result) return;
  if (p.mode == RowsMode::moments)
    check_cuda(moments_final(p.partials, plan.splits, p.c, data_of(*result), stream), op);
  else
    check_cuda(sums_final({p.partials, plan.splits, {each * p.c, 0, 0}, {data_of(*result), nullptr, nullptr}}, stream),
               op);
}

Tensor training_sum(const Tensor& x, const Optional& affine, const Optional& skip, const Optional& skip_affine,
                    std::string act) {
  Rows p = rows_of(x, RowsMode::sum, act);
  const DeviceGuard guard(x.get_device_index());
  const ChannelRows rows(affine, "affine", 3, x), skip_rows(skip_affine, "skip_affine", 3, x);
  p.rows[0] = rows.data(), p.rows[1] = skip_rows.data();
  if (skip) check_dense(*skip, "skip", x), add_input(p, *skip);
  const Tensor u = product_layout(x);
  set_output(p, u);
  run_rows(p, x, nullptr, "training_sum");
  return u;
}

Two training_gradient(const Tensor& grad, const Tensor& a, const Tensor& coefficients, std::string act) {
  Rows p = rows_of(grad, RowsMode::gradient, act);
  check_dense(a, "a", grad);
  const DeviceGuard guard(grad.get_device_index());
  const ChannelRows rows(coefficients, "coefficients", 4, grad);
  p.rows[0] = rows.data();
  add_input(p, a);
  const Tensor da = product_layout(a), dbias = floats({a.size(1)}, a);
  set_output(p, da);
  run_rows(p, grad, &dbias, "training_gradient");
  return {da, dbias};
}

Tensor training_moments(const Tensor& a, std::string act) {
  Rows p = rows_of(a, RowsMode::moments, act);
  const DeviceGuard guard(a.get_device_index());
  const Tensor found = floats({2, a.size(1)}, a);
  run_rows(p, a, &found, "training_moments");
  return found;
}

Tensor training_sums(const Tensor& grad, const Tensor& x, const Tensor& affine, std::string act) {
  Rows p = rows_of(grad, RowsMode::sums, act);
  check_dense(x, "x", grad);
  const DeviceGuard guard(grad.get_device_index());
  const ChannelRows rows(affine, "affine", 3, grad);
  p.rows[1] = rows.data();
  add_input(p, x);
  const Tensor found = floats({2, x.size(1)}, x);
  run_rows(p, grad, &found, "training_sums");
  return found;
}

// ---- products with statistics in their epilogue: 16-bit types (training_products.py says why)

// Runs the product, then the second stage of its statistics, [2, C]
Tensor run_product(ProductForward& p, const Tensor& y, bool sums, const char* op) {
  const int device = y.get_device_index(), c = static_cast<int>(y.size(1));
  const Gpu& gpu = gpu_of(device);
  const Tensor found = floats({2, y.size(1)}, y);
  const cudaStream_t stream = current_stream(device);
  p.partials = data_of(found);  // any address yet
  const int64_t parts = y.numel() ? product_parts(p, gpu) : 0;
  const Tensor partials = floats({parts, y.size(1), sums ? 2 : 3}, y);
  p.partials = data_of(partials);
  if (y.numel()) check_cuda(product_fwd(p, gpu, stream), op);
  check_cuda(sums ? channel_sums_final(p.partials, parts, c, data_of(found), stream)
                  : moments_final(p.partials, parts, c, data_of(found), stream),
             op);
  return found;
}

Dtype half_of(const Tensor& x) {
  const Dtype dtype = dtype_of(x, "x");
  STD_TORCH_CHECK(dtype != Dtype::float32, "x: got float32, wanted float16 or bfloat16");
  return dtype;
}

void check_product(const Tensor& weight, const Tensor& x) {
  STD_TORCH_CHECK(
      weight.is_cuda() && weight.get_device_index() == x.get_device_index() && weight.scalar_type() == x.scalar_type(),
      "weight: wanted a tensor on x's device, in x's dtype");
  STD_TORCH_CHECK(weight.dim() == 4 && weight.size(1) == x.size(1) && weight.size(2) >= 1 && weight.size(3) >= 1 &&
                      weight.size(0) <= INT_MAX / 4 && weight.size(1) <= INT_MAX / 4,
                  "weight: got shape ", shape_of(weight), " with x of ", shape_of(x), ", wanted [C, Cin, p, q]");
}

Two training_product(const Tensor& x, const Tensor& weight, const Optional& bias, std::string act, bool channels_last) {
  check_input(x);
  const Dtype dtype = half_of(x);
  check_product(weight, x);
  const int64_t h = x.size(2) / weight.size(2), w = x.size(3) / weight.size(3), c = weight.size(0);
  const DeviceGuard guard(x.get_device_index());
  const auto format =
      channels_last ? torch::headeronly::MemoryFormat::ChannelsLast : torch::headeronly::MemoryFormat::Contiguous;
  const Tensor y =
      torch::stable::empty({x.size(0), c, h, w}, x.scalar_type(), std::nullopt, x.device(), std::nullopt, format);
  const ChannelRows bias32(bias, "bias", 1, y);
  const Tensor dense_weight = dense(weight);
  ProductForward p = product_of(x, dense_weight, y, dtype);
  p.bias = bias32.data(), p.act = act_of(act);
  return {y, run_product(p, y, false, "training_product")};
}

Two training_product_sums(const Tensor& da, const Tensor& weight, const Tensor& x, const Tensor& affine,
                          std::string act) {
  check_input(x);
  const Dtype dtype = half_of(x);
  check_dense(x, "x", x);
  check_product(weight, x);
  STD_TORCH_CHECK(weight.size(2) == 1 && weight.size(3) == 1, "weight: got shape ", shape_of(weight),
                  ", wanted [C, Cin, 1, 1]");
  STD_TORCH_CHECK(da.is_cuda() && da.get_device_index() == x.get_device_index() &&
                      da.scalar_type() == x.scalar_type() && da.dim() == 4 && da.size(0) == x.size(0) &&
                      da.size(1) == weight.size(0) && da.size(2) == x.size(2) && da.size(3) == x.size(3),
                  "da: got shape ", shape_of(da), " with x of ", shape_of(x),
                  ", wanted [N, C, H, W] in x's dtype and on its device");
  const DeviceGuard guard(x.get_device_index());
  const ChannelRows rows(affine, "affine", 3, x);
  const Tensor transposed = torch::stable::contiguous(torch::stable::transpose(weight, 0, 1)), dx = output_of(x);
  ProductForward p = product_of(da, transposed, dx, dtype);
  p.like = x.const_data_ptr(), p.mean = rows.data(), p.act = act_of(act);
  return {dx, run_product(p, dx, true, "training_product_sums")};
}

// ---- BatchNorm, between an operator's statistics and the next operator

// The launch of p's channels on the device of `t`
auto on_device_of(const Tensor& t, const char* op) {
  STD_TORCH_CHECK(t.is_cuda(), op, ": wanted tensors on a CUDA device");
  check_runs(t.get_device_index());
  return [device = t.get_device_index(), op](const auto& p) {
    const DeviceGuard guard(device);
    check_cuda(batchnorm_channels(p, current_stream(device)), op);
  };
}

Three batchnorm_rows_cuda(const Tensor& moments, const Optional& gamma, const Optional& beta, double eps,
                          int64_t count) {
  return batchnorm_rows(moments, gamma, beta, eps, count, on_device_of(moments, "batchnorm_rows"));
}

Three batchnorm_gradients_cuda(const Tensor& sums, const Tensor& rows, const Tensor& rstd, int64_t count, bool fixed) {
  return batchnorm_gradients(sums, rows, rstd, count, fixed, on_device_of(sums, "batchnorm_gradients"));
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(cmx, CUDA, m) {
  m.impl("depthwise_block_train", TORCH_BOX(&depthwise_block_train));
  m.impl("depthwise_block_backward", TORCH_BOX(&depthwise_block_backward));
  m.impl("training_sum", TORCH_BOX(&training_sum));
  m.impl("training_gradient", TORCH_BOX(&training_gradient));
  m.impl("training_moments", TORCH_BOX(&training_moments));
  m.impl("training_sums", TORCH_BOX(&training_sums));
  m.impl("training_product", TORCH_BOX(&training_product));
  m.impl("training_product_sums", TORCH_BOX(&training_product_sums));
  m.impl("batchnorm_rows", TORCH_BOX(&batchnorm_rows_cuda));
  m.impl("batchnorm_gradients", TORCH_BOX(&batchnorm_gradients_cuda));
}

}  // namespace cmx
#endif
