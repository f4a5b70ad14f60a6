"""pointwise_block: y = scale * act(conv1x1(x, weight) + bias) + shift

x [N, Cin, H, W], weight [C, Cin, 1, 1] -> y [N, C, H, W].
The second half of a ConvMixer block (Trockman and Kolter, arXiv 2201.09792), its BatchNorm folded to scale and shift.
"""

from typing import Any

import torch
from torch import Tensor

from cmx_kernels.ops import conv_block
from cmx_kernels.ops.checks import check_weight, in_format, memory_format
from cmx_kernels.ops.conv_block import ConvOp, Geometry
from cmx_kernels.registry import define

_GEOMETRY = Geometry(operator="pointwise_block", absent=3)


def check(x: Tensor, weight: Tensor, bias: Tensor | None, scale: Tensor | None, shift: Tensor | None, act: str) -> None:
    conv_block.check_block(x, None, None, None, act)
    check_weight(x, weight, "[C, Cin, 1, 1]", (-1, x.shape[1], 1, 1))
    conv_block.check_block(x, bias, scale, shift, act, weight.shape[0])


def reference(
    x: Tensor, weight: Tensor, bias: Tensor | None, scale: Tensor | None, shift: Tensor | None, act: str = "gelu"
) -> Tensor:
    check(x, weight, bias, scale, shift, act)
    y = conv_block.forward(x, weight, bias, scale, shift, act, _GEOMETRY)
    return in_format(y, memory_format(x))


def _fake(
    x: Tensor, weight: Tensor, bias: Tensor | None, scale: Tensor | None, shift: Tensor | None, act: str
) -> Tensor:
    check(x, weight, bias, scale, shift, act)
    shape = (x.shape[0], weight.shape[0], x.shape[2], x.shape[3])
    return torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=memory_format(x))


def _backward(operators: Any, ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    return (*conv_block.backward(operators, ctx, grad, lambda weight: _GEOMETRY), None)


_SCHEMA = "(Tensor x, Tensor weight, Tensor? bias, Tensor? scale, Tensor? shift, str act) -> Tensor"
_OP = ConvOp(
    "pointwise_block",
    check,
    reference,
    define("pointwise_block", _SCHEMA, _fake, reference, conv_block.setup_context, _backward, conv_block.flops),
)


def pointwise_block(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    act: str = "gelu",
) -> Tensor:
    """``scale * act(conv2d(x, weight, bias)) + shift`` for a 1x1 kernel

    Args:
        x: activations [N, Cin, H, W], any strides; float32, float16, bfloat16 (float64 through the reference).
        weight: [C, Cin, 1, 1] as in nn.Conv2d, in x's dtype.
        bias, scale, shift: [C] in x's dtype or float32, or None.
        act: "gelu", "gelu_tanh", "relu" or "none".

    Returns:
        [N, C, H, W] in x's dtype; channels_last if x is.

    Raises:
        TypeError, ValueError: an argument of the wrong type, dtype, shape or device; nothing has been written.
    """
    return conv_block.run(_OP, x, weight, bias, scale, shift, act)
