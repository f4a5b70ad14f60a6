"""depthwise_block: y = scale * act(dwconv_same(x, weight) + bias) + shift + residual * x

x [N, C, H, W], weight [C, 1, kh, kw] -> y [N, C, H, W]; zero "same" padding, (k - 1) // 2 before and k // 2 after.
The first half of a ConvMixer block (Trockman and Kolter, arXiv 2201.09792), its BatchNorm folded to scale and shift.
"""

from typing import Any

import torch
from torch import Tensor

from cmx_kernels.ops import conv_block
from cmx_kernels.ops.checks import check_kernel, check_weight, in_format, memory_format
from cmx_kernels.ops.conv_block import ConvOp, Geometry
from cmx_kernels.registry import define


def geometry(weight: Tensor) -> Geometry:
    kh, kw = weight.shape[2:]
    padding = ((kw - 1) // 2, kw // 2, (kh - 1) // 2, kh // 2)
    return Geometry(padding=padding, groups=weight.shape[0], operator="depthwise_block", absent=1)


def check(x: Tensor, weight: Tensor, bias: Tensor | None, scale: Tensor | None, shift: Tensor | None, act: str) -> None:
    conv_block.check_block(x, None, None, None, act)
    check_weight(x, weight, "[C, 1, kh, kw]", (x.shape[1], 1, -1, -1))
    check_kernel(weight)
    conv_block.check_block(x, bias, scale, shift, act, x.shape[1])


def reference(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
    act: str = "gelu",
    residual: bool = True,
) -> Tensor:
    check(x, weight, bias, scale, shift, act)
    y = conv_block.forward(x, weight, bias, scale, shift, act, geometry(weight), residual)
    return in_format(y, memory_format(x))


def _fake(
    x: Tensor, weight: Tensor, bias: Tensor | None, scale: Tensor | None, shift: Tensor | None, act: str, residual: bool
) -> Tensor:
    check(x, weight, bias, scale, shift, act)
    return torch.empty(x.shape, dtype=x.dtype, device=x.device, memory_format=memory_format(x))


def _backward(operators: Any, ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    return (*conv_block.backward(operators, ctx, grad, geometry), None, None)


_SCHEMA = "(Tensor x, Tensor weight, Tensor? bias, Tensor? scale, Tensor? shift, str act, bool residual) -> Tensor"
_OP = ConvOp(
    "depthwise_block",
    check,
    reference,
    define("depthwise_block", _SCHEMA, _fake, reference, conv_block.setup_context, _backward, conv_block.flops),
)


def depthwise_block(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    act: str = "gelu",
    residual: bool = True,
) -> Tensor:
    """``scale * act(conv2d(x, weight, bias, padding="same", groups=C)) + shift + (x if residual else 0)``

    Args:
        x: activations [N, C, H, W], any strides; float32, float16, bfloat16 (float64 through the reference).
        weight: [C, 1, kh, kw] as in nn.Conv2d, in x's dtype; kh and kw from 1 to 31, odd or even.
        bias, scale, shift: [C] in x's dtype or float32, or None.
        act: "gelu", "gelu_tanh", "relu" or "none".
        residual: add x.

    Returns:
        [N, C, H, W] in x's dtype; channels_last if x is.

    Raises:
        TypeError, ValueError: an argument of the wrong type, dtype, shape or device; nothing has been written.
    """
    return conv_block.run(_OP, x, weight, bias, scale, shift, act, residual)
