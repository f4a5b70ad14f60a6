"""What patch_embed, depthwise_block and pointwise_block share: y = scale * act(conv(x, weight) + bias) + shift (+ x).

``bias``, ``scale`` and ``shift`` are per output channel, [C] or None (0, 1, 0). Sums, activation and affine are
computed in float32 (float64 for float64) and rounded once, to x's dtype.
"""

from collections.abc import Callable, Sequence
from math import prod
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from cmx_kernels import backends, plain_layers, profiling
from cmx_kernels.activations import activation, activation_backward
from cmx_kernels.ops.checks import (
    autocast,
    autocast_is_on,
    check_activations,
    check_vector,
    column,
    compute_dtype,
    in_format,
    memory_format,
    wants_grad,
)
from cmx_kernels.registry import below_autograd


class Geometry(NamedTuple):
    """How one operator calls the convolution."""

    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int, int, int] = (0, 0, 0, 0)  # left, right, top, bottom
    groups: int = 1
    operator: str = ""  # whose operators of training (training.py) are of this convolution
    absent: int = 0  # what these take between x and the weight, here nothing: affines, a skip

    def pad(self, x: Tensor) -> Tensor:
        return F.pad(x, self.padding) if any(self.padding) else x

    def unpad(self, x: Tensor) -> Tensor:
        if not any(self.padding):
            return x  # a slice of everything is no operation under torch's older vmap, of is_grads_batched
        left, right, top, bottom = self.padding
        return x[:, :, top : x.shape[2] - bottom, left : x.shape[3] - right]


class ConvOp(NamedTuple):
    name: str
    check: Callable[..., None]
    reference: Callable[..., Tensor]
    compiled: Any


def check_block(
    x: Tensor, bias: Tensor | None, scale: Tensor | None, shift: Tensor | None, act: str, channels: int = 0
) -> None:
    check_activations(x)
    activation(act)
    for name, vector in (("bias", bias), ("scale", scale), ("shift", shift)):
        check_vector(x, vector, name, channels)


def forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
    act: str,
    geometry: Geometry,
    residual: bool = False,
) -> Tensor:
    """The reference of all three: plain torch, differentiable."""
    dtype = compute_dtype(x)
    bias, scale, shift = (None if v is None else v.to(dtype) for v in (bias, scale, shift))
    a = F.conv2d(geometry.pad(x.to(dtype)), weight.to(dtype), bias, geometry.stride, groups=geometry.groups)
    y = activation(act)(a)
    if scale is not None:
        y = y * column(scale)
    if shift is not None:
        y = y + column(shift)
    if residual:
        y = y + x
    return y.to(x.dtype)


def flops(x: Sequence[int], weight: Sequence[int], *rest: Any, out_shape: Sequence[int]) -> int:
    """Each output is a sum over weight[1:]."""
    return 2 * prod(out_shape) * prod(weight[1:])


def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weight, bias, scale, shift, act, *extra = inputs
    ctx.save_for_backward(x, weight, bias, scale)
    ctx.shift_dtype = None if shift is None else shift.dtype
    ctx.act, ctx.extra = act, extra  # extra: residual, of depthwise_block


Saved = tuple[Tensor, Tensor, Tensor | None, Tensor | None]  # x, weight, bias, scale


def backward(
    operators: Any, ctx: Any, grad: Tensor, geometry: Callable[[Tensor], Geometry]
) -> tuple[Tensor | None, ...]:
    """Gradients of x, weight, bias, scale, shift; recomputes the pre-activation a = conv(x) + bias where it matters.

    dshift = sum(grad)    dscale = sum(grad * act(a))    da = grad * scale * act'(a)    dbias = sum(da)
    dx = conv^T(da, weight) (+ grad)    dweight = x * da (correlation)

    By the kernels of training where ``operators``, torch.ops.cmx or cmx_triton, has them; a is then in x's dtype, as
    layers keep it. In PyTorch where the gradient is to have a gradient, or a torch.func transform looks on.
    """
    saved: Saved = ctx.saved_tensors  # once: what a checkpoint computes again can be had once
    x, weight, bias, scale = saved
    *_, need_bias, need_scale, need_shift = ctx.needs_input_grad[:5]
    at = geometry(weight)
    gradients = _by_kernels if _has_kernels(operators, x, weight, ctx.act, at) else _in_torch
    a, dx, dweight, dbias = gradients(operators, ctx, grad, saved, at)
    dscale = dshift = None
    if need_scale or need_shift:
        wide = grad.to(compute_dtype(x))
        dshift = wide.sum((0, 2, 3)) if need_shift else None
        dscale = (wide * activation(ctx.act)(a.to(wide.dtype))).sum((0, 2, 3)) if need_scale else None
    return (
        dx,
        dweight.to(weight.dtype) if dweight is not None else None,
        dbias.to(bias.dtype) if need_bias and bias is not None else None,
        dscale.to(scale.dtype) if dscale is not None and scale is not None else None,
        dshift.to(ctx.shift_dtype) if dshift is not None else None,
    )


