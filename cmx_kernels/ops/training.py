"""The operators of training: convolutions between pre-activations, with batch statistics and gradients.

An activation is held as the pre-activation a before it and an affine [3, C] (mean, scale, shift), float32:

    X = (act(a) - mean) * scale + shift                    what eager PyTorch stores besides a and act(a)

Forward: a = conv(X) + bias and the moments [2, C] (mean, biased variance) of act(a) over N, H, W.
Backward: with BatchNorm's part of the gradient in four numbers per channel, coefficients [4, C] (p, q, r, mean),

    da = (p * grad + q * (act(a) - mean) + r) * act'(a)    dX = conv^T(da)    dweight = X * da    dbias = sum(da)

and sums [2, C] of what the BatchNorm behind X will need: sum(dX), sum(dX * (act(x) - mean)).
Pre-activations and gradients are in the dtype of x, everything per channel in float32 (float64 for float64). Sums are
taken in a fixed order: results do not depend on the number of threads. ``need_input`` and ``need_weight`` say which
gradients are wanted; what is not is empty.
"""

from collections.abc import Callable
from math import prod
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from cmx_kernels import backends, profiling
from cmx_kernels.activations import activation, activation_backward
from cmx_kernels.ops.checks import column, compute_dtype, in_format, memory_format
from cmx_kernels.ops.conv_block import Geometry
from cmx_kernels.ops.depthwise_block import geometry as depthwise_geometry
from cmx_kernels.ops.patch_embed import geometry as patch_geometry
from cmx_kernels.registry import define

Gradients = tuple[Tensor, Tensor, Tensor, Tensor]  # of the input, the weight [float32], the bias [float32]; sums


def value(x: Tensor, affine: Tensor | None, act: str) -> Tensor:
    """X in float32: what ``x`` stands for, ``x`` itself without an affine."""
    x = x.to(compute_dtype(x))
    if affine is None:
        return x
    mean, scale, shift = affine
    return (activation(act)(x) - column(mean)) * column(scale) + column(shift)


def affine_sums(grad: Tensor, x: Tensor, affine: Tensor, act: str) -> Tensor:
    """sum(grad), sum(grad * (act(x) - mean)) as [2, C]"""
    dtype = compute_dtype(x)
    grad = grad.to(dtype)
    centred = activation(act)(x.to(dtype)) - column(affine[0])
    return torch.stack((grad.sum((0, 2, 3)), (grad * centred).sum((0, 2, 3))))


def moments_of(a: Tensor, act: str) -> Tensor:
    """Mean and biased variance of act(a) as [2, C]"""
    var, mean = torch.var_mean(activation(act)(a.to(compute_dtype(a))), (0, 2, 3), correction=0)
    return torch.stack((mean, var))


def gradient_of(grad: Tensor, a: Tensor, coefficients: Tensor, act: str) -> Tensor:
    """da = (p * grad + q * (act(a) - mean) + r) * act'(a) in float32"""
    dtype = compute_dtype(a)
    a = a.to(dtype)
    p, q, r, mean = (column(row) for row in coefficients)
    return activation_backward(act, p * grad.to(dtype) + q * (activation(act)(a) - mean) + r, a)


def _forward(u: Tensor, like: Tensor, weight: Tensor, bias: Tensor | None, act: str, at: Geometry) -> list[Tensor]:
    dtype = compute_dtype(like)
    bias = None if bias is None else bias.to(dtype)
    a = F.conv2d(at.pad(u), weight.to(dtype), bias, at.stride, groups=at.groups).to(like.dtype)
    return [in_format(a, memory_format(like)), moments_of(a, act)]


def _backward(
    grad: Tensor, a: Tensor, coefficients: Tensor, u: Tensor, weight: Tensor, act: str, need: list[bool], at: Geometry
) -> list[Tensor]:
    """Gradients of u, weight and bias, all in float32"""
    da = gradient_of(grad, a, coefficients, act)
    padded = at.pad(u)
    du, dweight, _ = torch.ops.aten.convolution_backward(
        da, padded, weight.to(da.dtype), None, at.stride, (0, 0), (1, 1), False, (0, 0), at.groups, (*need, False)
    )
    return [
        at.unpad(du) if need[0] else da.new_empty(0),
        in_format(dweight, torch.contiguous_format) if need[1] else da.new_empty(0),
        da.sum((0, 2, 3)) if need[1] else da.new_empty(0),
    ]


