"""depth_first: a stem and a stack of blocks, some images at a time through all of them. Inference only, on GPUs.

    for every m images:  x = patch_embed(image)                          if the stack has a stem
                         x = pointwise_block(depthwise_block(x))         for every block

In flight are two activations of m images: where they stay in L2, kernels that are bound by memory read there. Each gets
the strides of the whole batch's, so what it computes for an image depends on m only through the plan that it has for m.
"""

import functools
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from cmx_kernels import backends, cost_model, micro_batches, profiling, tuned
from cmx_kernels.ops.block_stack import ConvParams
from cmx_kernels.ops.checks import memory_format
from cmx_kernels.registry import below_autograd

OP, WHOLE, PARTS = "depth_first", "whole", "parts"  # by which tune() knows it, and what it may measure as faster
Blocks = Sequence[tuple[ConvParams, ConvParams]]
Kernels = dict[str, Callable[..., Tensor]]


def images(y: Tensor, depth: int, kernel: tuple[int, ...], act: str) -> int:
    """Images of a micro-batch for blocks on ``y`` [N, C, H, W], of which only shape, strides, dtype and device count.

    All N, unless fewer are predicted to be faster by micro_batches.MARGIN and tune() measured nothing else.
    """
    n, c, h, w = y.shape
    kh, kw = kernel
    gpu, dtype = _gpu(y.device.index or 0), str(y.dtype).removeprefix("torch.")
    if gpu is None or act not in cost_model.ACTS or dtype not in cost_model.DTYPES:
        return n
    if tuned.choice(OP, y, (depth, c, kh, kw), act) == WHOLE:
        return n
    float32 = micro_batches.TF32 if torch.backends.cudnn.allow_tf32 else micro_batches.STRICT
    last = memory_format(y) == torch.channels_last
    best = micro_batches.predict(gpu, (n, c, h, w), depth, (kh, kw), dtype, act, last, float32)
    return best.images if best.pays else n


@functools.cache
def _gpu(device: int) -> str | None:
    return cost_model.named(torch.cuda.get_device_name(device))


def kernels(x: Tensor, y: Tensor, sizes: Mapping[str, Sequence[int]], act: str) -> Kernels | None:
    """What runs each operator, the first on ``x`` and the others on ``y``; None where one has no kernel for it.

    sizes: shapes of the operators' weights, of patch_embed first if there is a stem.
    """
    found: Kernels = {}
    for op, size in sizes.items():
        backend = backends.select(op, y if found else x, act, quiet=True, weight=size)
        if backend == "reference":
            return None
        kernel = getattr(torch.ops.cmx, op)
        found[op] = functools.partial(profiling.call, backends.function(backend, op, kernel, kernel), op, backend)
    return found


def run(x: Tensor, m: int, y: Tensor, kernels: Kernels, act: str, stem: ConvParams | None, blocks: Blocks) -> Tensor:
    """The result for ``x``, ``m`` images at a time: [N, C, H, W]. ``y`` takes it, or gives up its memory if m is N."""
    with torch.no_grad(), torch.autocast(x.device.type, enabled=False):
        if m >= len(x):
            y.untyped_storage().resize_(0)
            return _through(x, kernels, act, stem, blocks)
        x = x.contiguous(memory_format=memory_format(x))  # so that parts have the layout of the whole
        for images, results in zip(x.split(m), y.split(m), strict=True):
            results.copy_(_through(images, kernels, act, stem, blocks))
    return y


def _through(x: Tensor, kernels: Kernels, act: str, stem: ConvParams | None, blocks: Blocks) -> Tensor:
    with below_autograd():
        if stem is not None:
            x = kernels["patch_embed"](x, *stem, act)
        for depthwise, pointwise in blocks:
            x = kernels["depthwise_block"](x, *depthwise, act, True)
            x = kernels["pointwise_block"](x, *pointwise, act)  # what x was is free now, and takes the next result
    return x