def _has_kernels(operators: Any, x: Tensor, weight: Tensor, act: str, at: Geometry) -> bool:
    if torch.is_grad_enabled() or backends.transformed() or x.numel() == 0 or weight.numel() == 0:
        return False
    backend = "triton" if operators is torch.ops.cmx_triton else x.device.type
    return backends.takes(backend, f"{at.operator}_train", x, act)


def _in_torch(operators: Any, ctx: Any, grad: Tensor, saved: Saved, at: Geometry) -> tuple[Any, ...]:
    x, weight, bias, scale = saved
    dtype = compute_dtype(x)
    need_x, need_weight, need_bias, need_scale, _ = ctx.needs_input_grad[:5]
    grad = grad.to(dtype)
    padded = at.pad(x.to(dtype))
    wide = weight.to(dtype)
    a = grad  # without an activation and a scale nothing depends on its value
    if ctx.act != "none" or need_scale:
        a = F.conv2d(padded, wide, None if bias is None else bias.to(dtype), at.stride, groups=at.groups)
    scaled = grad if scale is None else grad * column(scale.to(dtype))
    da = activation_backward(ctx.act, scaled, a)
    dx, dweight, _ = torch.ops.aten.convolution_backward(
        da, padded, wide, None, at.stride, (0, 0), (1, 1), False, (0, 0), at.groups, (need_x, need_weight, False)
    )
    if need_x:
        dx = at.unpad(dx)
        dx = (dx + grad if any(ctx.extra) else dx).to(x.dtype)  # the residual connection
    return a, dx if need_x else None, dweight if need_weight else None, da.sum((0, 2, 3)) if need_bias else None


def _by_kernels(operators: Any, ctx: Any, grad: Tensor, saved: Saved, at: Geometry) -> tuple[Any, ...]:
    x, weight, bias, scale = saved
    need_x, need_weight, need_bias, need_scale, _ = ctx.needs_input_grad[:5]
    need = need_x, need_weight or need_bias
    given = (x, *[None] * at.absent, weight)
    a = grad  # as above
    if need_scale or (ctx.act != "none" and any(need)):
        a, _ = getattr(operators, f"{at.operator}_train")(*given, bias, ctx.act)
    if not any(need):
        return a, None, None, None
    seen = grad if ctx.act == "none" else a
    if ctx.act != "none" and a.dtype == torch.float16:  # infinite beyond its range, where 0 * act(a) would be NaN
        seen = a.clamp(torch.finfo(a.dtype).min, torch.finfo(a.dtype).max)
    p = torch.ones_like(weight[:, 0, 0, 0], dtype=torch.float32) if scale is None else scale.float()
    coefficients = F.pad(p[None], (0, 0, 0, 3))  # p, 0, 0, 0: da = p * grad * act'(a)
    call = getattr(operators, f"{at.operator}_backward")
    dx, dweight, dbias, _ = call(grad, seen, coefficients, *given, ctx.act, *ctx.extra, *need)
    return a, dx if need_x else None, dweight if need_weight else None, dbias


def run(op: ConvOp, x: Tensor, weight: Tensor, bias: Any, scale: Any, shift: Any, act: str, *extra: Any) -> Tensor:
    """Autocast, check, select, call: the body of the public functions."""
    if autocast_is_on(x):
        x, weight = autocast(x, weight)
        with torch.autocast(x.device.type, enabled=False):
            return run(op, x, weight, bias, scale, shift, act, *extra)
    op.check(x, weight, bias, scale, shift, act)
    backend = backends.select(op.name, x, act, quiet=True, weight=weight.shape)
    if backend == "reference":  # what tune() compared with a model's modules is no news about our reference
        backend = backends.select(op.name, x, act)
    args = x, weight, bias, scale, shift, act, *extra
    records = wants_grad(x, weight, bias, scale, shift)
    # Not as one tuple: torch 2.11 compiles no comparison of tuples that hold tensors
    alone = op.name == "depthwise_block" and scale is None and shift is None and act == "none" and extra == (False,)
    alone = alone and backend == "cpu" and (bias is None or bias.dtype == x.dtype)
    if alone and plain_layers.is_faster(x, weight, records):
        return in_format(F.conv2d(x, weight, bias, padding="same", groups=x.shape[1]), memory_format(x))
    call = backends.function(backend, op.name, op.reference, op.compiled)
    if call is not op.compiled or torch.compiler.is_compiling() or records:
        return profiling.call(call, op.name, backend, *args)
    with below_autograd():  # whose Python code takes as long as a small layer
        return profiling.call(call, op.name, backend, *args)
