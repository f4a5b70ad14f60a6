"""What the gradients of a single operator are to be."""

from collections.abc import Callable
from functools import partial

import cases
import torch
from compare import Expected
from torch import Tensor


def leaves_of(args: tuple[object, ...]) -> list[Tensor]:
    return [a.requires_grad_() for a in args if isinstance(a, Tensor)]


def expected_gradients(op: str, args: tuple[object, ...], grad: Tensor) -> list[Expected]:
    """Autograd through the plain formula in float64 and in the compute dtype; the magnitude through absolute values.

    In 16-bit types pre-activations, and their gradients, are plain in x's dtype, as layers store them.
    """
    narrow = args[0].dtype if args[0].dtype.itemsize == 2 and op != "pool_head" else None

    def through(dtype: torch.dtype, absolute: bool, keep: Callable[[Tensor], Tensor] | None = None) -> list[Tensor]:
        leaves = [a.detach().to(dtype) if isinstance(a, Tensor) else a for a in args]
        leaves = [a.abs() if absolute and isinstance(a, Tensor) else a for a in leaves]
        if absolute and op != "pool_head":
            leaves[5] = "none"
        tensors = leaves_of(tuple(leaves))
        out = cases.formula(dtype, op, *leaves, keep=keep)
        return list(torch.autograd.grad(out, tensors, (grad.abs() if absolute else grad).to(dtype)))

    leaves = [a for a in args if isinstance(a, Tensor)]
    terms = [_terms(op, leaf, args, grad) for leaf in leaves]
    plain = through(cases.compute_dtype(args[0].dtype), False, narrow and partial(_stored, narrow))
    dtypes = [leaf.dtype for leaf in leaves]
    return [
        Expected(*e)
        for e in zip(through(torch.float64, False), plain, through(torch.float64, True), terms, dtypes, strict=True)
    ]


def _stored(dtype: torch.dtype, a: Tensor) -> Tensor:
    """``a`` as it is read again from ``dtype``, and so its gradient."""
    a.register_hook(lambda grad: grad.to(dtype).to(grad.dtype))
    return a + (a.to(dtype).to(a.dtype) - a).detach()


def _terms(op: str, leaf: Tensor, args: tuple[object, ...], grad: Tensor) -> int:
    """How many products one element of this gradient sums, and those of the recomputed forward."""
    forward = cases.terms(op, *args[:2])
    outputs = grad.numel() * (forward if leaf.dim() > 1 else 1)
    return forward + outputs // max(1, leaf.numel())
