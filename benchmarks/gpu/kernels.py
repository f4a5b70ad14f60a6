"""One call of each main kernel, for Nsight Compute, which then tells where the cycles of a kernel go:

    ncu --profile-from-start off --clock-control none -k 'regex:depthwise|product|pool|unfold|training' --set full \\
        python -m benchmarks.gpu.kernels [training]

--page source of the report has the samples of the program counter by instruction.
"""

import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from cmx_kernels import ConvMixer, backends, ops

BF16, FP32 = torch.bfloat16, torch.float32
Call = Callable[[], Any]


def normal(*shape: int, dtype: torch.dtype = BF16, scale: float = 1.0) -> Tensor:
    return (torch.randn(shape, device="cuda") * scale).to(dtype)


def depthwise(n: int, c: int, size: int, k: int, dtype: torch.dtype = BF16, last: bool = False) -> Call:
    x = normal(n, c, size, size, dtype=dtype)
    x = x.contiguous(memory_format=torch.channels_last) if last else x
    vectors = [normal(c, dtype=FP32) for _ in range(3)]
    weight = normal(c, 1, k, k, dtype=dtype, scale=1 / k)
    return lambda: ops.depthwise_block(x, weight, *vectors)


def pointwise(n: int, c: int, size: int, last: bool = False) -> Call:
    x = normal(n, c, size, size)
    x = x.contiguous(memory_format=torch.channels_last) if last else x
    vectors, weight = [normal(c, dtype=FP32) for _ in range(3)], normal(c, c, 1, 1, scale=c**-0.5)
    return lambda: ops.pointwise_block(x, weight, *vectors)


def patches(n: int, c: int, size: int, p: int) -> Call:
    x, weight = normal(n, 3, size * p, size * p), normal(c, 3, p, p, scale=1 / p)
    vectors = [normal(c, dtype=FP32) for _ in range(3)]
    return lambda: ops.patch_embed(x, weight, *vectors)


def head(n: int, c: int, size: int) -> Call:
    x, weight, bias = normal(n, c, size, size), normal(1000, c, scale=c**-0.5), normal(1000, dtype=FP32)
    return lambda: ops.pool_head(x, weight, bias)


def step(dim: int, k: int, patch: int, size: int, n: int) -> Call:
    """Forward and backward of a stem and one block."""
    model = ConvMixer(dim, 1, kernel_size=k, patch_size=patch, num_classes=1000, fused=True).cuda().train()
    images = torch.randn(n, 3, size * patch, size * patch, device="cuda")

    def call() -> None:
        with torch.autocast("cuda", BF16):
            logits = model(images)
        logits.float().sum().backward()

    return call


def calls(training: bool) -> dict[str, Call]:
    if training:
        steps = {"768, k 7": step(768, 7, 7, 32, 64), "1024, k 9": step(1024, 9, 14, 16, 64)}
        return {**steps, "384, k 31": step(384, 31, 7, 32, 64)}
    return {
        "depthwise 64x1536x32x32 k9": depthwise(64, 1536, 32, 9),
        "depthwise 64x768x32x32 k7": depthwise(64, 768, 32, 7),
        "depthwise 64x1024x16x16 k9": depthwise(64, 1024, 16, 9),
        "depthwise 64x768x32x32 k9 channels_last": depthwise(64, 768, 32, 9, last=True),
        "depthwise 64x768x32x32 k9 fp32": depthwise(64, 768, 32, 9, FP32),
        "depthwise 64x384x56x56 k7": depthwise(64, 384, 56, 7),
        "pointwise 64x1536x32x32": pointwise(64, 1536, 32),
        "pointwise 64x768x32x32": pointwise(64, 768, 32),
        "pointwise 64x768x32x32 channels_last": pointwise(64, 768, 32, last=True),
        "pointwise 1x768x32x32": pointwise(1, 768, 32),
        "patches 64x768x32x32 p7": patches(64, 768, 32, 7),
        "head 64x768x32x32": head(64, 768, 32),
    }


def main(training: bool) -> None:
    torch.manual_seed(0)
    with backends.use("cuda"):
        for name, call in calls(training).items():
            call()
            torch.cuda.synchronize()
            torch.cuda.profiler.start()
            call()
            torch.cuda.synchronize()
            torch.cuda.profiler.stop()
            print(name, flush=True)


if __name__ == "__main__":
    if not torch.cuda.is_available():
        raise SystemExit("torch sees no CUDA device here, so there is nothing to profile")
    main("training" in sys.argv)
