"""depth_first: a stem and a stack of blocks, some images at a time through all of them. Inference only, on GPUs.

    for every m images:  x = patch_embed(image)                          if the stack has a stem
                         x = pointwise_block(depthwise_block(x))         for every block

In flight are two activations of m images: where they stay in L2, kernels that are bound by memory read there. Each gets
the strides of the whole batch's, so what it computes for an image depends on m only through the plan that it has for m.
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from math import prod

import torch
from torch import Tensor

from cmx_kernels import backends, cost_model, micro_batches, profiling, tuned
from cmx_kernels.ops.block_stack import ConvParams
from cmx_kernels.ops.checks import memory_format
from cmx_kernels.registry import below_autograd, define

OP, WHOLE, PARTS = "depth_first", "whole", "parts"  # by which tune() knows it, and what it may measure as faster
Blocks = Sequence[tuple[ConvParams, ConvParams]]
Kernels = dict[str, Callable[..., Tensor]]


def _fake(x: Tensor, weights: Sequence[Tensor], constants: Tensor, images: int, act: str, stem: bool) -> Tensor:
    c, _, p, q = weights[0].shape
    h, w = (x.shape[2] // p, x.shape[3] // q) if stem else x.shape[2:]
    return torch.empty((x.shape[0], c, h, w), dtype=x.dtype, device=x.device, memory_format=memory_format(x))


def _reference(x: Tensor, weights: Sequence[Tensor], constants: Tensor, images: int, act: str, stem: bool) -> Tensor:
    for i, (weight, rows) in enumerate(zip(weights, constants, strict=True)):
        if stem and i == 0:
            x = torch.ops.cmx.patch_embed(x, weight, *rows, act)
        elif (i - stem) % 2 == 0:
            x = torch.ops.cmx.depthwise_block(x, weight, *rows, act, True)
        else:
            x = torch.ops.cmx.pointwise_block(x, weight, *rows, act)
    return x


def _flops(
    x: Sequence[int],
    weights: Sequence[Sequence[int]],
    constants: Sequence[int],
    images: int,
    act: str,
    stem: bool,
    *,
    out_shape: Sequence[int],
) -> int:
    pixels = out_shape[0] * out_shape[2] * out_shape[3]
    return 2 * pixels * sum(prod(weight) for weight in weights)


# The CUDA kernels one after the other, launched from C++: Python would take longer than they do for a few images.
# weights: of patch_embed first if there is a stem, then of both halves of every block; constants [len(weights), 3, C]
_run_blocks = define(
    "run_blocks",
    "(Tensor x, Tensor[] weights, Tensor constants, int images, str act, bool stem) -> Tensor",
    _fake,
    _reference,
    flops=_flops,
).default


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
    # not cudnn.allow_tf32, which raises where somebody has set this one
    precision = torch.backends.cudnn.conv.fp32_precision  # type: ignore[attr-defined]
    float32 = micro_batches.TF32 if precision == "tf32" else micro_batches.STRICT
    last = memory_format(y) == torch.channels_last
    best = micro_batches.predict(gpu, (n, c, h, w), depth, (kh, kw), dtype, act, last, float32)
    return best.images if best.pays else n


@functools.cache
def _gpu(device: int) -> str | None:
    return cost_model.named(torch.cuda.get_device_name(device))


def layout(x: Tensor, act: str, depth: int, op: str = "depthwise_block") -> torch.memory_format:
    """Of the activations of ``depth`` blocks: that of ``x``, or NCHW where more than one run on CUDA kernels.

    All of these are faster there, measured or predicted (csrc/cuda/README.md).
    """
    found = memory_format(x)
    if found == torch.channels_last and x.is_cuda and depth > 1 and backends.select(op, x, act, quiet=True) == "cuda":
        return torch.contiguous_format
    return found


def laid_out(x: Tensor, wanted: torch.memory_format) -> Tensor:
    """``x`` where it lies, if its results have the layout that is wanted; else a copy."""
    return x if memory_format(x) == wanted else x.contiguous(memory_format=wanted)


def backends_of(x: Tensor, y: Tensor, sizes: Mapping[str, Sequence[int]], act: str) -> dict[str, str] | None:
    """The backend of each operator, the first on ``x`` and the others on ``y``; None where one has no kernel for it.

    sizes: shapes of the operators' weights, of patch_embed first if there is a stem.
    """
    found: dict[str, str] = {}
    for op, size in sizes.items():
        found[op] = backends.select(op, y if found else x, act, quiet=True, weight=size)
        if found[op] == "reference":
            return None
    return found


def kernels(chosen: Mapping[str, str]) -> Kernels:
    """What runs each operator on its backend."""
    found: Kernels = {}
    for op, backend in chosen.items():
        kernel = getattr(torch.ops.cmx, op)
        found[op] = functools.partial(profiling.call, backends.function(backend, op, kernel, kernel), op, backend)
    return found


def in_one_call(chosen: Mapping[str, str]) -> bool:
    return all(backend == "cuda" for backend in chosen.values())


def run_blocks(x: Tensor, weights: Sequence[Tensor], constants: Tensor, m: int, act: str, stem: bool) -> Tensor:
    """As :func:`run`, where all operators are CUDA kernels, in one call; constants: from batchnorm.fold_rows."""
    with torch.no_grad(), torch.autocast(x.device.type, enabled=False), below_autograd():
        return profiling.call(_run_blocks, "run_blocks", "cuda", x, weights, constants, max(m, 1), act, stem)


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
