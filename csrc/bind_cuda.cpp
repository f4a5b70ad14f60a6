// The operators on CUDA tensors, behind torch's stable ABI. In a torch without CUDA this loads and is never called.
#ifdef CMX_WITH_CUDA
#include <climits>

#include "bind.h"
#include "cuda/depthwise.h"
#include "cuda/device.h"
#include "cuda/gpu.h"

// From libtorch_cuda, where there is one; null in a torch without CUDA
extern "C" __attribute__((weak)) AOTITorchError aoti_torch_get_current_cuda_stream(int32_t device, void** stream);

extern "C" cudaError_t cudaGetDevice(int*);
extern "C" cudaError_t cudaSetDevice(int);
extern "C" const char* cudaGetErrorString(cudaError_t);

namespace cmx {
namespace {

class DeviceGuard {
 public:
  explicit DeviceGuard(int device) {
    if (cudaGetDevice(&before_) == cudaSuccess && before_ != device) cudaSetDevice(device), changed_ = true;
  }
  ~DeviceGuard() {
    if (changed_) cudaSetDevice(before_);
  }
  DeviceGuard(const DeviceGuard&) = delete;

 private:
  int before_ = 0;
  bool changed_ = false;
};

cudaStream_t current_stream(int device) {
  void* stream = nullptr;
  STD_TORCH_CHECK(aoti_torch_get_current_cuda_stream, "this torch has no CUDA");
  STD_TORCH_CHECK(aoti_torch_get_current_cuda_stream(device, &stream) == AOTI_TORCH_SUCCESS,
                  "torch has no current CUDA stream");
  return static_cast<cudaStream_t>(stream);
}

void check_runs(int device) {
  const char* const why_not = cmx_cuda_why_not(device);
  STD_TORCH_CHECK(!why_not, "no CUDA kernel runs here: ", why_not);
}

// [channels] as dense float32; the tensor keeps its memory alive until the launch is enqueued
struct Vector {
  Optional tensor;
  Vector(const Optional& v, const char* name, const Tensor& x) {
    if (!v) return;
    STD_TORCH_CHECK(
        v->is_cuda() && v->get_device_index() == x.get_device_index() && v->dim() == 1 && v->size(0) == x.size(1), name,
        ": got shape ", shape_of(*v), ", wanted [", x.size(1), "] on x's device");
    tensor = dense(v->scalar_type() == ScalarType::Float ? *v : torch::stable::to(*v, ScalarType::Float));
  }
  const float* data() const { return tensor ? static_cast<const float*>(tensor->const_data_ptr()) : nullptr; }
};

Strides strides_of(const Tensor& t) { return {t.stride(0), t.stride(1), t.stride(2), t.stride(3)}; }

Tensor depthwise_block(const Tensor& x, const Tensor& weight, const Optional& bias, const Optional& scale,
                       const Optional& shift, std::string act, bool residual) {
  STD_TORCH_CHECK(x.is_cuda() && x.dim() == 4, "x: got shape ", shape_of(x),
                  ", wanted 4 dimensions [N, C, H, W] on a CUDA device");
  const int device = x.get_device_index();
  check_runs(device);
  const Dtype dtype = dtype_of(x, "x");
  STD_TORCH_CHECK(weight.is_cuda() && weight.get_device_index() == device && weight.scalar_type() == x.scalar_type(),
                  "weight: wanted a tensor on x's device, in x's dtype");
  STD_TORCH_CHECK(weight.dim() == 4 && weight.size(0) == x.size(1) && weight.size(1) == 1, "weight: got shape ",
                  shape_of(weight), " with x of ", shape_of(x), ", wanted [C, 1, kh, kw]");
  const int64_t kh = weight.size(2), kw = weight.size(3);
  STD_TORCH_CHECK(kh >= 1 && kw >= 1 && kh <= kMaxKernel && kw <= kMaxKernel, "weight: got a ", kh, "x", kw,
                  " kernel, wanted 1 to ", kMaxKernel, " on each side");
  for (int64_t d = 0; d < 4; d++)
    STD_TORCH_CHECK(x.size(d) <= INT_MAX, "x: got ", x.size(d), " along a dimension, wanted less than 2^31");
  const Act activation = act_of(act);

  const DeviceGuard guard(device);
  const Vector bias32(bias, "bias", x), scale32(scale, "scale", x), shift32(shift, "shift", x);
  const Tensor w = dense(weight);
  const auto format =
      is_channels_last(x) ? torch::headeronly::MemoryFormat::ChannelsLast : torch::headeronly::MemoryFormat::Contiguous;
  Tensor y = torch::stable::empty({x.size(0), x.size(1), x.size(2), x.size(3)}, x.scalar_type(), std::nullopt,
                                  x.device(), std::nullopt, format);
  if (!y.numel()) return y;

  DepthwiseForward p{};
  p.x = x.const_data_ptr(), p.weight = w.const_data_ptr(), p.y = y.mutable_data_ptr();
  p.bias = bias32.data(), p.scale = scale32.data(), p.shift = shift32.data();
  p.shape = {static_cast<int>(x.size(0)),
             static_cast<int>(x.size(1)),
             static_cast<int>(x.size(2)),
             static_cast<int>(x.size(3)),
             static_cast<int>(kh),
             static_cast<int>(kw),
             dtype};
  p.x_stride = strides_of(x), p.y_stride = strides_of(y);
  p.act = activation, p.residual = residual;
  const cudaError_t error = depthwise_fwd(p, gpu_of(device), current_stream(device));
  STD_TORCH_CHECK(error == cudaSuccess, "depthwise_block: CUDA says: ", cudaGetErrorString(error));
  return y;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(cmx, CUDA, m) { m.impl("depthwise_block", TORCH_BOX(&depthwise_block)); }

}  // namespace cmx
#endif
