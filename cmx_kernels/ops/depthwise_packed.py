"""depthwise_packed: depthwise_block on a weight that was packed once. Inference only.

The packed layout belongs to the backend and to its instruction set: it is made on the machine that uses it.
"""

from collections.abc import Sequence
from math import prod
from typing import NamedTuple

import torch
from torch import Tensor

from cmx_kernels.ops.block_stack import ConvParams, constants_of, pack_depthwise
from cmx_kernels.ops.checks import memory_format
from cmx_kernels.registry import define


class PackedDepthwise(NamedTuple):
    weight: Tensor
    constants: Tensor  # bias, scale, shift: float32 [3, C]
    kernel: tuple[int, ...]


def _fake(x: Tensor, weight: Tensor, constants: Tensor, kernel: Sequence[int], act: str, residual: bool) -> Tensor:
    return torch.empty(x.shape, dtype=x.dtype, device=x.device, memory_format=memory_format(x))


_compiled = define(
    "depthwise_packed",
    "(Tensor x, Tensor weight, Tensor constants, int[] kernel, str act, bool residual) -> Tensor",
    _fake,
    None,
    flops=lambda x, weight, constants, kernel, act, residual, out_shape: 2 * prod(x) * prod(kernel),
).default


def pack(conv: ConvParams, dtype: torch.dtype) -> PackedDepthwise:
    """Pack a depthwise convolution for activations in ``dtype``."""
    weight = pack_depthwise(conv.weight.detach().to(dtype))
    return PackedDepthwise(weight, constants_of(conv), tuple(conv.weight.shape[2:]))


def depthwise_packed(x: Tensor, packed: PackedDepthwise, act: str, residual: bool) -> Tensor:
    """ops.depthwise_block, without a gradient.

    Args:
        x: [N, C, H, W] in the dtype it was packed for, any strides.
        packed: from :func:`pack`, on this machine.
        act, residual: as in ops.depthwise_block.

    Raises:
        RuntimeError: one of them does not fit the others, from the operator.
    """
    return _compiled(x, packed.weight, packed.constants, packed.kernel, act, residual)
