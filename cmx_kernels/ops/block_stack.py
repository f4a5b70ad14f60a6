"""block_stack: a stem and a stack of equal blocks in one call, on weights packed once. Inference only.

    x = patch_embed(image)                          if the stack has a stem
    x = pointwise_block(depthwise_block(x))         for every block
    y = mean_hw(x)                                  if pool
    y = y @ head.T + head_bias                      if there is a head

Between the first and the last kernel the activations stay in the kernels' own layout. The packed layout belongs to the
backend and to its instruction set: it is made on the machine that uses it and never stored.
"""

from collections.abc import Callable, Hashable, Iterator, Sequence
from itertools import chain, islice
from math import prod
from operator import attrgetter
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import profiler

from cmx_kernels import backends, profiling, registry
from cmx_kernels.ops.checks import check_activations, memory_format
from cmx_kernels.registry import define


class ConvParams(NamedTuple):
    """One convolution with what follows its activation; weight as in nn.Conv2d, the rest [C] or None."""

    weight: Tensor
    bias: Tensor | None
    scale: Tensor | None
    shift: Tensor | None


class PackedStack(NamedTuple):
    """``tensors`` holds (weight, constants [3, C]) for the stem, if any, then for each half of each block."""

    tensors: list[Tensor]
    in_channels: int
    channels: int
    patch: tuple[int, ...]  # () without a stem
    kernel: tuple[int, ...]  # () without a block
    act: str


def _fake(
    x: Tensor,
    packed: Sequence[Tensor],
    channels: int,
    patch: Sequence[int],
    kernel: Sequence[int],
    act: str,
    pool: bool,
    head: Tensor | None = None,
    head_bias: Tensor | None = None,
) -> Tensor:
    if pool:
        return x.new_empty((x.shape[0], channels if head is None else head.shape[0]))
    p, q = patch or (1, 1)
    shape = (x.shape[0], channels, x.shape[2] // p, x.shape[3] // q)
    return torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=memory_format(x))


