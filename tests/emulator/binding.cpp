// The binding of the CUDA kernels on CPU tensors (tests/test_cuda_binding.py): its own sources, in which CUDA reads CPU, as
// operators of the namespace cmx_emulated. The launchers below it are the real ones, of emulated kernels.
#define TORCH_TARGET_VERSION 0x020b000000000000
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <string>

#undef STABLE_TORCH_LIBRARY_IMPL
#define STABLE_TORCH_LIBRARY_IMPL(library, key, m) _STABLE_TORCH_LIBRARY_IMPL(cmx_emulated, CPU, m, C10_UID)
#define is_cuda is_cpu
#define aoti_torch_get_current_cuda_stream emulated_current_stream
#define cudaGetDevice emulated_get_device
#define cudaSetDevice emulated_set_device
#define cudaGetErrorString emulated_error_string
#define cudaGetLastError emulated_last_error
#define CMX_WITH_CUDA
#include "../../csrc/bind_cuda.cpp"
#include "../../csrc/bind_cuda_weights.cpp"
#include "../../csrc/bind_cuda_training.cpp"
#include "cuda/cost.h"

// What the binding asked of CUDA since the last question: "device N" for each change of the current device, "stream N"
static std::string asked, refusal;
static int device = 5;  // the current one; that of a CPU tensor is another

#define CMX_SHOWN extern "C" __attribute__((visibility("default")))

CMX_SHOWN const char* cmx_asked() {
  static std::string answer;
  answer = std::exchange(asked, "");
  return answer.c_str();
}

// No device runs the kernels, and why; null: all do.
CMX_SHOWN void cmx_refuse(const char* why) { refusal = why ? why : ""; }

extern "C" AOTITorchError emulated_current_stream(int32_t of, void** stream) {
  asked += "stream " + std::to_string(of) + "\n", *stream = nullptr;
  return AOTI_TORCH_SUCCESS;
}
extern "C" cudaError_t emulated_get_device(int* found) { return *found = device, cudaSuccess; }
extern "C" cudaError_t emulated_set_device(int wanted) {
  asked += "device " + std::to_string(wanted) + "\n", device = wanted;
  return cudaSuccess;
}
extern "C" const char* emulated_error_string(cudaError_t) { return "an error"; }
extern "C" cudaError_t emulated_last_error() { return cudaSuccess; }
const char* cmx_cuda_why_not(int) { return refusal.empty() ? nullptr : refusal.c_str(); }

namespace cmx {

const Gpu& gpu_of(int) { return kGpus[0].gpu; }
bool product_wgmma_runs() { return true; }

}  // namespace cmx
