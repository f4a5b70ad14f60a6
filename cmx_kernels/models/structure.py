"""What a fusible stem and block look like. Whatever does not is refused with a sentence.

    unit   conv -> activation -> BatchNorm
    stem   Sequential(conv p x p with stride p, act, bn)
    block  Sequential(x + Sequential(depthwise conv, act, bn), conv 1x1, act, bn)

The inner Sequentials may be written flat (timm, the paper's repository) or nested (the paper's 280-character version).
"""

import copy
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from cmx_kernels.activations import name_of
from cmx_kernels.ops.batchnorm import KINDS, BatchNorm, why_not_fold
from cmx_kernels.ops.checks import MAX_KERNEL


class Refusal(Exception):
    """The message is the reason, in a sentence."""


class Unit(NamedTuple):
    conv: nn.Conv2d
    act: nn.Module
    norm: BatchNorm


class BlockParts(NamedTuple):
    depthwise: Unit
    pointwise: Unit
    residual: nn.Module
    wrappers: tuple[nn.Module, ...]  # containers inside the block whose forward is bypassed, the residual among them


def stem_unit(modules: Sequence[nn.Module]) -> Unit:
    return _unit(modules, _why_not_patches)


def block_parts(block: nn.Module) -> BlockParts:
    if not block._modules:
        raise Refusal("it is empty")
    residual, *rest = children(block)
    _check_residual(residual)
    (inner,) = children(residual)
    depthwise = _unit(_inside(inner), _why_not_depthwise)
    if len(rest) == 1:
        return BlockParts(depthwise, _unit(_inside(rest[0]), _why_not_pointwise), residual, (residual, inner, rest[0]))
    return BlockParts(depthwise, _unit(rest, _why_not_pointwise), residual, (residual, inner))


def looks_like_block(module: nn.Module) -> bool:
    """Whether somebody would expect this module to be fused: a Sequential that starts with a wrapped depthwise conv."""
    outer = children(module) if type(module) is nn.Sequential else []
    inner = children(outer[0]) if len(outer) >= 2 else []
    if len(inner) != 1 or not isinstance(inner[0], nn.Sequential) or not len(inner[0]):
        return False
    conv = inner[0][0]
    return isinstance(conv, nn.Conv2d) and conv.groups == conv.in_channels > 1


def children(module: nn.Module) -> list[nn.Module]:
    return [child for child in module._modules.values() if child is not None]


def _inside(module: nn.Module) -> list[nn.Module]:
    if type(module) is not nn.Sequential:
        raise Refusal(f"{type(module).__name__} is no plain nn.Sequential")
    return children(module)


def _unit(modules: Sequence[nn.Module], why_not: Callable[[nn.Conv2d], str | None]) -> Unit:
    if len(modules) != 3:
        raise Refusal(f"{len(modules)} modules where a convolution, an activation and a BatchNorm are wanted")
    conv, act, norm = modules
    if type(conv) is not nn.Conv2d:
        raise Refusal(f"its convolution is a {type(conv).__name__}, not nn.Conv2d")
    reason = _why_not_conv(conv) or why_not(conv)
    if reason is not None:
        raise Refusal(f"its convolution {reason}")
    if name_of(act) is None:
        raise Refusal(f"there is no fused form of its activation {type(act).__name__}")
    if not isinstance(norm, KINDS) or type(norm) not in KINDS:
        raise Refusal(f"its normalisation is a {type(norm).__name__}, not nn.BatchNorm2d")
    return Unit(conv, act, norm)


def _why_not_conv(conv: nn.Conv2d) -> str | None:
    if conv.dilation != (1, 1):
        return f"has dilation {conv.dilation}"
    if conv.padding_mode != "zeros" and conv.padding not in ((0, 0), "valid"):
        return f"pads with {conv.padding_mode}, not zeros"
    return None


def _why_not_patches(conv: nn.Conv2d) -> str | None:
    if conv.groups != 1:
        return f"has {conv.groups} groups"
    if conv.stride != conv.kernel_size:
        return f"has stride {conv.stride} with a kernel of {conv.kernel_size}: patches would overlap or leave gaps"
    return None if conv.padding in ((0, 0), "valid") else f"pads its patches by {conv.padding}"


