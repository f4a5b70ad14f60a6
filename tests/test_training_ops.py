"""The operators of training: gradcheck in float64, opcheck, safe moments, fixed order of sums."""

from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from cmx_kernels.ops import training
from cmx_kernels.ops.batchnorm import Norm
from cmx_kernels.ops.differentiable import Block, Unit, Value

C, EPS = 3, 0.05


def leaf(*shape: int, low: float = -1.0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.empty(shape, dtype=dtype).uniform_(low, 1).requires_grad_()


def network(
    norms: list[Norm], act: str, recompute: bool, stem: bool, x: Tensor, *parameters: Tensor | None
) -> tuple[Tensor, ...]:
    """A stem and two blocks, or one block on a plain x. The statistics are outputs without a gradient."""
    given, rows, moments = list(parameters), None, None
    if stem:
        forward = partial(training.patch_embed_train, act=act)

        def backward(grad: Tensor, a: Tensor, k: Tensor, x: Tensor, weight: Tensor, *need: bool) -> Any:
            return training.patch_embed_backward(grad, a, k, x, weight, act, *need)

        x, rows, moments = Unit.apply(forward, backward, x, *given[:4], norms[0])
        given = given[4:]
    while given:
        x, rows, moments, _ = Block.apply(x, rows, moments, *given[:8], *norms[1:3], act, "", recompute)
        given = given[8:]
    return Value.apply(x, rows, moments, act)


@pytest.mark.parametrize("act", ["gelu", "gelu_tanh", "none"])
@pytest.mark.parametrize("fixed", [[], [0], [1], [2], [0, 1, 2]], ids=str)
@pytest.mark.parametrize("given", ["all", "no bias, no affine"])
def test_gradcheck(act: str, fixed: list[int], given: str) -> None:
    """Through a stem and two blocks, because a gradient between them is another thing than a derivative."""
    running = torch.stack((torch.linspace(-0.2, 0.3, C), torch.linspace(0.5, 1.5, C))).double()
    norms = [Norm(EPS, running if i in fixed else None) for i in range(3)]

    def unit(*shape: int) -> list[Tensor | None]:
        weight = leaf(*shape)
        if given != "all":
            return [weight, None, None, None]
        return [weight, leaf(C), leaf(C, low=0.5), leaf(C)]

    parameters = [*unit(C, 2, 2, 2), *(t for _ in range(2) for t in (*unit(C, 1, 3, 2), *unit(C, C, 1, 1)))]
    fast = act != "gelu" or bool(fixed)
    for recompute in (False, True):
        call = partial(network, norms, act, recompute, True)
        assert torch.autograd.gradcheck(call, (leaf(2, 2, 4, 6), *parameters), fast_mode=fast or recompute)
    call = partial(network, norms, act, False, False)
    assert torch.autograd.gradcheck(call, (leaf(2, C, 3, 4), *parameters[4:]), fast_mode=True)


def arguments(dtype: torch.dtype, layout: torch.memory_format, need: tuple[bool, bool], affine: bool) -> dict[str, Any]:
    exact = torch.promote_types(dtype, torch.float32)

    def plane(channels: int, h: int = 5, w: int = 4) -> Tensor:
        return torch.randn(2, channels, h, w).to(dtype).contiguous(memory_format=layout)

    def rows_of(count: int) -> Tensor:
        return torch.rand(count, C, dtype=exact) + 0.5

    rows, skip_rows = (rows_of(3) if affine else None for _ in range(2))
    k, act = torch.randn(4, C, dtype=exact), "gelu"
    x, a, grad, bias = plane(C), plane(C), plane(C), torch.randn(C, dtype=dtype)
    dw, pw, stem = (torch.randn(shape).to(dtype) for shape in ((C, 1, 3, 2), (C, C, 1, 1), (C, 2, 2, 2)))
    image = plane(2, 10, 9)
    return {
        "depthwise_block_train": (x, rows, dw, bias if affine else None, act),
        "depthwise_block_backward": (grad, a, k, x, rows, dw, act, affine, *need),
        "pointwise_block_train": (x, rows, a if affine else None, skip_rows, pw, bias, act),
        "pointwise_block_backward": (grad, a, k, x, rows, a if affine else None, skip_rows, pw, act, *need),
        "patch_embed_train": (image, stem, bias, act),
        "patch_embed_backward": (grad, a, k, image, stem, act, *need),
        "batchnorm_rows": (rows_of(2), bias if affine else None, bias, EPS, 40),
        "batchnorm_gradients": (rows_of(2), rows_of(3), rows_of(1)[0], 40, affine),
    }


OPS = sorted(arguments(torch.float32, torch.contiguous_format, (True, True), True))


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_opcheck(op: str, layout: torch.memory_format, dtype: torch.dtype) -> None:
    """Schema, fake tensors with the right strides, dynamic shapes."""
    for need, affine in (((True, True), True), ((True, False), False), ((False, True), True)):
        given = arguments(dtype, layout, need, affine)[op]
        tests = ("test_schema", "test_faketensor", "test_autograd_registration", "test_aot_dispatch_dynamic")
        result = torch.library.opcheck(getattr(torch.ops.cmx, op), given, test_utils=tests[: 4 if affine else 3])
        assert set(result.values()) == {"SUCCESS"}


@pytest.mark.parametrize("act", ["none", "relu", "gelu"])
@pytest.mark.parametrize("op", ["depthwise_block_train", "pointwise_block_train", "patch_embed_train"])
def test_moments_are_safe(op: str, act: str) -> None:
    """Mean 1e4, standard deviation 1, over many values: as good as torch's var_mean in float32."""
    x = torch.randn(4, 16, 40, 37, generator=torch.Generator().manual_seed(1))
    bias = torch.full((16,), 1e4)
    one = torch.eye(16)[:, :, None, None]
    a, moments = {
        "depthwise_block_train": lambda: training.depthwise_train(x, None, torch.ones(16, 1, 1, 1), bias, act),
        "pointwise_block_train": lambda: training.pointwise_train(x, None, None, None, one, bias, act),
        "patch_embed_train": lambda: training.patch_embed_train(x, one, bias, act),
    }[op]()
    var, mean = torch.var_mean(a.double(), (0, 2, 3), correction=0)
    eager = torch.var_mean(a, (0, 2, 3), correction=0)[0]
    assert (moments[0].double() - mean).abs().max() <= 2 * torch.finfo(torch.float32).eps * 1e4
    assert ((moments[1] - var).abs() <= 2 * (eager - var).abs().max() + 64 * torch.finfo(torch.float32).eps * var).all()


@pytest.mark.parametrize("op", OPS)
def test_a_fixed_order_of_sums(op: str) -> None:
    """Bit-equal from run to run; kernels also for any number of threads."""
    given = arguments(torch.float32, torch.channels_last, (True, True), True)[op]
    kernel = torch._C._dispatch_has_kernel_for_dispatch_key(f"cmx::{op}", "CPU")
    found = []
    for threads in (1, 2, 2) if kernel else (2, 2, 2):
        torch.set_num_threads(threads)
        found.append(getattr(torch.ops.cmx, op)(*given))
    assert all(torch.equal(a, b) for other in found[1:] for a, b in zip(found[0], other, strict=True))
