"""Inputs and expectations of the operators of training: their references in float64 and float32, and the magnitudes."""

import math
import zlib
from typing import Any

import torch
from cases import sizes
from compare import Expected
from torch import Tensor

from cmx_kernels.activations import activation
from cmx_kernels.ops import training

Args = tuple[Any, ...]
MAX_SLOPE = 1.2  # of an activation, rounded up


def normal(*size: int, seed: object = 0) -> Tensor:
    generator = torch.Generator().manual_seed(zlib.crc32(f"{size}{seed}".encode()))
    return torch.randn(size, generator=generator, dtype=torch.float64)


def rows(count: int, channels: int, seed: object = 0) -> Tensor:
    """An affine [3, C] or coefficients [4, C] of order one."""
    return normal(count, channels, seed=seed).float()


def to(dtype: torch.dtype, args: Args) -> Args:
    return tuple(v.to(dtype) if isinstance(v, Tensor) else v for v in args)


def depthwise_inputs(shape: tuple[int, ...], dtype: torch.dtype, act: str = "gelu", affine: bool = True) -> Args:
    x_size, weight_size = sizes("depthwise_block", shape)
    x, weight = normal(*x_size).to(dtype), normal(*weight_size, seed=1) / math.sqrt(math.prod(weight_size[1:]))
    given = rows(3, x_size[1]) if affine else None
    return x, given, weight.to(dtype), rows(1, x_size[1], seed=2)[0], act


def backward_inputs(args: Args, like: Tensor, residual: bool = True, need: tuple[bool, bool] = (True, True)) -> Args:
    """Of depthwise_block_backward, for the arguments and the pre-activation of depthwise_block_train"""
    x, affine, weight, _, act = args
    grad = normal(*like.shape, seed=3).to(like.dtype)
    return grad, like, rows(4, like.shape[1], seed=4), x, affine, weight, act, residual, *need


def _absolute(x: Tensor, affine: Tensor | None, act: str) -> tuple[Tensor, Tensor | None]:
    """X as a sum of positive numbers: |act(x)|, (-|mean|, |scale|, |shift|)"""
    if affine is None:
        return x.abs(), None
    size = affine.abs()
    return activation(act)(x).abs(), torch.stack((-size[0], size[1], size[2]))


def positive_sum(
    x: Tensor, affine: Tensor | None, skip: Tensor | None, skip_affine: Tensor | None, act: str
) -> tuple[Tensor | None, ...]:
    """Arguments whose X + skip, without activation, is the sum of the absolute values of the terms"""
    wide = [None if t is None else t.double() for t in (x, affine, skip, skip_affine)]
    first = _absolute(wide[0], wide[1], act)
    return first + ((None, None) if skip is None else _absolute(wide[2], wide[3], act))


def positive_gradient(grad: Tensor, a: Tensor, coefficients: Tensor, act: str) -> tuple[Tensor, Tensor, Tensor]:
    """The same of da"""
    size = coefficients.double().abs()
    rows = torch.stack((*(MAX_SLOPE * size[:3]), -size[3]))
    return grad.double().abs(), activation(act)(a.double()).abs(), rows


def positive_pointwise_backward(args: Args) -> Args:
    """The same of pointwise_block_backward"""
    grad, a, k, x, affine, skip, skip_affine, weight, act, *need = args
    size = positive_sum(x, affine, skip, skip_affine, act)
    return (*positive_gradient(grad, a, k, act), *size, weight.double().abs(), "none", *need)


def expect_pre_activation(args: Args) -> Expected:
    ref, plain = (training.depthwise_reference(*to(dtype, args))[0] for dtype in (torch.float64, torch.float32))
    x, affine, weight, bias, act = to(torch.float64, args)
    positive = (*_absolute(x, affine, act), weight.abs(), None if bias is None else bias.abs(), "none")
    magnitude = training.depthwise_reference(*positive)[0]
    return Expected(ref, plain, magnitude, math.prod(weight.shape[1:]), args[0].dtype)


