"""pool_head: y = mean_hw(x) weight^T + bias

x [N, C, H, W], weight [classes, C] -> y [N, classes]. ConvMixer's classifier: global average pool and linear layer.
The mean and the product are summed in float32 and rounded once.
"""

from collections.abc import Sequence
from math import prod
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from cmx_kernels import backends, profiling
from cmx_kernels.ops.checks import (
    autocast,
    autocast_is_on,
    check_activations,
    check_vector,
    check_weight,
    compute_dtype,
)
from cmx_kernels.registry import define


def _check(x: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    check_activations(x)
    check_weight(x, weight, "[classes, C]", (-1, x.shape[1]), dims=2)
    check_vector(x, bias, "bias", weight.shape[0])
    if x.shape[2] * x.shape[3] == 0:
        raise ValueError(f"x: got shape {list(x.shape)}, wanted at least one pixel to average")


def reference(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    _check(x, weight, bias)
    dtype = compute_dtype(x)
    pooled = x.to(dtype).mean((2, 3))
    return F.linear(pooled, weight.to(dtype), None if bias is None else bias.to(dtype)).to(x.dtype)


def _fake(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    _check(x, weight, bias)
    return x.new_empty((x.shape[0], weight.shape[0]))


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weight, bias = inputs
    ctx.save_for_backward(x, weight)
    ctx.bias_dtype = None if bias is None else bias.dtype


def _backward(operators: Any, ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    """dx = (grad weight) / HW    dweight = grad^T mean(x)    dbias = sum(grad)"""
    x, weight = ctx.saved_tensors
    need_x, need_weight, need_bias = ctx.needs_input_grad
    grad = grad.to(compute_dtype(x))
    dx = dweight = dbias = None
    if need_x:
        dpooled = grad @ weight.to(grad.dtype) / (x.shape[2] * x.shape[3])
        dx = dpooled.to(x.dtype)[:, :, None, None].expand_as(x).contiguous()
    if need_weight:
        dweight = (grad.t() @ x.to(grad.dtype).mean((2, 3))).to(weight.dtype)
    if need_bias:
        dbias = grad.sum(0).to(ctx.bias_dtype)
    return dx, dweight, dbias


def _flops(x: Sequence[int], weight: Sequence[int], *rest: Any, out_shape: Sequence[int]) -> int:
    return 2 * x[0] * prod(weight)  # the mean is not counted, as PyTorch does not


_compiled = define(
    "pool_head",
    "(Tensor x, Tensor weight, Tensor? bias) -> Tensor",
    _fake,
    reference,
    _setup_context,
    _backward,
    _flops,
)


def pool_head(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``linear(x.mean((2, 3)), weight, bias)``

    Args:
        x: activations [N, C, H, W], any strides; float32, float16, bfloat16 (float64 through the reference).
        weight: [classes, C] as in nn.Linear, in x's dtype.
        bias: [classes] in x's dtype or float32, or None.

    Returns:
        [N, classes] in x's dtype.

    Raises:
        TypeError, ValueError: an argument of the wrong type, dtype, shape or device; nothing has been written.
    """
    if autocast_is_on(x):
        x, weight = autocast(x, weight)
        with torch.autocast(x.device.type, enabled=False):
            return pool_head(x, weight, bias)
    _check(x, weight, bias)
    backend = backends.select("pool_head", x, "none")
    call = backends.function(backend, "pool_head", reference, _compiled)
    return profiling.call(call, "pool_head", backend, x, weight, bias)