def _flops(
    x: Sequence[int],
    packed: Sequence[Sequence[int]],
    channels: int,
    patch: Sequence[int],
    kernel: Sequence[int],
    act: str,
    pool: bool,
    head: Sequence[int] | None = None,
    head_bias: Sequence[int] | None = None,
    *,
    out_shape: Sequence[int],
) -> int:
    """Of the unpacked convolutions and the head: packing may pad channels."""
    p, q = patch or (1, 1)
    depth = (len(packed) // 2 - bool(patch)) // 2
    taps = (x[1] * p * q if patch else 0) + depth * (prod(kernel) + channels)
    return 2 * x[0] * channels * ((x[2] // p) * (x[3] // q) * taps + (head[0] if head else 0))


_compiled = define(
    "block_stack",
    "(Tensor x, Tensor[] packed, int channels, int[] patch, int[] kernel, str act, bool pool, "
    "Tensor? head=None, Tensor? head_bias=None) -> Tensor",
    _fake,
    None,
    flops=_flops,
)
pack_depthwise, _pack_pointwise = (
    define(
        name,
        "(Tensor weight) -> Tensor",
        lambda weight: weight.new_empty(0),
        None,
        flops=lambda weight, out_shape: 0,
    )
    for name in ("pack_depthwise", "pack_pointwise")
)


SLOWER = "tune() measured PyTorch as faster than the stack in one call"


def why_not(x: Tensor, act: str, size: Sequence[int] | None = None) -> str | None:
    """A sentence if no backend runs a whole stack on ``x``; its operators may still be fused one by one.

    size: depth, channels and kernel, by which tune() knows a stack.
    """
    if torch.is_grad_enabled() and x.requires_grad:
        return "a gradient of x is wanted, the stack is for inference"
    if backends.forced() not in (None, "cpu"):
        return f"use({backends.forced()!r}) runs operators one by one"
    if backends.select("block_stack", x, act, quiet=True, weight=size) != "cpu":
        if backends.select("block_stack", x, act, quiet=True) == "cpu":
            return SLOWER
        return f"no backend runs a whole stack on {x.device.type} in {x.dtype}"
    return None


def constants_of(conv: ConvParams) -> Tensor:
    """bias, scale and shift as float32 [3, C]"""
    rows = conv.weight.new_empty((3, conv.weight.shape[0]), dtype=torch.float32)
    for row, vector, missing in zip(rows, (conv.bias, conv.scale, conv.shift), (0.0, 1.0, 0.0), strict=True):
        row.fill_(missing) if vector is None else row.copy_(vector.detach())
    return rows


def pack(
    stem: ConvParams | None, blocks: Sequence[tuple[ConvParams, ConvParams]], act: str, dtype: torch.dtype
) -> PackedStack:
    """Pack a stem and blocks of one width, kernel size and activation for activations in ``dtype``."""

    def of(conv: ConvParams, depthwise: bool = False) -> Iterator[Tensor]:
        weight = conv.weight.detach().to(dtype)
        yield pack_depthwise(weight) if depthwise else _pack_pointwise(weight.flatten(1))
        yield constants_of(conv)

    def every() -> Iterator[Tensor]:
        if stem is not None:
            yield from of(stem)
        for depthwise, pointwise in blocks:
            yield from of(depthwise, True)
            yield from of(pointwise)

    tensors = _together(every(), 2 if stem is not None else 0, len(blocks))
    first = stem.weight if stem is not None else blocks[0][0].weight
    patch = tuple(stem.weight.shape[2:]) if stem is not None else ()
    kernel = tuple(blocks[0][0].weight.shape[2:]) if blocks else ()
    return PackedStack(tensors, (stem or blocks[0][1]).weight.shape[1], first.shape[0], patch, kernel, act)


def _together(tensors: Iterator[Tensor], before: int, blocks: int) -> list[Tensor]:
    """``tensors``, so many and then four for each of equal blocks, one behind the other in huge pages."""
    first = list(islice(tensors, before + 4 * bool(blocks)))
    if first[0].device.type != "cpu":
        return [*first, *tensors]
    size = [-(-tensor.nbytes // _LINE) * _LINE for tensor in first]
    total, huge = sum(size[:before]) + blocks * sum(size[before:]), registry.C.huge_page
    memory = torch.empty(total + huge, dtype=torch.uint8, device="cpu")  # whatever the default is
    at = -memory.data_ptr() % huge
    registry.C.use_huge_pages(memory.data_ptr() + at, total)
    found = []
    for tensor in chain(first, tensors):
        place = memory[at : at + tensor.nbytes].view(tensor.dtype).view(tensor.shape)
        found.append(place.copy_(tensor))
        at += -(-tensor.nbytes // _LINE) * _LINE
    return found


def block_stack(
    x: Tensor,
    packed: PackedStack,
    pool: bool = False,
    head: Tensor | None = None,
    head_bias: Tensor | None = None,
) -> Tensor:
    """Run a packed stack.

    Args:
        x: images [N, Cin, H, W] for a stack with a stem, else activations [N, C, H, W]; the dtype it was packed for.
        packed: from :func:`pack`, on this machine.
        pool: return the mean over the pixels.
        head: [classes, C] in x's dtype, multiplied with the mean, which stays in float32; with ``pool`` alone.
        head_bias: [classes], added to that.

    Returns:
        [N, C, H // p, W // q], or [N, C] with ``pool``, or [N, classes], in x's dtype; channels_last if x is.
    """
    check_activations(x)
    if x.shape[1] != packed.in_channels:
        raise ValueError(
            f"x: got {x.shape[1]} channels, wanted {packed.in_channels}, which the weights were packed for"
        )
    backend = backends.select("block_stack", x, packed.act, quiet=True) if profiler._is_profiler_enabled else ""
    arguments = (packed.tensors, packed.channels, packed.patch, packed.kernel, packed.act, pool, head, head_bias)
    return profiling.call(_compiled, "block_stack", backend, x, *arguments)


class PackedCache:
    """The packed form of some parameters, made again when one of them, or the key, has changed.

    Identity is (address, version, strides): every in-place operation that PyTorch counts is seen, and another view of
    the same memory. It counts neither writes through ``.data`` nor the steps of optimizers with fused=True; on the CPU
    these are seen where they change one of the values sampled at the beginning, in the middle and at the end of each
    tensor. Holding the tensors keeps an address from being given to another one meanwhile.
    """

    def __init__(self) -> None:
        self._state: tuple[Any, ...] | None = None

    def get(self, tensors: Sequence[Tensor], key: Hashable, build: Callable[[], Any]) -> Any:
        """``build()``, or what it returned last time; RuntimeError if a tensor comes from torch.inference_mode()."""
        now = (key, registry.packing(), places(tensors), list(map(_version, tensors)))
        state = self._state
        if state is None or state[0] != now or not state[1].unchanged():
            samples = registry.C.Samples([place for tensor in tensors for place in _places(tensor)])
            self._state = state = (now, samples, [t.detach() for t in tensors], build())
        return state[3]

    def clear(self) -> None:
        self._state = None

    def __deepcopy__(self, memo: Any) -> "PackedCache":
        return type(self)()

    def __reduce__(self) -> tuple[Any, tuple[()]]:
        return type(self), ()


def places(tensors: Sequence[Tensor]) -> tuple[Any, list[int]]:
    """Strides and addresses: another view of the same memory is another place."""
    contiguous = all(map(Tensor.is_contiguous, tensors))
    return None if contiguous else list(map(Tensor.stride, tensors)), list(map(Tensor.data_ptr, tensors))


_version = attrgetter("_version")
_SAMPLE = _LINE = 64  # bytes


def _places(tensor: Tensor) -> list[tuple[int, int]]:
    """Addresses and bytes of samples of a tensor: its first, and if it is contiguous some of the middle and the end."""
    size = tensor.numel() * tensor.element_size() if tensor.is_contiguous() else tensor.element_size()
    if tensor.device.type != "cpu" or tensor.numel() == 0:
        return []
    last = max(size - _SAMPLE, 0)
    at = sorted({0, min(size // 2, last), last})
    return [(tensor.data_ptr() + offset, min(size, _SAMPLE)) for offset in at]
