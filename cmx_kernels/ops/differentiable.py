"""Gradients through the operators of training: autograd functions over pre-activations.

Between two functions an activation X travels as three tensors (training.py): the pre-activation a, the affine rows
[3, C] and the moments [2, C]. Two gradients travel back: in the place of a that of X, in that of the moments the two
sums over it that BatchNorm needs, which the consumer gets for nothing. Both add up over consumers, as autograd adds
them. So X itself is never stored: a block keeps its two pre-activations and nothing else.

Weights come in their own dtype and are multiplied in that of x: autocast does not round their gradient to 16 bits.
"""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from cmx_kernels import backends
from cmx_kernels.activations import activation
from cmx_kernels.ops import batchnorm, training
from cmx_kernels.ops.batchnorm import Norm
from cmx_kernels.ops.checks import column, in_format, memory_format

Gradients = tuple[Tensor | None, ...]


def _incoming(grad: Tensor, a: Tensor) -> Tensor:
    """The gradient of an activation in the dtype and layout of its pre-activation.

    It is not asked for its strides: torch.compile, which does not know them yet, would copy it first.
    """
    return grad.to(a.dtype).contiguous(memory_format=memory_format(a))


def _cast(grad: Tensor | None, like: Tensor | None) -> Tensor | None:
    return None if grad is None or like is None else grad.to(like.dtype)


def _wanted(grad: Tensor, want: bool) -> Tensor | None:
    return grad if want else None


def _differentiable_but(ctx: Any, *outputs: Tensor) -> None:
    """Marks the outputs that have no gradient; backward gets None for them, and not a launch's worth of zeros each."""
    ctx.mark_non_differentiable(*outputs)
    if not torch.compiler.is_compiling():  # which cannot be told, and drops them itself
        ctx.set_materialize_grads(False)


class _Final(Function):
    """The first ``count`` tensors, gradients, as they are, with an error where they are differentiated again.

    The others are what they depend on: without them they would be constants, and second derivatives zero.
    """

    @staticmethod
    def forward(ctx: Any, count: int, *tensors: Tensor | None) -> Gradients:
        return tensors[:count]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Gradients:
        raise RuntimeError(
            "grad: got a gradient of fused training to differentiate again, but its kernels have no second derivative; "
            "cmx_kernels.unfuse(model) trains in plain PyTorch, which has"
        )


# Private, so a torch without it takes each gradient as one
_has_values: Callable[[Tensor], bool] = getattr(torch._C, "_has_storage", lambda grad: True)


def _once(backward: Callable[..., Gradients]) -> Callable[..., Gradients]:
    """A backward that is run without recording; what it returns under create_graph=True refuses to be differentiated.

    torch's once_differentiable lets it pass as a constant where the incoming gradient needs no gradient itself.
    ``backward`` is given the saved tensors: under gradient checkpointing they can be had once.
    """

    @functools.wraps(backward)
    def run(ctx: Any, *grads: Tensor | None) -> Gradients:
        if not torch.compiler.is_compiling() and (
            backends.transformed() or not all(_has_values(grad) for grad in grads if grad is not None)
        ):
            raise RuntimeError(
                "grad: got a batch of gradients (torch.vmap, is_grads_batched), or one with a tangent, which the "
                "kernels of fused training do not follow; cmx_kernels.unfuse(model) trains in plain PyTorch, which does"
            )
        saved = ctx.saved_tensors
        with torch.no_grad():
            found = backward(ctx, saved, *grads)
        return _Final.apply(len(found), *found, *saved, *grads) if torch.is_grad_enabled() else found

    return run


class Unit(Function):
    """conv -> act -> BatchNorm on a plain x: (a, rows, moments)"""

    @staticmethod
    def forward(
        ctx: Any,
        forward: Callable[..., Any],
        backward: Callable[..., Any],
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        gamma: Tensor | None,
        beta: Tensor | None,
        norm: Norm,
    ) -> tuple[Tensor, Tensor, Tensor]:
        used = weight.to(x.dtype)
        a, moments = forward(x, used, bias)
        found = batchnorm.affine(a, moments, gamma, beta, norm)
        ctx.save_for_backward(x, used, bias, gamma, beta, a, found.rows, found.rstd)
        ctx.run, ctx.norm, ctx.count, ctx.dtype = backward, norm, found.values, weight.dtype
        _differentiable_but(ctx, found.rows)
        return a, found.rows, found.moments

    @staticmethod
    @_once
    def backward(ctx: Any, saved: Any, grad: Tensor, _: Any, sums: Tensor) -> Gradients:
        x, weight, bias, gamma, beta, a, rows, rstd = saved
        need = ctx.needs_input_grad
        k, dgamma, dbeta = batchnorm.gradients(sums, rows, rstd, ctx.count, ctx.norm)
        dx, dweight, dbias, _ = ctx.run(_incoming(grad, a), a, k, x, weight, need[2], need[3] or need[4])
        return (
            None,
            None,
            _wanted(dx, need[2]),
            dweight.to(ctx.dtype) if need[3] else None,
            _cast(dbias, bias) if need[4] else None,
            _cast(dgamma, gamma),
            _cast(dbeta, beta),
            None,
        )


