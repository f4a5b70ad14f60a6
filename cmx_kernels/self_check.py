"""What the CUDA kernels compute on the GPU at hand against PyTorch in float64, before they are chosen unasked.

A binary meets GPUs, drivers and compilers that its kernels never ran on; wrong numbers there must not be silent. Asked
once a device, in about a second, and not at all with CMX_SELF_CHECK=0.
"""

import os
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from cmx_kernels import cuda
from cmx_kernels.ops import training
from cmx_kernels.ops.depthwise_block import reference as depthwise_reference
from cmx_kernels.ops.patch_embed import reference as patch_reference
from cmx_kernels.ops.pointwise_block import reference as pointwise_reference
from cmx_kernels.ops.pool_head import reference as head_reference

WANTED = os.environ.get("CMX_SELF_CHECK", "1") != "0"
_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


class Problem(NamedTuple):
    op: str  # of torch.ops.cmx
    reference: Callable[..., Any]
    args: tuple[Any, ...]


def problems(device: torch.device) -> Iterator[Problem]:
    """Small ones that each kernel of a network and its training takes, in both layouts."""
    generator = torch.Generator(device).manual_seed(0)

    def normal(*shape: int, scale: float = 1.0) -> Tensor:
        return torch.randn(shape, generator=generator, device=device) * scale

    for dtype in _DTYPES:
        for layout in (torch.contiguous_format, torch.channels_last):

            def images(*shape: int, dtype: torch.dtype = dtype, layout: torch.memory_format = layout) -> Tensor:
                return normal(*shape).to(dtype).contiguous(memory_format=layout)

            for c, size, k in ((8, 32, 9), (8, 16, 7), (8, 20, 5)):
                x, weight = images(5, c, size, size), normal(c, 1, k, k, scale=1 / k).to(dtype)
                yield Problem("depthwise_block", depthwise_reference, (x, weight, *normal(3, c), "gelu", True))
                affine, coefficients = normal(3, c), normal(4, c)
                given: tuple[Any, ...] = (x, affine, weight, normal(c), "gelu")
                yield Problem("depthwise_block_train", training.depthwise_reference, given)
                back = (images(5, c, size, size), images(5, c, size, size), coefficients, x, affine, weight)
                given = (*back, "gelu", True, True, True)
                yield Problem("depthwise_block_backward", training.depthwise_backward_reference, given)
            for n, c, size in ((8, 256, 32), (1, 72, 6)):
                x, weight = images(n, c, size, size), normal(c, c, 1, 1, scale=c**-0.5).to(dtype)
                yield Problem("pointwise_block", pointwise_reference, (x, weight, *normal(3, c), "gelu"))
                sums = (x, normal(3, c), images(n, c, size, size), normal(3, c), weight)
                yield Problem("pointwise_block_train", training.pointwise_reference, (*sums, normal(c), "gelu"))
                given = (images(n, c, size, size), images(n, c, size, size), normal(4, c), *sums, "gelu", True, True)
                yield Problem("pointwise_block_backward", training.pointwise_backward_reference, given)
            x, weight = images(8, 3, 112, 112), normal(256, 3, 7, 7, scale=1 / 12).to(dtype)
            yield Problem("patch_embed", patch_reference, (x, weight, *normal(3, 256), "gelu"))
            yield Problem("patch_embed_train", training.patch_embed_reference, (x, weight, normal(256), "gelu"))
            x, weight = images(3, 64, 16, 16), normal(10, 64, scale=1 / 8).to(dtype)
            yield Problem("pool_head", head_reference, (x, weight, normal(10)))


def _tensors(found: Any) -> list[Tensor]:
    return [found] if isinstance(found, Tensor) else list(found)


def wrong(problem: Problem, operators: Any) -> str | None:
    """None where |out - ref| <= 2 max|plain - ref| + 16 eps max|ref|: ref in float64, plain in the problem's dtype."""
    wide = [a.double() if isinstance(a, Tensor) else a for a in problem.args]
    eps = torch.finfo(problem.args[0].dtype).eps
    found, plain, exact = (
        _tensors(call(*args))
        for call, args in (
            (getattr(operators, problem.op), problem.args),
            (problem.reference, problem.args),
            (problem.reference, wide),
        )
    )
    for i, (out, near, ref) in enumerate(zip(found, plain, exact, strict=True)):
        allowed = 2 * (near.double() - ref).abs().max() + 16 * eps * ref.abs().max()
        error = (out.double() - ref).abs().max()
        if not error <= allowed:
            return f"{problem.op}: result {i} is off by {error:.2g}, allowed are {allowed:.2g}"
    return None


def of_device(device: torch.device, operators: Any) -> str | None:
    """A sentence about the first problem that is not solved, or None."""
    plainly = torch.autocast(device.type, enabled=False)
    with _disable_current_modes(), torch.inference_mode(False), torch.no_grad(), plainly:
        for problem in problems(device):
            try:
                answer = wrong(problem, operators)
            except torch.OutOfMemoryError:  # which says nothing about the kernels
                raise
            except Exception as failure:  # whatever a compiler or a driver raises
                answer = f"{problem.op}: {str(failure).strip().partition(chr(10))[0]}"
            if answer is not None:
                return f"the kernels do not compute here what PyTorch does ({answer}); please report it"
    return None


_known: dict[int, str | None] = {}  # devices


def why_not(index: int) -> str | None:
    """None where the kernels are right on the CUDA device of this number, else a sentence."""
    if not WANTED:
        return None
    if index not in _known:
        with torch.cuda.device(index):
            if torch.cuda.is_current_stream_capturing():
                return "a CUDA graph is being captured before the kernels were tried here: call the model once before"
        try:
            _known[index] = of_device(torch.device("cuda", index), torch.ops.cmx)
        except torch.OutOfMemoryError:
            return "there is not enough memory to try the kernels before they are used; they are tried again next time"
    return _known[index]


cuda.tried = why_not
