// Can a kernel of this binary run on a device, and if not, why. Plain C: usable from every file, and through ctypes.
#pragma once

#define CMX_EXPORT __attribute__((visibility("default")))

#ifdef __cplusplus
extern "C" {
#endif

// The architectures the kernels were compiled for, as in TORCH_CUDA_ARCH_LIST: "8.0;9.0a;12.0+PTX".
CMX_EXPORT const char* cmx_cuda_archs(void);

// CUDA versions as 1000 * major + 10 * minor: of the runtime inside this binary, and of the driver (0: there is none).
CMX_EXPORT int cmx_cuda_runtime_version(void);
CMX_EXPORT int cmx_cuda_driver_version(void);

// NULL where the kernels run on this device, else one sentence. Asked once per device, then remembered.
// With a driver this initialises CUDA in the process: like every CUDA call, not before a fork whose child uses CUDA.
CMX_EXPORT const char* cmx_cuda_why_not(int device);

#ifdef __cplusplus
}
#endif
