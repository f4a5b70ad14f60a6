"""The Triton kernels on a GPU: the four operators, and the forms of training, against their references on the CPU.

Skipped where there is no GPU; `make gpu-check PART=correct` runs this. test_triton.py checks what can be without one.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import cases
import pytest
import torch
import training_cases as problems
from compare import Expected, check, check_equal
from product_checks import PLAIN, compare
from torch import Tensor

from cmx_kernels import backends, ops, triton_kernels
from cmx_kernels.ops import training
from cmx_kernels.ops import training_products as products

WHY_NOT = "torch sees no CUDA device" if not torch.cuda.is_available() else triton_kernels.why_not(0)
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(WHY_NOT is not None, reason=f"needs a GPU: {WHY_NOT}")]
LAYOUTS = (torch.contiguous_format, torch.channels_last)
SHAPES = {
    "patch_embed": ((4, 3, 136, 56, 56, 7, 7), cases.RAGGED["patch_embed"]),
    "depthwise_block": ((7, 40, 32, 32, 9, 9), (3, 8, 56, 56, 7, 7), cases.RAGGED["depthwise_block"]),
    "pointwise_block": ((3, 256, 384, 16, 16), cases.RAGGED["pointwise_block"]),
    "pool_head": ((5, 64, 10, 16, 16), (40, 130, 300, 7, 7)),
}


def on_device(operator: Callable[..., Any], args: tuple) -> tuple[Tensor, ...]:
    """What it returns on the GPU, twice the same bits."""
    moved = tuple(a.cuda() if isinstance(a, Tensor) else a for a in args)
    found, again = (operator(*moved) for _ in range(2))
    found, again = (r if isinstance(r, tuple) else (r,) for r in (found, again))
    for out, same in zip(found, again, strict=True):
        check_equal(out.cpu(), same.cpu())
    return tuple(t.cpu() for t in found)


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("dtype", cases.DTYPES, ids=cases.name)
@pytest.mark.parametrize(("op", "shape"), [(op, s) for op in cases.OPS for s in SHAPES[op]], ids=cases.name)
def test_operators(op: str, shape: tuple[int, ...], dtype: torch.dtype, layout: torch.memory_format) -> None:
    (x, *rest), expected = cases.problem(op, shape, dtype)
    with backends.use("triton"):
        check(*on_device(getattr(ops, op), (x.contiguous(memory_format=layout), *rest)), expected)


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("dtype", cases.DTYPES, ids=cases.name)
@pytest.mark.parametrize("shape", [*SHAPES["depthwise_block"], (2, 5, 40, 37, 31, 31)], ids=cases.name)
def test_depthwise_training(shape: tuple[int, ...], dtype: torch.dtype, layout: torch.memory_format) -> None:
    x, *rest = problems.depthwise_inputs(shape, dtype)
    args = (x.contiguous(memory_format=layout), *rest)
    a, moments = on_device(partial(training.depthwise_train, backend="triton"), args)
    check(a, problems.expect_rounded_pre_activation(args))
    check(moments, problems.expect_moments(a, "gelu"), "moments")
    back = problems.backward_inputs(args, a)
    found = on_device(partial(training.depthwise_backward, backend="triton"), back)
    for out, expected in zip(found, problems.expect_rounded_gradients(back), strict=False):
        check(out, expected, "gradient")
    check(found[3], problems.expect_sums(found[0], back[3], back[4], "gelu"), "sums")


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("dtype", cases.DTYPES, ids=cases.name)
def test_pointwise_training(dtype: torch.dtype, layout: torch.memory_format) -> None:
    n, cin, cout = 4, 24, 40
    x, skip = (problems.normal(n, cin, 9, 8, seed=i).to(dtype).contiguous(memory_format=layout) for i in range(2))
    weight = (problems.normal(cout, cin, 1, 1) * cin**-0.5).to(dtype)
    given = (x, problems.rows(3, cin), skip, problems.rows(3, cin, 1), weight)
    forward = partial(training.pointwise_train, backend="triton")
    a, moments = on_device(forward, (*given, problems.rows(1, cout)[0], "gelu"))
    check(moments, problems.expect_moments(a, "gelu"), "moments")
    grad = problems.normal(*a.shape, seed=5).to(dtype).contiguous(memory_format=layout)
    back = (grad, a, problems.rows(4, cout), *given, "gelu", True, True)
    found = on_device(partial(training.pointwise_backward, backend="triton"), back)
    ref = training.pointwise_backward_reference(*problems.to(torch.float64, back))
    magnitude = training.pointwise_backward_reference(*problems.positive_pointwise_backward(back))
    compare(found[:3], ref, products.pointwise_backward(PLAIN, *back), magnitude, (n * 72,) * 3)
    check(found[3], problems.expect_sums(found[0], x, given[1], "gelu"), "sums")


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_patch_embed_training(layout: torch.memory_format) -> None:
    x = problems.normal(4, 3, 28, 28).float().contiguous(memory_format=layout)
    args = (x, problems.normal(24, 3, 7, 7).float() / 12, None, "gelu")
    a, moments = on_device(partial(training.patch_embed_train, backend="triton"), args)
    ref, plain = (training.patch_embed_reference(*problems.to(d, args))[0] for d in (torch.float64, torch.float32))
    size = training.patch_embed_reference(*(t.double().abs() for t in args[:2]), None, "none")[0]
    check(a, Expected(ref, plain, size, 147, torch.float32))
    check(moments, problems.expect_moments(a, "gelu"), "moments")
