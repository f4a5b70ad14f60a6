// The operators on CUDA tensors, behind torch's stable ABI. In a torch without CUDA this loads and is never called.
#ifdef CMX_WITH_CUDA
#include <algorithm>
#include <array>
#include <climits>
#include <vector>

#include "bind_cuda.h"
#include "cuda/depthwise.h"
#include "cuda/fold.h"
#include "cuda/gpu.h"
#include "cuda/unfold.h"

namespace cmx {
namespace {

// Up to three vectors [count] as dense float32, those of 16 bits in one launch; keeps their memory alive until it is enqueued
class Vectors {
 public:
  using Named = std::pair<const Optional*, const char*>;
  Vectors(std::initializer_list<Named> given, const Tensor& x, int64_t count) {
    Widen narrow{};
    std::array<int, Widen::kMost> place{};
    int i = 0;
    for (const auto& [v, name] : given) {
      if (*v) {
        const Tensor& t = **v;
        STD_TORCH_CHECK(
            t.is_cuda() && t.get_device_index() == x.get_device_index() && t.dim() == 1 && t.size(0) == count, name,
            ": got shape ", shape_of(t), ", wanted [", count, "] on x's device");
        const bool narrow_type = t.scalar_type() == x.scalar_type() && x.scalar_type() != ScalarType::Float;
        kept_[i] =
            dense(t.scalar_type() == ScalarType::Float || narrow_type ? t : torch::stable::to(t, ScalarType::Float));
        if (narrow_type)
          narrow.vector[narrow.vectors] = kept_[i]->const_data_ptr(), place[narrow.vectors++] = i;
        else
          data_[i] = static_cast<const float*>(kept_[i]->const_data_ptr());
      }
      ++i;
    }
    if (!narrow.vectors || !count) return;
    rows_ = torch::stable::empty({narrow.vectors, count}, ScalarType::Float, std::nullopt, x.device());
    narrow.rows = static_cast<float*>(rows_->mutable_data_ptr());
    narrow.channels = static_cast<int>(count), narrow.dtype = dtype_of(x, "x");
    check_cuda(widen(narrow, current_stream(x.get_device_index())), "conversion of vectors");
    for (int k = 0; k < narrow.vectors; ++k) data_[place[k]] = narrow.rows + k * count;
  }
  const float* operator[](int i) const { return data_[i]; }

