// The question is put to the runtime itself, with a kernel that is compiled like all others: no table of architectures.
#include "cuda/device.h"

#include <cuda_runtime.h>

#include <map>
#include <mutex>
#include <string>
#include <thread>

#define CMX_STRING(...) #__VA_ARGS__
#define CMX_EXPANDED_STRING(...) CMX_STRING(__VA_ARGS__)

namespace {

__global__ void probe_kernel() {}

std::string version_name(int version) {
  return std::to_string(version / 1000) + "." + std::to_string(version % 1000 / 10);
}

std::string device_name(int device) {
  cudaDeviceProp properties;
  const std::string number = "device " + std::to_string(device);
  if (cudaGetDeviceProperties(&properties, device) != cudaSuccess) return number;
  return number + " (" + properties.name + ", compute capability " + std::to_string(properties.major) + "." +
         std::to_string(properties.minor) + ")";
}

std::string sentence(cudaError_t error, int device) {
  switch (error) {
    case cudaErrorInsufficientDriver:
      return "the NVIDIA driver supports CUDA " + version_name(cmx_cuda_driver_version()) +
             " and the kernels were built with CUDA " + version_name(cmx_cuda_runtime_version()) +
             ": update the driver, or build with an older nvcc";
    case cudaErrorNoDevice: return "no CUDA device is visible (is CUDA_VISIBLE_DEVICES set?)";
    case cudaErrorNoKernelImageForDevice:
    case cudaErrorInvalidDeviceFunction:
      return "the kernels were built for " + std::string(cmx_cuda_archs()) + ", which does not serve " +
             device_name(device) + ": build again with its compute capability in TORCH_CUDA_ARCH_LIST";
    case cudaErrorUnsupportedPtxVersion:
    case cudaErrorInvalidPtx:
    case cudaErrorJitCompilerNotFound:
      return "the kernels were built for " + std::string(cmx_cuda_archs()) +
             ", and the driver cannot compile their PTX for " + device_name(device) + " (" + cudaGetErrorString(error) +
             "): build again with its compute capability in TORCH_CUDA_ARCH_LIST, or update the driver";
    default: return "CUDA says of device " + std::to_string(device) + ": " + cudaGetErrorString(error);
  }
}

// Empty where the kernels run.
std::string ask(int device) {
  if (cmx_cuda_driver_version() == 0) return "no NVIDIA driver is installed (libcuda.so.1 was not found)";
  int count = 0;
  if (cudaError_t error = cudaGetDeviceCount(&count)) return sentence(error, device);
  if (device < 0 || device >= count)
    return "there is no CUDA device " + std::to_string(device) + ", only " + std::to_string(count) + " of them";
  if (cudaError_t error = cudaSetDevice(device)) return sentence(error, device);
  cudaFuncAttributes attributes;
  if (cudaError_t error = cudaFuncGetAttributes(&attributes, probe_kernel)) return sentence(error, device);
  return "";
}

}  // namespace

const char* cmx_cuda_archs(void) { return CMX_EXPANDED_STRING(CMX_CUDA_ARCHS); }

int cmx_cuda_runtime_version(void) { return CUDART_VERSION; }

int cmx_cuda_driver_version(void) {
  int version = 0;
  return cudaDriverGetVersion(&version) == cudaSuccess ? version : 0;
}

const char* cmx_cuda_why_not(int device) {
  static std::mutex mutex;
  static std::map<int, std::string> answers;
  const std::lock_guard<std::mutex> lock(mutex);
  const auto [answer, is_new] = answers.try_emplace(device);
  if (is_new) {
    std::string& text = answer->second;
    // in a thread of its own, so that the caller's current device stays what it is
    std::thread([&text, device] { text = ask(device); }).join();
  }
  return answer->second.empty() ? nullptr : answer->second.c_str();
}
