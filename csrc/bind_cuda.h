// What the files that bind CUDA kernels share: device, stream, strides.
#pragma once

#include <driver_types.h>

#include "bind.h"
#include "cuda/device.h"
#include "cuda/product.h"

// From libtorch_cuda, where there is one; null in a torch without CUDA
extern "C" __attribute__((weak)) AOTITorchError aoti_torch_get_current_cuda_stream(int32_t device, void** stream);

extern "C" cudaError_t cudaGetDevice(int*);
extern "C" cudaError_t cudaSetDevice(int);
extern "C" const char* cudaGetErrorString(cudaError_t);
extern "C" cudaError_t cudaGetLastError();

namespace cmx {

inline void check_cuda(cudaError_t error, const char* op) {
  if (error == cudaSuccess) return;
  cudaGetLastError();  // it is reported here, not again by the next one who asks
  STD_TORCH_CHECK(false, op, ": CUDA says: ", cudaGetErrorString(error));
}

class DeviceGuard {
 public:
  explicit DeviceGuard(int device) {
    check_cuda(cudaGetDevice(&before_), "the current device");
    if (before_ == device) return;
    check_cuda(cudaSetDevice(device), "the tensor's device");
    changed_ = true;
  }
  ~DeviceGuard() {
    if (changed_) cudaSetDevice(before_);
  }
  DeviceGuard(const DeviceGuard&) = delete;

 private:
  int before_ = 0;
  bool changed_ = false;
};

inline cudaStream_t current_stream(int device) {
  void* stream = nullptr;
  STD_TORCH_CHECK(aoti_torch_get_current_cuda_stream, "this torch has no CUDA");
  STD_TORCH_CHECK(aoti_torch_get_current_cuda_stream(device, &stream) == AOTI_TORCH_SUCCESS,
                  "torch has no current CUDA stream");
  return static_cast<cudaStream_t>(stream);
}

inline void check_runs(int device) {
  const char* const why_not = cmx_cuda_why_not(device);
  STD_TORCH_CHECK(!why_not, "no CUDA kernel runs here: ", why_not);
}

inline Strides strides_of(const Tensor& t) { return {t.stride(0), t.stride(1), t.stride(2), t.stride(3)}; }

// y = weight x without an epilogue: x and y have four dimensions of less than 2^31, the weight is dense [c_out, c_in, ph, pw]
inline ProductForward product_of(const Tensor& x, const Tensor& weight, const Tensor& y, Dtype dtype) {
  const auto size = [](const Tensor& t, int64_t d) { return static_cast<int>(t.size(d)); };
  ProductForward p{};
  p.x = x.const_data_ptr(), p.weight = weight.const_data_ptr(), p.y = y.mutable_data_ptr();
  p.shape = {size(x, 0), size(weight, 1), size(weight, 0), size(y, 2),
             size(y, 3), size(weight, 2), size(weight, 3), dtype};
  p.x_stride = strides_of(x), p.y_stride = strides_of(y);
  return p;
}

}  // namespace cmx
