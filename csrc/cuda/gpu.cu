#include "gpu.h"

#include <cuda_runtime.h>

#include <map>
#include <mutex>

namespace cmx {
namespace {

int attribute(cudaDeviceAttr what, int device) {
  int value = 0;
  cudaDeviceGetAttribute(&value, what, device);
  return value;
}

}  // namespace

const Gpu& gpu_of(int device) {
  static std::mutex mutex;
  static std::map<int, Gpu> known;
  const std::lock_guard<std::mutex> lock(mutex);
  const auto [found, is_new] = known.try_emplace(device);
  if (is_new) {
    const double bus_bytes = attribute(cudaDevAttrGlobalMemoryBusWidth, device) / 8.;
    const double transfers = 2e3 * attribute(cudaDevAttrMemoryClockRate, device);  // two a clock of so many kHz
    found->second = {
        .arch = 10 * attribute(cudaDevAttrComputeCapabilityMajor, device) +
                attribute(cudaDevAttrComputeCapabilityMinor, device),
        .multiprocessors = attribute(cudaDevAttrMultiProcessorCount, device),
        .shared_bytes = attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin, device),
        .ghz = attribute(cudaDevAttrClockRate, device) * 1e-6 * 0.9,  // under load
        .tb_per_s = bus_bytes * transfers * 1e-12 * 0.9,              // as a copy reaches it
    };
  }
  return found->second;
}

}  // namespace cmx
