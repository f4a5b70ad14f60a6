#include "gpu.h"

#include <cuda_runtime.h>

#include <cstring>
#include <map>
#include <mutex>

namespace cmx {
namespace {

int attribute(cudaDeviceAttr what, int device) {  // 0 where the driver does not tell
  int value = 0;
  if (cudaDeviceGetAttribute(&value, what, device)) cudaGetLastError();  // the next one who asks shall not get it
  return value;
}

bool is_geforce(int device) {
  cudaDeviceProp properties;
  if (cudaGetDeviceProperties(&properties, device)) return cudaGetLastError(), false;
  return std::strstr(properties.name, "GeForce");
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
    Gpu& gpu = found->second;
    gpu = {
        .arch = 10 * attribute(cudaDevAttrComputeCapabilityMajor, device) +
                attribute(cudaDevAttrComputeCapabilityMinor, device),
        .multiprocessors = attribute(cudaDevAttrMultiProcessorCount, device),
        .shared_bytes = attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin, device),
        .ghz = attribute(cudaDevAttrClockRate, device) * 1e-6 * 0.9,  // under load
        .tb_per_s = bus_bytes * transfers * 1e-12 * 0.9,              // as a copy reaches it
    };
    // virtual and integrated GPUs may not tell their clocks: as a server GPU, or every plan would take forever alike
    if (gpu.ghz <= 0) gpu.ghz = 1.5;
    if (gpu.tb_per_s <= 0) gpu.tb_per_s = 0.02 * gpu.multiprocessors;
    if (is_geforce(device)) gpu.tensor = 0.5;  // as in the table of cost.h
  }
  return found->second;
}

}  // namespace cmx
