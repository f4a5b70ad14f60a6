"""Layers on their own: a depthwise convolution with a large kernel, as RepLKNet and its successors use it."""

from typing import Any, Literal

import torch
from torch import Tensor, nn

from cmx_kernels import backends, ops
from cmx_kernels.models.stack import check_call, plain_is_wanted
from cmx_kernels.models.structure import Refusal
from cmx_kernels.ops.checks import MAX_KERNEL, autocast


class LargeKernelDepthwiseConv2d(nn.Conv2d):
    """nn.Conv2d(channels, channels, kernel_size, groups=channels, padding="same"): [N, C, H, W] -> [N, C, H, W].

    Same parameters, state dict and initialisation as nn.Conv2d, and the same result. Other strides, paddings and
    dilations, kernels larger than 31 and unbatched input run in plain PyTorch, which is said once.

    Args:
        channels: C, of input and output.
        kernel_size: pixels from 1 to 31, odd or even, or (rows, columns).

    Raises:
        TypeError, ValueError: an argument of the wrong type or value.
    """

    def __init__(
        self,
        channels: int,
        kernel_size: int | tuple[int, int],
        bias: bool = True,
        *,
        stride: int | tuple[int, int] = 1,
        padding: str | int | tuple[int, int] = "same",
        dilation: int | tuple[int, int] = 1,
        padding_mode: Literal["zeros", "reflect", "replicate", "circular"] = "zeros",
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(
            channels,
            channels,
            kernel_size,
            stride=stride,
            padding=padding,
            dilation=dilation,
            groups=channels,
            bias=bias,
            padding_mode=padding_mode,
            device=device,
            dtype=dtype,
        )

    def why_plain(self, x: Tensor) -> str | None:
        """A sentence if the layer runs in plain PyTorch on ``x``."""
        kh, kw = self.kernel_size
        if self.stride != (1, 1) or self.dilation != (1, 1):
            return f"stride {self.stride} and dilation {self.dilation} are not 1"
        if self.padding_mode != "zeros":
            return f"padding_mode is {self.padding_mode!r}, not 'zeros'"
        if self.padding != "same" and not (kh % 2 == 1 == kw % 2 and self.padding == (kh // 2, kw // 2)):
            return f"padding {self.padding} of a {kh}x{kw} kernel is not 'same'"
        if max(kh, kw) > MAX_KERNEL:
            return f"the kernel is larger than {MAX_KERNEL}x{MAX_KERNEL}"
        if x.dim() != 4:
            return f"x has {x.dim()} dimensions, not [N, C, H, W]"
        try:
            check_call(x)
            check_call(self.weight)
        except Refusal as reason:
            return str(reason)
        return None

    def forward(self, x: Tensor) -> Tensor:
        if torch.jit.is_scripting():
            return self._conv_forward(x, self.weight, self.bias)
        else:  # noqa: RET505 (TorchScript skips what stands in an else)
            return self._fused(x)

    def _fused(self, x: Tensor) -> Tensor:
        if plain_is_wanted(x):
            return super().forward(x)
        reason = self.why_plain(x)
        if reason is not None:
            backends.say_once(f"a LargeKernelDepthwiseConv2d runs in plain PyTorch: {reason}")
            return super().forward(x)
        if not backends.has_kernel("depthwise_block", autocast(x)[0], "none"):
            return super().forward(x)
        return ops.depthwise_block(x, self.weight, self.bias, act="none", residual=False)
