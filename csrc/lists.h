// The lists that everything else reads.
#pragma once

// storage types: name in torch, enumerator
#define CMX_FOR_EACH_DTYPE(X) X(float32) X(float16) X(bfloat16)

// activations with a kernel, by the name of cmx_kernels/activations.py
#define CMX_FOR_EACH_ACTIVATION(X) X(none) X(relu) X(gelu) X(gelu_tanh)

// depthwise kernel widths with unrolled code; every other width takes the general loop
#define CMX_FOR_EACH_KERNEL_WIDTH(X) X(3) X(5) X(7) X(8) X(9)

constexpr int kMaxKernel = 31;