def expect_moments(a: Tensor, act: str) -> Expected:
    """Of act(a), with ``a`` as it was stored. A deviation carries the rounding of act(a), once."""

    def moments(dtype: torch.dtype) -> Tensor:
        var, mean = torch.var_mean(activation(act)(a.to(dtype)), (0, 2, 3), correction=0)
        return torch.stack((mean, var))

    ref = moments(torch.float64)
    size = activation(act)(a.double()).abs().amax((0, 2, 3))
    deviation = ref[1].sqrt()
    magnitude = torch.stack((size, 2 * deviation * size + ref[1]))
    return Expected(ref, moments(torch.float32), magnitude, a.numel() // a.shape[1], torch.float32)


def _stored_activation(x: Tensor, act: str) -> Tensor:
    """act(x) as a layer in the dtype of x stores it, in float32"""
    return activation(act)(x.float()).to(x.dtype).float()


def expect_sums(dx: Tensor, x: Tensor, affine: Tensor, act: str, rounded: bool = False) -> Expected:
    """Of the gradient as it was stored. rounded: by a kernel that rounds act(x) to the dtype of x."""
    ref, plain = (training.affine_sums(*to(d, (dx, x, affine, act))) for d in (torch.float64, torch.float32))
    if rounded:
        plain = training.affine_sums(dx.float(), _stored_activation(x, act), affine, "none")
    size, rows_size = _absolute(x.double(), affine.double(), act)
    magnitude = training.affine_sums(dx.double().abs(), size, rows_size, "none")
    return Expected(ref, plain, magnitude, x.numel() // x.shape[1], torch.float32)


def _rounded_gradients(args: Args) -> tuple[Tensor, Tensor, Tensor]:
    """Torch in the dtype of x, of depthwise_block_backward: da, act(x) and X are stored in it, sums are float32."""
    grad, a, coefficients, x, affine, weight, act, residual, *_ = args
    da = training.gradient_of(grad, a, coefficients, act)
    u = training.value(_stored_activation(x, act), affine, "none") if affine is not None else x
    stored = (t.to(x.dtype).float() for t in (da, a))
    unchanged = torch.eye(4, 1).expand(4, a.shape[1])  # p = 1: the gradient is da
    given = (*stored, unchanged, u.to(x.dtype).float(), None, weight.float(), "none", False, True, True)
    dx, dweight, *_ = training.depthwise_backward_reference(*given)
    return dx + grad.float() if residual else dx, dweight, da.sum((0, 2, 3))


def expect_gradients(args: Args, rounded: bool = False) -> tuple[Expected, Expected, Expected]:
    """Of the input, the weight and the bias. rounded: by a kernel that rounds da, act(x) and X to the dtype of x."""
    grad, a, coefficients, x, affine, weight, act, residual, *_ = args
    full = (*args[:8], True, True)
    ref, plain = (training.depthwise_backward_reference(*to(d, full)) for d in (torch.float64, torch.float32))
    if rounded:
        plain = _rounded_gradients(args)
    wide = None if affine is None else affine.double()
    given = (*_absolute(x.double(), wide, act), weight.double().abs(), "none", residual, True, True)
    positive = (*positive_gradient(grad, a, coefficients, act), *given)
    magnitude = training.depthwise_backward_reference(*positive)
    pixels = x.numel() // x.shape[1]
    terms = (math.prod(weight.shape[1:]), pixels, pixels)
    dtypes = (x.dtype, torch.float32, torch.float32)
    return tuple(Expected(*e) for e in zip(ref[:3], plain[:3], magnitude[:3], terms, dtypes, strict=True))  # type: ignore[return-value]


# ---- `plain` as torch in the same dtype: X and da are rounded where eager, and the kernels that form them first, round


def expect_rounded_pre_activation(args: Args) -> Expected:
    x, affine, weight, bias, act = args
    plain = training.depthwise_reference(training.value(x, affine, act).to(x.dtype), None, weight, bias, act)[0]
    return expect_pre_activation(args)._replace(plain=plain.float())


def expect_rounded_gradients(args: Args) -> list[Expected]:
    grad, a, k, x, affine, weight, act, residual, *_ = args
    da = training.gradient_of(grad, a, k, act).to(x.dtype).float()
    same = torch.eye(4, 1).expand(4, x.shape[1])  # da as its own gradient
    given = (da, a.float(), same, training.value(x, affine, act), None, weight.float(), "none", False, True, True)
    dx, *rest, _ = training.depthwise_backward_reference(*given)
    dx = (dx + grad if residual else dx).to(x.dtype)
    return [e._replace(plain=p.float()) for e, p in zip(expect_gradients(args), (dx, *rest), strict=True)]
