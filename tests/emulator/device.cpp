// csrc/cuda/device.cu over a CUDA runtime that answers what a test wants (tests/test_cuda_why_not.py).
#include <cuda_runtime.h>

#include <cstring>

struct Answers {  // as in the test
  int driver, devices;
  cudaError_t count, set, attributes;
};
static Answers answers;

static cudaError_t driver_version(int* version) { return *version = answers.driver, cudaSuccess; }
static cudaError_t device_count(int* count) { return *count = answers.devices, answers.count; }
static cudaError_t properties_of(cudaDeviceProp* found, int) {
  *found = {};
  std::strcpy(found->name, "Tesla T4");
  found->major = 7, found->minor = 5;
  return cudaSuccess;
}

#define cudaDriverGetVersion driver_version
#define cudaGetDeviceCount device_count
#undef cudaGetDeviceProperties
#define cudaGetDeviceProperties properties_of
#define cudaSetDevice(device) ((void)(device), answers.set)
#define cudaFuncGetAttributes(found, kernel) ((void)(found), (void)(kernel), answers.attributes)
#define cudaGetErrorString(error) "the runtime's own words"
#define CMX_CUDA_ARCHS 8.0;9.0a+PTX
#include "cuda/device.cu"

extern "C" CMX_EXPORT void cmx_answer(const Answers* wanted) { answers = *wanted; }