 private:
  std::array<Optional, Widen::kMost> kept_;
  std::array<const float*, Widen::kMost> data_{};
  Optional rows_;
};

// Checks x [N, C, H, W] and the weight's place and dtype; returns the device.
int check_arguments(const Tensor& x, const Tensor& weight) {
  STD_TORCH_CHECK(x.is_cuda() && x.dim() == 4, "x: got shape ", shape_of(x),
                  ", wanted 4 dimensions [N, C, H, W] on a CUDA device");
  const int device = x.get_device_index();
  check_runs(device);
  STD_TORCH_CHECK(weight.is_cuda() && weight.get_device_index() == device && weight.scalar_type() == x.scalar_type(),
                  "weight: wanted a tensor on x's device, in x's dtype");
  for (const Tensor* const t : {&x, &weight})
    for (int64_t d = 0; d < t->dim(); d++)
      STD_TORCH_CHECK(t->size(d) <= INT_MAX, "got ", t->size(d), " along a dimension, wanted less than 2^31");
  return device;
}

torch::headeronly::MemoryFormat format_of(const Tensor& x) {
  return is_channels_last(x) ? torch::headeronly::MemoryFormat::ChannelsLast
                             : torch::headeronly::MemoryFormat::Contiguous;
}

Tensor output_like(const Tensor& x, int64_t c, int64_t h, int64_t w) {
  return torch::stable::empty({x.size(0), c, h, w}, x.scalar_type(), std::nullopt, x.device(), std::nullopt,
                              format_of(x));
}

// What follows a convolution: float32 [C] or null
struct Epilogue {
  const float *bias, *scale, *shift;
  Act act;
};

// `channels`: of what it is applied to, which is x or made of it
void check_depthwise_weight(const Tensor& x, const Tensor& weight, int64_t channels) {
  STD_TORCH_CHECK(weight.dim() == 4 && weight.size(0) == channels && weight.size(1) == 1, "weight: got shape ",
                  shape_of(weight), " with x of ", shape_of(x), ", wanted [C, 1, kh, kw]");
  const int64_t kh = weight.size(2), kw = weight.size(3);
  STD_TORCH_CHECK(kh >= 1 && kw >= 1 && kh <= kMaxKernel && kw <= kMaxKernel, "weight: got a ", kh, "x", kw,
                  " kernel, wanted 1 to ", kMaxKernel, " on each side");
}

void run_depthwise(const Tensor& x, const Tensor& weight, const Tensor& y, const Epilogue& after, bool residual,
                   Dtype dtype, int device) {
  const auto size = [](const Tensor& t, int64_t d) { return static_cast<int>(t.size(d)); };
  const Tensor w = dense(weight);
  DepthwiseForward p{};
  p.x = x.const_data_ptr(), p.weight = w.const_data_ptr(), p.y = y.mutable_data_ptr();
  p.bias = after.bias, p.scale = after.scale, p.shift = after.shift;
  p.shape = {size(x, 0), size(x, 1), size(x, 2), size(x, 3), size(w, 2), size(w, 3), dtype};
  p.x_stride = strides_of(x), p.y_stride = strides_of(y);
  p.act = after.act, p.residual = residual;
  check_cuda(depthwise_fwd(p, gpu_of(device), current_stream(device)), "depthwise_block");
}

Tensor depthwise_block(const Tensor& x, const Tensor& weight, const Optional& bias, const Optional& scale,
                       const Optional& shift, std::string act, bool residual) {
  const int device = check_arguments(x, weight);
  const Dtype dtype = dtype_of(x, "x");
  check_depthwise_weight(x, weight, x.size(1));
  const Act activation = act_of(act);

  const DeviceGuard guard(device);
  const Vectors float32({{&bias, "bias"}, {&scale, "scale"}, {&shift, "shift"}}, x, x.size(1));
  Tensor y = output_like(x, x.size(1), x.size(2), x.size(3));
  if (!y.numel()) return y;
  run_depthwise(x, weight, y, {float32[0], float32[1], float32[2], activation}, residual, dtype, device);
  return y;
}

Tensor convolution(const Tensor& x, const Tensor& weight, std::vector<int64_t> stride) {
  using torch::stable::detail::from;
  const std::vector<int64_t> zeros{0, 0}, ones{1, 1};
  std::array<StableIValue, 9> stack{from(x),    from(weight), from(Optional{}), from(stride),    from(zeros),
                                    from(ones), from(false),  from(zeros),      from(int64_t(1))};
  STD_TORCH_CHECK(torch_call_dispatcher("aten::convolution", "", stack.data(), TORCH_ABI_VERSION) == AOTI_TORCH_SUCCESS,
                  "torch's own convolution failed");
  return torch::stable::detail::to<Tensor>(stack[0]);
}

// float32: torch's own convolution, under its allow_tf32, and the rest in one pass in place
Tensor product_float32(const Tensor& x, const Tensor& weight, const Epilogue& after, int device) {
  const int64_t c = weight.size(0), ph = weight.size(2), pw = weight.size(3);
  Tensor y = x.size(1) ? torch::stable::contiguous(convolution(x, weight, {ph, pw}), format_of(x))
                       : torch::stable::fill_(output_like(x, c, x.size(2) / ph, x.size(3) / pw), 0);
  STD_TORCH_CHECK(y.scalar_type() == ScalarType::Float,
                  "x: got float32 under autocast, which runs torch's convolution in another dtype: "
                  "call cmx_kernels.ops, which follows autocast, or turn it off here");
  EpilogueInplace p{};
  p.y = static_cast<float*>(y.mutable_data_ptr());
  p.bias = after.bias, p.scale = after.scale, p.shift = after.shift;
  p.channels = c, p.act = after.act, p.channels_last = is_channels_last(y);
  const int64_t plane = y.size(2) * y.size(3);
  p.rows = y.size(0) * (p.channels_last ? plane : c), p.columns = p.channels_last ? c : plane;
  check_cuda(epilogue_inplace(p, gpu_of(device), current_stream(device)), "epilogue");
  return y;
}

// Unfolds the patches of a product where that is faster, and makes it one of 1x1 patches; keeps their memory alive.
struct Unfolded {
  Optional patches, weight;
  Unfolded(ProductForward& p, const Gpu& gpu, cudaStream_t stream, const Tensor& x, const Tensor& dense_weight,
           const char* op) {
    if (!product_unfolds(p, gpu)) return;
    const ProductShape s = p.shape, left = unfolded(s);
    const int64_t k = left.c_in;
    const bool last = is_last(p.y_stride);
    patches = torch::stable::empty(
        {s.n, k, s.h, s.w}, x.scalar_type(), std::nullopt, x.device(), std::nullopt,
        last ? torch::headeronly::MemoryFormat::ChannelsLast : torch::headeronly::MemoryFormat::Contiguous);
    Unfold u{};
    u.image = patches_of(s, p.x, p.x_stride, patches->mutable_data_ptr(), last, gpu);
    if (s.k() % 8) {
      weight = torch::stable::empty({s.c_out, k}, x.scalar_type(), std::nullopt, x.device());
      u.weight = weight_rows_of(s, p.weight, strides_of(dense_weight), weight->mutable_data_ptr(), gpu);
      p.weight = weight->const_data_ptr();
    }
    check_cuda(unfold(u, stream), op);
    p.shape = left, p.x = patches->const_data_ptr();
    p.x_stride = dense_strides(k, s.h, s.w, last);
  }
};

void check_product_weight(const Tensor& x, const Tensor& weight, int64_t channels, bool patches) {
  STD_TORCH_CHECK(weight.dim() == 4 && weight.size(1) == channels && weight.size(2) >= 1 && weight.size(3) >= 1 &&
                      (patches || (weight.size(2) == 1 && weight.size(3) == 1)),
                  "weight: got shape ", shape_of(weight), " with x of ", shape_of(x), ", wanted ",
                  patches ? "[C, Cin, p, q]" : "[C, Cin, 1, 1]");
  STD_TORCH_CHECK(!patches || (x.size(2) / weight.size(2) && x.size(3) / weight.size(3)), "x: got an image of ",
                  x.size(2), "x", x.size(3), ", wanted at least one patch of ", weight.size(2), "x", weight.size(3));
}

// 16-bit types
void run_product(const Tensor& x, const Tensor& weight, const Tensor& y, const Epilogue& after, Dtype dtype, int device,
                 const char* op) {
  const Gpu& gpu = gpu_of(device);
  const cudaStream_t stream = current_stream(device);
  const Tensor dense_weight = dense(weight);
  ProductForward p = product_of(x, dense_weight, y, dtype);
  p.bias = after.bias, p.scale = after.scale, p.shift = after.shift, p.act = after.act;
  const Unfolded unfolded(p, gpu, stream, x, dense_weight, op);
  check_cuda(product_fwd(p, gpu, stream), op);
}

// patch_embed, and pointwise_block, whose patches are 1x1
Tensor product_block(const Tensor& x, const Tensor& weight, const Optional& bias, const Optional& scale,
                     const Optional& shift, const std::string& act, bool patches) {
  const int device = check_arguments(x, weight);
  const Dtype dtype = dtype_of(x, "x");
  check_product_weight(x, weight, x.size(1), patches);
  const int64_t c = weight.size(0), h = x.size(2) / weight.size(2), w = x.size(3) / weight.size(3);
  const Act activation = act_of(act);

  const DeviceGuard guard(device);
  const Vectors float32({{&bias, "bias"}, {&scale, "scale"}, {&shift, "shift"}}, x, c);
  if (x.size(0) * c * h * w == 0) return output_like(x, c, h, w);
  const Epilogue after{float32[0], float32[1], float32[2], activation};
  if (dtype == Dtype::float32) return product_float32(x, weight, after, device);
  Tensor y = output_like(x, c, h, w);
  run_product(x, weight, y, after, dtype, device, patches ? "patch_embed" : "pointwise_block");
  return y;
}

Tensor patch_embed(const Tensor& x, const Tensor& weight, const Optional& bias, const Optional& scale,
                   const Optional& shift, std::string act) {
  return product_block(x, weight, bias, scale, shift, act, true);
}

Tensor pointwise_block(const Tensor& x, const Tensor& weight, const Optional& bias, const Optional& scale,
                       const Optional& shift, std::string act) {
  return product_block(x, weight, bias, scale, shift, act, false);
}

Tensor pool_head(const Tensor& x, const Tensor& weight, const Optional& bias) {
  const int device = check_arguments(x, weight);
  const Dtype dtype = dtype_of(x, "x");
  STD_TORCH_CHECK(weight.dim() == 2 && weight.size(1) == x.size(1), "weight: got shape ", shape_of(weight),
                  " with x of ", shape_of(x), ", wanted [classes, C]");
  STD_TORCH_CHECK(x.size(2) * x.size(3) > 0, "x: got shape ", shape_of(x), ", wanted at least one pixel to average");
  const int64_t n = x.size(0), c = x.size(1), classes = weight.size(0);
  const DeviceGuard guard(device);
  const Vectors float32({{&bias, "bias"}}, x, classes);
  const Tensor w = dense(weight);
  Tensor y = torch::stable::empty({n, classes}, x.scalar_type(), std::nullopt, x.device());
  if (!y.numel()) return y;
  Tensor pooled = torch::stable::empty({n, c}, ScalarType::Float, std::nullopt, x.device());
  PoolHeadForward p{};
  p.x = x.const_data_ptr(), p.weight = w.const_data_ptr(), p.y = y.mutable_data_ptr();
  p.bias = float32[0], p.pooled = static_cast<float*>(pooled.mutable_data_ptr());
  p.n = static_cast<int>(n), p.c = static_cast<int>(c), p.classes = static_cast<int>(classes);
  p.h = static_cast<int>(x.size(2)), p.w = static_cast<int>(x.size(3)), p.dtype = dtype;
  p.x_stride = strides_of(x);
  check_cuda(pool_head_fwd(p, current_stream(device)), "pool_head");
  return y;
}

// ---- a stem and blocks, some images at a time through all of them: cmx_kernels/ops/depth_first.py

// Images of a part pass through two tensors: where their result is wanted, and one beside it.
Tensor run_blocks(const Tensor& x, std::vector<Tensor> weights, const Tensor& constants, int64_t images,
                  std::string act, bool stem) {
  const int64_t layers = static_cast<int64_t>(weights.size());
  STD_TORCH_CHECK(layers > stem && layers % 2 == stem, "weights: got ", layers, ", wanted two of every block",
                  stem ? " and one of a stem" : "");
  STD_TORCH_CHECK(images > 0, "images: got ", images, ", wanted at least one");
  int device = 0;
  for (const Tensor& weight : weights) device = check_arguments(x, weight);
  const Dtype dtype = dtype_of(x, "x");
  if (stem) check_product_weight(x, weights[0], x.size(1), true);
  const int64_t n = x.size(0), c = stem ? weights[0].size(0) : x.size(1);
  const int64_t h = stem ? x.size(2) / weights[0].size(2) : x.size(2),
                w = stem ? x.size(3) / weights[0].size(3) : x.size(3);
  for (int64_t i = stem; i < layers; i += 2) {
    check_depthwise_weight(x, weights[i], c);
    check_product_weight(x, weights[i + 1], c, false);
    STD_TORCH_CHECK(weights[i + 1].size(0) == c, "weight: got shape ", shape_of(weights[i + 1]), ", wanted ", c,
                    " channels, as before it");
  }
  STD_TORCH_CHECK(constants.is_cuda() && constants.get_device_index() == device && constants.is_contiguous() &&
                      constants.scalar_type() == ScalarType::Float && constants.dim() == 3 &&
                      constants.size(0) == layers && constants.size(1) == 3 && constants.size(2) == c,
                  "constants: got shape ", shape_of(constants), ", wanted float32 [", layers, ", 3, ", c,
                  "] on x's device");
  const Act activation = act_of(act);
  const DeviceGuard guard(device);
  const int64_t most = std::min(images, n);
  const bool torchs = dtype == Dtype::float32;  // products, which make their output themselves
  if (n * c * h * w == 0) return output_like(x, c, h, w);
  const Tensor y = torchs && most == n ? x : output_like(x, c, h, w);
  const auto part_of = [](const Tensor& t, int64_t first, int64_t count) {
    Tensor whole = t;
    return count == t.size(0) ? whole : torch::stable::narrow(whole, 0, first, count);
  };
  const Tensor between = output_like(most == n ? x : part_of(y, 0, most), c, h, w);
  const float* const rows = static_cast<const float*>(constants.const_data_ptr());
  for (int64_t first = 0; first < n; first += most) {
    const int64_t count = std::min(most, n - first);
    const Tensor other = part_of(between, 0, count);
    Tensor now = part_of(x, first, count), to = part_of(y, first, count);
    for (int64_t i = 0; i < layers; i++) {
      const Epilogue after{rows + 3 * i * c, rows + (3 * i + 1) * c, rows + (3 * i + 2) * c, activation};
      const bool patches = stem && i == 0;
      if (!patches && (i - stem) % 2 == 0) {
        run_depthwise(now, weights[i], other, after, true, dtype, device);
        now = other;
      } else if (torchs) {
        now = product_float32(now, weights[i], after, device);
      } else {
        run_product(now, weights[i], to, after, dtype, device, patches ? "patch_embed" : "pointwise_block");
        now = to;
      }
    }
    if (torchs && count == n) return now;
    if (torchs) torch::stable::copy_(to, now);
  }
  return y;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(cmx, CUDA, m) {
  m.impl("patch_embed", TORCH_BOX(&patch_embed));
  m.impl("depthwise_block", TORCH_BOX(&depthwise_block));
  m.impl("pointwise_block", TORCH_BOX(&pointwise_block));
  m.impl("pool_head", TORCH_BOX(&pool_head));
  m.impl("run_blocks", TORCH_BOX(&run_blocks));
}

}  // namespace cmx
#endif
