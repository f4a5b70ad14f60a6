"""What torch.func and forward-mode differentiation make of a function, by name."""

from collections.abc import Callable

import cases
import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad


def tangent(f: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    with forward_ad.dual_level():
        return forward_ad.unpack_dual(f(forward_ad.make_dual(x, torch.ones_like(x)))).tangent


TRANSFORMS: dict[str, Callable[[Callable[[Tensor], Tensor], Tensor], Tensor]] = {
    "grad": lambda f, x: torch.func.grad(lambda v: f(v).square().sum())(x),
    "vmap": lambda f, x: torch.vmap(f)(torch.stack([x, -x])),
    "jvp": lambda f, x: torch.func.jvp(f, (x,), (torch.ones_like(x),))[1],
    "forward mode": tangent,
}


def check_forward_mode_is_refused(operators: str, op: str, transform: str) -> None:
    """By torch.ops.<operators>.<op>, where PyTorch would take the derivative for zero, without a word."""
    x, *rest = cases.inputs(op, cases.RAGGED[op])
    operator = getattr(getattr(torch.ops, operators), op)
    with pytest.raises(RuntimeError, match=f"torch.ops.{operators}.{op} has no forward-mode derivative; .*ops.{op}"):
        TRANSFORMS[transform](lambda v: operator(v, *rest), x)
