"""Layers on their own: a depthwise convolution with a large kernel, as RepLKNet and its successors use it."""

from collections.abc import Callable, Iterator
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn

from cmx_kernels import backends, ops, plain_layers, profiling, tuned
from cmx_kernels.models.fused import Block, Stem
from cmx_kernels.models.obstacles import check_call, check_tensor, plain_is_wanted
from cmx_kernels.models.stack import STATE
from cmx_kernels.models.structure import Refusal, why_not_size
from cmx_kernels.ops.block_stack import ConvParams, PackedCache
from cmx_kernels.ops.checks import MAX_KERNEL, Size, autocast, autocast_is_on, check_int, pair, wants_grad
from cmx_kernels.ops.depthwise_packed import PackedDepthwise, depthwise_packed, pack
from cmx_kernels.ops.kept_weights import for_autocast, forget_moved

_is_compiling, _is_grad_enabled, _is_autocast_enabled = (
    torch.compiler.is_compiling,
    torch.is_grad_enabled,
    torch.is_autocast_enabled,
)


def why_not_depthwise(conv: nn.Conv2d) -> str | None:
    """A sentence if the settings of a depthwise convolution are not those of the operator."""
    kh, kw = conv.kernel_size
    if conv.out_channels != conv.in_channels:
        return f"{conv.in_channels} channels become {conv.out_channels}"
    if conv.stride != (1, 1) or conv.dilation != (1, 1):
        return f"stride {conv.stride} and dilation {conv.dilation} are not 1"
    if conv.padding_mode != "zeros":
        return f"padding_mode is {conv.padding_mode!r}, not 'zeros'"
    if conv.padding != "same" and not (kh % 2 == 1 == kw % 2 and conv.padding == (kh // 2, kw // 2)):
        return f"padding {conv.padding} of a {kh}x{kw} kernel is not 'same'"
    return f"the kernel is larger than {MAX_KERNEL}x{MAX_KERNEL}" if max(kh, kw) > MAX_KERNEL else None


class _Kept(PackedCache):
    """And the input that PyTorch's own was last found faster for: a third of the time of finding it again."""

    plain_for: tuple[torch.Size, tuple[int, ...], torch.dtype, torch.Size] | None = None  # and the weight's shape

    def is_plain_for(self, x: Tensor, weight: Tensor) -> bool:
        known = self.plain_for
        if known is None or _is_grad_enabled() or _is_autocast_enabled("cpu") or backends._forced or tuned.choices:
            return False
        try:
            return isinstance(x, Tensor) and x.is_cpu and (x.shape, x.stride(), x.dtype, weight.shape) == known
        except RuntimeError:  # of a layout without strides
            return False


class LargeKernelDepthwiseConv2d(nn.Conv2d):
    """nn.Conv2d(channels, channels, kernel_size, groups=channels, padding="same"): [N, C, H, W] -> [N, C, H, W].

    Same parameters, state dict and initialisation as nn.Conv2d, and the same result. Other strides, paddings and
    dilations, kernels larger than 31 and unbatched input run in plain PyTorch, which is said once. So do, without
    a word, the few shapes where PyTorch's own convolution was measured as the faster one: plain_layers.py.

    Args:
        channels: C, of input and output.
        kernel_size: pixels from 1 to 31, odd or even, or (rows, columns).

    Raises:
        TypeError, ValueError: an argument of the wrong type or value.
    """

    def __init__(
        self,
        channels: int,
        kernel_size: Size,
        bias: bool = True,
        *,
        stride: int | tuple[int, int] = 1,
        padding: str | int | tuple[int, int] = "same",
        dilation: int | tuple[int, int] = 1,
        padding_mode: Literal["zeros", "reflect", "replicate", "circular"] = "zeros",
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        check_int("channels", channels, 1, "a number of channels")
        for value in pair("kernel_size", kernel_size):
            check_int("kernel_size", value, 1, "pixels")
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
        reason = why_not_depthwise(self)
        if reason is not None:
            return reason
        if x.dim() != 4:
            return f"x has {x.dim()} dimensions, not [N, C, H, W]"
        try:
            check_call(x)
            check_tensor(self.weight)
        except Refusal as refusal:
            return str(refusal.args[0])
        return "its _conv_forward was replaced" if "_conv_forward" in self.__dict__ else why_not_size(self)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        self.__dict__.pop(STATE, None)
        found = super()._apply(fn, recurse)
        forget_moved(self.parameters())
        return found

    def forward(self, x: Tensor) -> Tensor:
        if torch.jit.is_scripting():
            return self._conv_forward(x, self.weight, self.bias)
        else:  # noqa: RET505 (TorchScript skips what stands in an else)
            return self._fused(x)

    def _fused(self, x: Tensor) -> Tensor:
        weight, bias = self.weight, self.bias
        if not _is_compiling() and (kept := self.__dict__.get(STATE)) is not None and kept.is_plain_for(x, weight):
            return self._conv_forward(x, weight, bias)
        trains = torch.is_grad_enabled() and isinstance(x, Tensor) and wants_grad(x, weight, bias)
        if plain_layers.is_faster(x, weight, trains):
            if not (trains or plain_is_wanted(x)):
                self._kept().plain_for = x.shape, x.stride(), x.dtype, weight.shape
            return self._conv_forward(x, weight, bias)
        if plain_is_wanted(x):
            return self._conv_forward(x, weight, bias)
        reason = self.why_plain(x)
        if reason is not None:
            backends.fall_back("a LargeKernelDepthwiseConv2d", reason)
            return super().forward(x)
        given = x
        if autocast_is_on(x):
            (x,) = autocast(x)
        backend = backends.select("depthwise_block", x, "none", weight=weight.shape)
        if backend == "reference":
            return super().forward(given)
        if backend == "cpu" and not (trains or torch.compiler.is_compiling()):
            packed = self._packed(x, weight, bias)
            if packed is not None:
                return profiling.call(depthwise_packed, "depthwise_block", backend, x, packed, "none", False)
        return ops.depthwise_block(given, for_autocast(given, weight, bias), bias, act="none", residual=False)

    def _kept(self) -> "_Kept":
        found: _Kept | None = self.__dict__.get(STATE)
        if found is None:
            found = self.__dict__[STATE] = _Kept()
        return found

    def _packed(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> PackedDepthwise | None:
        """The weight in the layout of the CPU kernels, packed again after every change; None if it does not fit x."""
        channels, dtype = self.out_channels, weight.dtype
        if weight.shape != (channels, 1, *self.kernel_size) or x.size(1) != channels or not weight.is_cpu:
            return None
        if dtype != x.dtype and not torch.is_autocast_enabled("cpu"):
            return None
        if bias is not None and (bias.shape != (channels,) or bias.dtype != dtype or not bias.is_cpu):
            return None
        if weight.is_inference() or (bias is not None and bias.is_inference()):  # whose changes are not counted
            return None
        tensors = (weight,) if bias is None else (weight, bias)
        found: PackedDepthwise = self._kept().get(
            tensors, x.dtype, lambda: pack(ConvParams(weight, bias, None, None), x.dtype)
        )
        return found


class SwappedDepthwiseConv2d(LargeKernelDepthwiseConv2d):
    """What fuse() makes of an nn.Conv2d, and unfuse() makes an nn.Conv2d again."""

    def _get_name(self) -> str:
        return LargeKernelDepthwiseConv2d.__name__


def is_depthwise(module: nn.Module) -> bool:
    return isinstance(module, nn.Conv2d) and module.groups == module.in_channels > 1


def swap(model: nn.Module) -> dict[str, str | None]:
    """Let every depthwise nn.Conv2d that can run on our kernels do so: name -> None if it does now, else why not.

    Convolutions inside fused parts belong to those.
    """
    found: dict[str, str | None] = {}
    for name, conv in _outside_fused(model, ""):
        if isinstance(conv, LargeKernelDepthwiseConv2d):
            found[name] = why_not_depthwise(conv)
        else:
            found[name] = why_not_swap(conv)
            if found[name] is None:
                _become(conv, SwappedDepthwiseConv2d)
    return found


def unswap(model: nn.Module) -> None:
    for module in model.modules():
        if type(module) is SwappedDepthwiseConv2d:
            _become(module, nn.Conv2d)


def why_not_swap(conv: nn.Conv2d) -> str | None:
    """A sentence if a depthwise convolution stays what it is."""
    if type(conv) is not nn.Conv2d:
        return f"it is a {type(conv).__name__}, not nn.Conv2d"
    if "forward" in conv.__dict__:
        return "its forward was replaced"
    return why_not_depthwise(conv)


def _outside_fused(module: nn.Module, name: str) -> Iterator[tuple[str, nn.Conv2d]]:
    if is_depthwise(module):
        yield name, cast(nn.Conv2d, module)
    elif not isinstance(module, (Stem, Block)):
        for key, child in module.named_children():
            yield from _outside_fused(child, f"{name}.{key}" if name else key)


def _become(module: nn.Module, kind: type[Any]) -> None:
    module.__dict__.pop(STATE, None)
    module.__class__ = kind