def _why_not_depthwise(conv: nn.Conv2d) -> str | None:
    if not conv.groups == conv.in_channels == conv.out_channels:
        return f"is not depthwise: {conv.in_channels} to {conv.out_channels} channels in {conv.groups} groups"
    kh, kw = conv.kernel_size
    if max(kh, kw) > MAX_KERNEL:
        return f"has a {kh}x{kw} kernel, larger than {MAX_KERNEL}"
    if conv.stride != (1, 1):
        return f"has stride {conv.stride}"
    odd = kh % 2 == 1 and kw % 2 == 1
    same = conv.padding == "same" or (odd and conv.padding == (kh // 2, kw // 2))
    return None if same else f'pads a {kh}x{kw} kernel by {conv.padding}, which is not "same"'


def _why_not_pointwise(conv: nn.Conv2d) -> str | None:
    if conv.kernel_size != (1, 1) or conv.groups != 1 or conv.stride != (1, 1):
        return f"is not a 1x1 convolution of stride 1 in one group: {conv}"
    return None if conv.padding in ((0, 0), "same", "valid") else f"pads a 1x1 kernel by {conv.padding}"


def averages(modules: Sequence[nn.Module]) -> bool:
    """Whether these are the average over all pixels and a flatten: [N, C, H, W] -> [N, C]."""
    if [type(module) for module in modules] != [nn.AdaptiveAvgPool2d, nn.Flatten]:
        return False
    pool, flatten = modules
    return pool.output_size in (1, (1, 1)) and (flatten.start_dim, flatten.end_dim) == (1, -1)


def why_not_one_operator(unit: Unit) -> str | None:
    """A sentence if a unit has no weight of the judged size, or no scale and shift before its batch is seen."""
    return why_not_size(unit.conv) or why_not_fold(unit.norm)


def why_not_size(conv: nn.Conv2d) -> str | None:
    """A sentence if a weight is not of the size from which the settings of its convolution were judged."""
    shape = conv.weight.shape
    if shape == (conv.out_channels, conv.in_channels // conv.groups, *conv.kernel_size):  # faster than to cut it
        return None
    size = shape[2:]
    return None if size == conv.kernel_size else f"a weight is {list(size)} with kernel_size={conv.kernel_size}"


_ADDS_INPUT: set[type] = set()  # classes seen to compute child(x) + x
# torch.compile of older releases cannot list attributes: there fuse() and calls outside of a graph have looked
_TRACES_ATTRIBUTES = tuple(map(int, torch.__version__.split(".")[:2])) >= (2, 13)
_STATELESS = frozenset(nn.Module().__dict__)
_BOOKKEEPING = ("__", "_is_", "_fsdp_")  # what TorchScript, DataParallel, transformers and FSDP note on modules


def _check_residual(module: nn.Module) -> None:
    """Its forward is somebody else's code: it is run once, with a known child, to see that it adds its input."""
    name = type(module).__name__
    if len(module._modules) != 1 or module._parameters or module._buffers:
        raise Refusal(f"{name} holds more, or less, than one child: it may not compute x + f(x)")
    looks = _TRACES_ATTRIBUTES or not torch.compiler.is_compiling()
    if looks and any(key not in _STATELESS and not key.startswith(_BOOKKEEPING) for key in module.__dict__):
        raise Refusal(f"{name} has attributes of its own: it may not compute x + f(x)")
    if type(module) in _ADDS_INPUT:
        return
    probe = copy.copy(module)
    probe.__dict__["_modules"] = {key: _Probe() for key in module._modules}
    x = torch.linspace(-2, 3, 36, device="cpu").reshape(2, 2, 3, 3)
    for training in (True, False):
        probe.training = training
        try:
            with torch.no_grad(), torch.random.fork_rng(devices=[]):
                before = torch.get_rng_state()
                y = type(module).forward(probe, x)
                draws = not torch.equal(before, torch.get_rng_state())
        except Exception as error:
            raise Refusal(f"{name} does not run on a test input: {error}") from error
        if draws:
            raise Refusal(f"{name} draws random numbers: it may not always compute x + f(x)")
        if not isinstance(y, Tensor) or not torch.equal(y, _probed(x) + x):
            raise Refusal(f"{name} computes something else than x + f(x)")
    _ADDS_INPUT.add(type(module))


class _Probe(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return _probed(x)


def _probed(x: Tensor) -> Tensor:
    return x.flip(-1) * 3 + 1
