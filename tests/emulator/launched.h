// In which orders of the threads (bits 0 to 2) a kernel was launched since the last question, for ctypes.
#pragma once

#include "cuda/platform.cuh"

extern "C" __attribute__((visibility("default"))) int cmx_launched(const void* kernel) {
  return static_cast<int>(std::exchange(cmx::emulator::machine.launched[kernel], 0));
}