def _with_sums(gradients: list[Tensor], x: Tensor, affine: Tensor | None, act: str) -> Gradients:
    """The input's gradient in the dtype and layout of x, and its sums."""
    dx, dweight, dbias = gradients
    if not dx.numel():
        return x.new_empty(0), dweight, dbias, dx
    found = in_format(dx.to(x.dtype), memory_format(x))
    return found, dweight, dbias, dx.new_empty(0) if affine is None else affine_sums(found, x, affine, act)


def _define(
    name: str, schema: str, fake: Callable[..., Any], reference: Callable[..., Any], flops: Callable[..., int]
) -> Callable[..., Any]:
    """The operator as it is called here: in float64, which no kernel takes, its reference.

    backend: as selected for the forward pass, which the backward pass keeps; without one torch.ops.cmx runs, by device.
    """
    compiled = define(name, schema, fake, reference, flops=flops)

    def call(first: Tensor, *args: Any, backend: str = "", **keywords: Any) -> Any:
        run = reference if first.dtype == torch.float64 else backends.function(backend, name, reference, compiled)
        return profiling.call(run, name, backend or first.device.type, first, *args, **keywords)

    return call


def _fake_forward(like: Tensor, shape: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    a = torch.empty(shape, dtype=like.dtype, device=like.device, memory_format=memory_format(like))
    return a, like.new_empty((2, shape[1]), dtype=compute_dtype(like))


def _fake_backward(
    a: Tensor, x: Tensor, affine: Tensor | None, weight: Tensor, need_input: bool, need_weight: bool
) -> Gradients:
    dtype = compute_dtype(x)
    dx = torch.empty_like(x, memory_format=memory_format(x)) if need_input else x.new_empty(0)
    dweight = x.new_empty(weight.shape if need_weight else 0, dtype=dtype)
    dbias = x.new_empty(a.shape[1] if need_weight else 0, dtype=dtype)
    sums = x.new_empty((2, x.shape[1]) if need_input and affine is not None else 0, dtype=dtype)
    return dx, dweight, dbias, sums


def _forward_flops(at: int) -> Callable[..., int]:
    """Formula of an operator whose weight is argument ``at``."""
    return lambda *args, out_shape: 2 * prod(out_shape[0]) * prod(args[at][1:])


def _backward_flops(at: int) -> Callable[..., int]:
    """As much again for each gradient that is wanted."""
    return lambda grad, a, *args, out_shape: 2 * prod(a) * prod(args[at - 2][1:]) * (args[-2] + args[-1])


# ---- depthwise: a = dwconv_same(X, weight) + bias


def depthwise_reference(
    x: Tensor, affine: Tensor | None, weight: Tensor, bias: Tensor | None, act: str
) -> tuple[Tensor, Tensor]:
    a, moments = _forward(value(x, affine, act), x, weight, bias, act, depthwise_geometry(weight))
    return a, moments


def depthwise_backward_reference(
    grad: Tensor,
    a: Tensor,
    coefficients: Tensor,
    x: Tensor,
    affine: Tensor | None,
    weight: Tensor,
    act: str,
    residual: bool,
    need_input: bool,
    need_weight: bool,
) -> Gradients:
    """The input's gradient includes that of the residual connection: dX = conv^T(da) + grad."""
    u, need = value(x, affine, act), [need_input, need_weight]
    found = _backward(grad, a, coefficients, u, weight, act, need, depthwise_geometry(weight))
    if residual and need_input:
        found[0] = found[0] + grad.to(found[0].dtype)
    return _with_sums(found, x, affine, act)


depthwise_train = _define(
    "depthwise_block_train",
    "(Tensor x, Tensor? affine, Tensor weight, Tensor? bias, str act) -> (Tensor, Tensor)",
    lambda x, affine, weight, bias, act: _fake_forward(x, x.shape),
    depthwise_reference,
    flops=_forward_flops(2),
)
depthwise_backward = _define(
    "depthwise_block_backward",
    "(Tensor grad, Tensor a, Tensor coefficients, Tensor x, Tensor? affine, Tensor weight, str act, bool residual, "
    "bool need_input, bool need_weight) -> (Tensor, Tensor, Tensor, Tensor)",
    lambda grad, a, k, x, affine, weight, act, residual, *need: _fake_backward(a, x, affine, weight, *need),
    depthwise_backward_reference,
    flops=_backward_flops(5),
)

# ---- pointwise: a = conv1x1(X + skip, weight) + bias; the skip is held as X is, with an affine of its own


def sum_of(x: Tensor, affine: Tensor | None, skip: Tensor | None, skip_affine: Tensor | None, act: str) -> Tensor:
    """X + skip in float32"""
    u = value(x, affine, act)
    return u if skip is None else u + value(skip, skip_affine, act)


def pointwise_reference(
    x: Tensor,
    affine: Tensor | None,
    skip: Tensor | None,
    skip_affine: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    act: str,
) -> tuple[Tensor, Tensor]:
    a, moments = _forward(sum_of(x, affine, skip, skip_affine, act), x, weight, bias, act, Geometry())
    return a, moments


def pointwise_backward_reference(
    grad: Tensor,
    a: Tensor,
    coefficients: Tensor,
    x: Tensor,
    affine: Tensor | None,
    skip: Tensor | None,
    skip_affine: Tensor | None,
    weight: Tensor,
    act: str,
    need_input: bool,
    need_weight: bool,
) -> Gradients:
    """The input's gradient is that of X and that of the skip; the sums are for X."""
    u, need = sum_of(x, affine, skip, skip_affine, act), [need_input, need_weight]
    return _with_sums(_backward(grad, a, coefficients, u, weight, act, need, Geometry()), x, affine, act)


pointwise_train = _define(
    "pointwise_block_train",
    "(Tensor x, Tensor? affine, Tensor? skip, Tensor? skip_affine, Tensor weight, Tensor? bias, str act) "
    "-> (Tensor, Tensor)",
    lambda x, affine, skip, skip_affine, weight, bias, act: _fake_forward(
        x, (x.shape[0], weight.shape[0], x.shape[2], x.shape[3])
    ),
    pointwise_reference,
    flops=_forward_flops(4),
)
pointwise_backward = _define(
    "pointwise_block_backward",
    "(Tensor grad, Tensor a, Tensor coefficients, Tensor x, Tensor? affine, Tensor? skip, Tensor? skip_affine, "
    "Tensor weight, str act, bool need_input, bool need_weight) -> (Tensor, Tensor, Tensor, Tensor)",
    lambda grad, a, k, x, affine, skip, skip_affine, weight, act, *need: _fake_backward(a, x, affine, weight, *need),
    pointwise_backward_reference,
    flops=_backward_flops(7),
)

# ---- stem: a = conv(x, weight, stride = kernel) + bias, on the image itself


def patch_embed_reference(x: Tensor, weight: Tensor, bias: Tensor | None, act: str) -> tuple[Tensor, Tensor]:
    a, moments = _forward(x.to(compute_dtype(x)), x, weight, bias, act, patch_geometry(weight))
    return a, moments


def patch_embed_backward_reference(
    grad: Tensor,
    a: Tensor,
    coefficients: Tensor,
    x: Tensor,
    weight: Tensor,
    act: str,
    need_input: bool,
    need_weight: bool,
) -> Gradients:
    u, need = x.to(compute_dtype(x)), [need_input, need_weight]
    found = _backward(grad, a, coefficients, u, weight, act, need, patch_geometry(weight))
    return _with_sums(found, x, None, act)


patch_embed_train = _define(
    "patch_embed_train",
    "(Tensor x, Tensor weight, Tensor? bias, str act) -> (Tensor, Tensor)",
    lambda x, weight, bias, act: _fake_forward(
        x, (x.shape[0], weight.shape[0], x.shape[2] // weight.shape[2], x.shape[3] // weight.shape[3])
    ),
    patch_embed_reference,
    flops=_forward_flops(1),
)
patch_embed_backward = _define(
    "patch_embed_backward",
    "(Tensor grad, Tensor a, Tensor coefficients, Tensor x, Tensor weight, str act, bool need_input, "
    "bool need_weight) -> (Tensor, Tensor, Tensor, Tensor)",
    lambda grad, a, k, x, weight, act, *need: _fake_backward(a, x, None, weight, *need),
    patch_embed_backward_reference,
    flops=_backward_flops(4),
)
