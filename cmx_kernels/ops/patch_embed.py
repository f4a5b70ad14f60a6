"""patch_embed: y = scale * act(conv(x, weight, stride = kernel) + bias) + shift

x [N, Cin, H, W], weight [C, Cin, p, q] -> y [N, C, H // p, W // q]; pixels beyond the last whole patch are ignored.
The stem of ConvMixer (Trockman and Kolter, arXiv 2201.09792) with its BatchNorm folded to scale and shift.
"""

from typing import Any

import torch
from torch import Tensor

from cmx_kernels.ops import conv_block
from cmx_kernels.ops.checks import check_weight, in_format, memory_format
from cmx_kernels.ops.conv_block import ConvOp, Geometry
from cmx_kernels.registry import define


def geometry(weight: Tensor) -> Geometry:
    return Geometry(stride=(weight.shape[2], weight.shape[3]), operator="patch_embed")


def check(x: Tensor, weight: Tensor, bias: Tensor | None, scale: Tensor | None, shift: Tensor | None, act: str) -> None:
    conv_block.check_block(x, None, None, None, act)
    check_weight(x, weight, "[C, Cin, p, q]", (-1, x.shape[1], -1, -1))
    c, _, p, q = weight.shape
    if min(c, p, q) < 1:
        raise ValueError(f"weight: got shape {list(weight.shape)}, wanted at least one channel and a 1x1 patch")
    if x.shape[2] < p or x.shape[3] < q:
        pixels = f"{x.shape[2]}x{x.shape[3]}"
        raise ValueError(f"x: got an image of {pixels} pixels, wanted at least one patch of {p}x{q}; resize it")
    conv_block.check_block(x, bias, scale, shift, act, c)


def reference(
    x: Tensor, weight: Tensor, bias: Tensor | None, scale: Tensor | None, shift: Tensor | None, act: str = "gelu"
) -> Tensor:
    check(x, weight, bias, scale, shift, act)
    y = conv_block.forward(x, weight, bias, scale, shift, act, geometry(weight))
    return in_format(y, memory_format(x))


def _fake(
    x: Tensor, weight: Tensor, bias: Tensor | None, scale: Tensor | None, shift: Tensor | None, act: str
) -> Tensor:
    check(x, weight, bias, scale, shift, act)
    n, _, h, w = x.shape
    c, _, p, q = weight.shape
    return torch.empty((n, c, h // p, w // q), dtype=x.dtype, device=x.device, memory_format=memory_format(x))


def _backward(operators: Any, ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    return (*conv_block.backward(operators, ctx, grad, geometry), None)


_SCHEMA = "(Tensor x, Tensor weight, Tensor? bias, Tensor? scale, Tensor? shift, str act) -> Tensor"
_OP = ConvOp(
    "patch_embed",
    check,
    reference,
    define("patch_embed", _SCHEMA, _fake, reference, conv_block.setup_context, _backward, conv_block.flops),
)


def patch_embed(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    act: str = "gelu",
) -> Tensor:
    """``scale * act(conv2d(x, weight, bias, stride=kernel)) + shift``

    Args:
        x: images [N, Cin, H, W], any strides; float32, float16, bfloat16 (float64 through the reference).
        weight: [C, Cin, p, q] as in nn.Conv2d, in x's dtype.
        bias, scale, shift: [C] in x's dtype or float32, or None.
        act: "gelu", "gelu_tanh", "relu" or "none".

    Returns:
        [N, C, H // p, W // q] in x's dtype; channels_last if x is.

    Raises:
        TypeError, ValueError: an argument of the wrong type, dtype, shape or device; nothing has been written.
    """
    return conv_block.run(_OP, x, weight, bias, scale, shift, act)
