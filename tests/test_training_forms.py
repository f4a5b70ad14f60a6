"""The training forms of the operators against their modules: values, statistics, gradients, errors."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from cmx_kernels import ops

CASES = {"patch_embed": (8, 3, 4, 4), "depthwise_block": (6, 1, 5, 4), "pointwise_block": (9, 6, 1, 1)}


def plain(op: str, x: Tensor, weight: Tensor, bias: Tensor, gamma: Tensor, beta: Tensor) -> tuple[Tensor, ...]:
    if op == "patch_embed":
        a = F.conv2d(x, weight, bias, stride=weight.shape[2:])
    else:
        a = F.conv2d(x, weight, bias, padding="same", groups=x.shape[1] if op == "depthwise_block" else 1)
    mean, var = torch.zeros_like(gamma), torch.zeros_like(gamma)
    y = F.batch_norm(F.gelu(a), mean, var, gamma, beta, training=True, momentum=1.0)
    return (y + x if op == "depthwise_block" else y), mean, var


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("op", CASES)
def test_against_modules(op: str, autocast: bool) -> None:
    shape = CASES[op]
    x = torch.randn(3, 3 if op == "patch_embed" else 6, 9, 11)
    args = [x, torch.randn(shape) / 3, *(torch.randn(shape[0]) for _ in range(3))]
    results = []
    for dtype in (torch.float64, torch.float32, None):
        given = [a.to(dtype or torch.float32).requires_grad_() for a in args]
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast and dtype != torch.float64):
            y, mean, var = plain(op, *given) if dtype else getattr(ops, f"{op}_train")(*given)
        assert not (mean.requires_grad or var.requires_grad)
        torch.manual_seed(1)
        y.backward(torch.randn(y.shape, dtype=torch.float64).to(y.dtype))
        results.append([y.detach(), mean, var, *(g.grad for g in given)])
    eps = torch.finfo(torch.bfloat16 if autocast else torch.float32).eps
    for ref, eager, out in zip(*results, strict=True):
        error, allowed = (out - ref).abs().max(), 2 * (eager - ref).abs().max() + 8 * eps * ref.abs().max()
        assert error <= allowed


@pytest.mark.parametrize("op", CASES)
def test_one_value_per_channel(op: str) -> None:
    shape = CASES[op]
    x = torch.randn(1, 3, 4, 4) if op == "patch_embed" else torch.randn(1, 6, 1, 1)
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        getattr(ops, f"{op}_train")(x, torch.randn(shape))


def test_errors_name_the_argument() -> None:
    with pytest.raises(ValueError, match="weight: got shape"):
        ops.pointwise_block_train(torch.randn(1, 6, 3, 3), torch.randn(9, 5, 1, 1))