class Block(Function):
    """A block on X = (x, rows, moments): the same of the pointwise half, and moments of the depthwise half

    x without rows and moments is plain. ``backend``: that of depthwise_block_train.
    recompute: the depthwise pre-activation is computed again in backward, not kept.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        x_rows: Tensor | None,
        x_moments: Tensor | None,
        weight1: Tensor,
        bias1: Tensor | None,
        gamma1: Tensor | None,
        beta1: Tensor | None,
        weight2: Tensor,
        bias2: Tensor | None,
        gamma2: Tensor | None,
        beta2: Tensor | None,
        norm1: Norm,
        norm2: Norm,
        act: str,
        backend: str,
        recompute: bool,
    ) -> tuple[Tensor, ...]:
        used1, used2 = weight1.to(x.dtype), weight2.to(x.dtype)
        a1, moments1 = training.depthwise_train(x, x_rows, used1, bias1, act, backend=backend)
        one = batchnorm.affine(a1, moments1, gamma1, beta1, norm1)
        a2, moments2 = training.pointwise_train(a1, one.rows, x, x_rows, used2, bias2, act, backend=backend)
        two = batchnorm.affine(a2, moments2, gamma2, beta2, norm2)
        ctx.save_for_backward(
            *(x, x_rows, used1, bias1, gamma1, beta1, used2, bias2, gamma2, beta2),
            *(None if recompute else a1, one.rows, one.rstd, a2, two.rows, two.rstd),
        )
        ctx.norms, ctx.counts, ctx.act, ctx.backend = (norm1, norm2), (one.values, two.values), act, backend
        ctx.dtypes = weight1.dtype, weight2.dtype
        _differentiable_but(ctx, two.rows, one.moments)
        return a2, two.rows, two.moments, one.moments

    @staticmethod
    @_once
    def backward(ctx: Any, saved: Any, grad: Tensor, _: Any, sums2: Tensor, __: Any) -> Gradients:
        x, x_rows, weight1, bias1, gamma1, beta1, weight2, bias2, gamma2, beta2, *rest = saved
        a1, rows1, rstd1, a2, rows2, rstd2 = rest
        need = ctx.needs_input_grad
        act, backend = ctx.act, ctx.backend
        if a1 is None:
            a1, _ = training.depthwise_train(x, x_rows, weight1, bias1, act, backend=backend)
        k, dgamma2, dbeta2 = batchnorm.gradients(sums2, rows2, rstd2, ctx.counts[1], ctx.norms[1])
        du, dweight2, dbias2, sums1 = training.pointwise_backward(
            *(_incoming(grad, a2), a2, k, a1, rows1, x, x_rows, weight2, act),
            *(any(need[:7]), need[7] or need[8]),
            backend=backend,
        )
        found: list[Tensor | None] = [None] * 7
        if any(need[:7]):
            k, dgamma1, dbeta1 = batchnorm.gradients(sums1, rows1, rstd1, ctx.counts[0], ctx.norms[0])
            dx, dweight1, dbias1, sums = training.depthwise_backward(
                *(du, a1, k, x, x_rows, weight1, act, True),
                *(need[0] or need[2], need[3] or need[4]),
                backend=backend,
            )
            found = [
                _wanted(dx, need[0]),
                None,
                None if x_rows is None else _wanted(sums, need[2]),
                dweight1.to(ctx.dtypes[0]) if need[3] else None,
                _cast(dbias1, bias1) if need[4] else None,
                _cast(dgamma1, gamma1),
                _cast(dbeta1, beta1),
            ]
        found += [dweight2.to(ctx.dtypes[1]) if need[7] else None, _cast(dbias2, bias2) if need[8] else None]
        return (*found, _cast(dgamma2, gamma2), _cast(dbeta2, beta2), None, None, None, None, None)


class Value(Function):
    """X itself, in the dtype and layout of a."""

    @staticmethod
    def forward(ctx: Any, a: Tensor, rows: Tensor, moments: Tensor, act: str) -> Tensor:
        ctx.save_for_backward(a, rows)
        ctx.act = act
        return in_format(training.value(a, rows, act).to(a.dtype), memory_format(a))

    @staticmethod
    @_once
    def backward(ctx: Any, saved: Any, grad: Tensor) -> Gradients:
        a, rows = saved
        grad = _incoming(grad, a)
        return grad, None, training.affine_sums(grad, a, rows, ctx.act), None


_PIECE = 1 << 24  # numbers


class Pooled(Function):
    """The mean of X over its pixels, [N, C]: X is not formed.

    mean(X) = mean(act(a) - mean) * scale + shift, and BatchNorm's sums follow from what is pooled
    """

    @staticmethod
    def forward(ctx: Any, a: Tensor, rows: Tensor, moments: Tensor, act: str) -> Tensor:
        mean, scale, shift = rows
        # some images at a time: in float32 all of them would be the most memory that a step takes
        pieces = (a,) if torch.compiler.is_compiling() else a.split(max(1, _PIECE // max(1, a[0].numel())))
        centred = torch.cat([(activation(act)(piece.to(rows.dtype)) - column(mean)).mean((2, 3)) for piece in pieces])
        ctx.save_for_backward(centred, rows)
        ctx.like = a.shape, a.dtype, memory_format(a)
        return (centred * scale + shift).to(a.dtype)

    @staticmethod
    @_once
    def backward(ctx: Any, saved: Any, grad: Tensor) -> Gradients:
        centred, rows = saved
        shape, dtype, layout = ctx.like
        grad = grad.to(rows.dtype)
        sums = torch.stack((grad.sum(0), (grad * centred).sum(0)))
        each = (grad / (shape[2] * shape[3])).to(dtype)[:, :, None, None]
        return each.expand(shape).contiguous(memory_format=layout), None, sums, None
