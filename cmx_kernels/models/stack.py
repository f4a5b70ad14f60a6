"""The fused form of a stem and a run of blocks, and what must not have changed since it was made for it to be used."""

import copy
from collections.abc import Callable, Iterable, Sequence
from itertools import repeat
from operator import contains, itemgetter
from typing import Any

import torch
from torch import Tensor, nn

from cmx_kernels import backends
from cmx_kernels.activations import name_of
from cmx_kernels.models import training
from cmx_kernels.models.obstacles import HOOKS, PLAIN, check_bypass, methods
from cmx_kernels.models.parameters import Parameters
from cmx_kernels.models.structure import Refusal, Unit
from cmx_kernels.ops import block_stack, depth_first
from cmx_kernels.ops.block_stack import PackedCache, PackedStack
from cmx_kernels.ops.checks import autocast, memory_format

STATE = "_cmx"  # the one entry a fused module has in its __dict__
_statistics = itemgetter("running_mean", "running_var")
_LEAVES = frozenset((nn.ReLU, nn.Identity))
_SETTINGS: dict[type, tuple[str, ...]] = {
    nn.Conv2d: ("stride", "padding", "dilation", "groups", "padding_mode"),
    nn.BatchNorm2d: ("eps",),  # and its mode, which is asked for in every call
    nn.SyncBatchNorm: ("eps",),
    nn.GELU: ("approximate",),
    nn.AdaptiveAvgPool2d: ("output_size",),
    nn.Flatten: ("start_dim", "end_dim"),
}


class Stack:
    """Units that run one after the other, for one owner, with the packed form of their parameters."""

    def __init__(
        self,
        owner: nn.Module,
        stem: Unit | None,
        blocks: Sequence[tuple[Unit, Unit]],
        bypassed: Iterable[nn.Module],
        pool: bool = False,
        span: tuple[int, int] = (0, 0),
    ) -> None:
        """
        bypassed: the modules besides the units' whose forward is replaced.
        pool: an average pool follows.
        span: in an nn.Sequential, the first child that is replaced and the next that is not.
        """
        self.children = dict(owner._modules)
        self.settings = _settings(owner)
        self.recompute, self.micro_batch = self.settings
        if self.micro_batch is not None and (not isinstance(self.micro_batch, int) or self.micro_batch < 0):
            raise ValueError(f"micro_batch: got {self.micro_batch!r}, wanted a number of images, 0 for all, or None")
        self.stem, self.blocks, self.pool, self.span = stem, list(blocks), pool, span
        self.units = ([stem] if stem else []) + [unit for block in blocks for unit in block]
        kernel = self.blocks[0][0].conv.kernel_size if self.blocks else ()
        self.size = (len(self.blocks), self.units[0].conv.out_channels, *kernel)  # by which tune() knows it
        self.act = name_of(self.units[0].act) or ""
        self.why_not = self._why_not_one_call()
        for module in bypassed:
            check_bypass(module)
        self.watched = _watch([*bypassed, *(module for unit in self.units for module in unit)])
        convs = [unit.conv for unit in self.units]
        self.shapes = [(c.out_channels, c.in_channels // c.groups, *c.kernel_size) for c in convs]
        self.stores = [(unit.conv.__dict__, unit.norm.__dict__) for unit in self.units]
        norms = [unit.norm for unit in self.units]
        self.always_batch = any(norm.running_mean is None or norm.running_var is None for norm in norms)
        self.count = len(self._tensors())
        self.cache = PackedCache()

    def tensors(self, owner: nn.Module) -> list[Tensor] | None:
        """Parameters and running statistics; None unless the modules are still the same, plain and in the same mode."""
        if owner.__dict__["_modules"] != self.children or _settings(owner) != self.settings:
            return None
        for modules, kinds, states, replaceable, read, expected in self.watched:
            if list(map(type, modules)) != kinds or list(map(read, states)) != expected:
                return None
            if any(any(map(contains, states, repeat(name))) for name in replaceable):
                return None
        try:
            tensors = self._tensors()
        except KeyError:  # a buffer that is none any more
            return None
        return tensors if len(tensors) == self.count and PLAIN.issuperset(map(type, tensors)) else None

    def _tensors(self) -> list[Tensor]:
        """All parameters and running statistics, wherever they are now."""
        found: list[Any] = []
        for conv, norm in self.stores:
            found += conv["_parameters"].values()
            found += norm["_parameters"].values()
            found += _statistics(norm["_buffers"])
        return found if PLAIN.issuperset(map(type, found)) else [t for t in found if t is not None]

    def obstacle(self, x: Tensor, trains: bool) -> str | None:
        """A sentence if ``x``, in the dtype of autocast, cannot pass the whole stack in one call."""
        reason = self._mismatch(x)
        if reason is not None:
            return reason
        return training.why_not(x, self.act) if trains else block_stack.why_not(x, self.act, self.size)

    def _mismatch(self, x: Tensor) -> str | None:
        if self.why_not is not None:
            return self.why_not
        conv, size = self.units[0].conv, self._patch()
        if x.dim() != 4 or x.shape[1] != conv.in_channels or x.shape[2] < size[0] or x.shape[3] < size[1]:
            return f"x has shape {list(x.shape)}, wanted [N, {conv.in_channels}, {size[0]} or more, {size[1]} or more]"
        return None

    def _patch(self) -> tuple[int, ...]:
        return self.stem.conv.kernel_size if self.stem else (1, 1)

    def trains(self, x: Tensor, tensors: Sequence[Tensor]) -> bool:
        """Whether this call needs a gradient or the statistics of its batch."""
        if self.always_batch or any(norm["training"] for _, norm in self.stores):
            return True
        return torch.is_grad_enabled() and (x.requires_grad or any(t.requires_grad for t in tensors))

    def run(self, x: Tensor, tensors: Sequence[Tensor], pool: bool = False) -> Tensor | None:
        """The whole stack in one call; None where its operators have to be called one by one.

        x: [N, Cin, H, W] -> [N, C, H', W'], or [N, C] with ``pool``; the dtype of autocast, if that is on.
        """
        (x,) = autocast(x)
        trains = self.trains(x, tensors)
        if self.obstacle(x, trains) is not None:
            y = None if trains else self._depth_first(x)
            return nn.functional.adaptive_avg_pool2d(y, 1).flatten(1) if pool and y is not None else y
        if trains:
            return training.run(self.stem, self.blocks, x, self.act, self.recompute, pool)
        mixed = torch.is_autocast_enabled(x.device.type)
        # Strides, because a transposed view may have the address and the version of what it shows
        key = (x.dtype, mixed, [conv["_parameters"]["weight"].stride() for conv, _ in self.stores])
        try:
            packed = self.cache.get(tensors, key, lambda: self._pack(x, mixed))
        except RuntimeError:
            if not any(t.is_inference() for t in tensors):
                raise
            backends.say_once(
                "the parameters were made under torch.inference_mode(), where changes cannot be followed: "
                "weights are packed again in every call. Build the model outside of it"
            )
            packed = self._pack(x, mixed)
        return None if packed is None else block_stack.block_stack(x, packed, pool)

    def micro_batch_of(self, x: Tensor) -> tuple[int, Tensor] | None:
        """Images that pass all blocks together, and a tensor for the results; None where blocks run one by one."""
        if not (x.is_cuda or self.micro_batch) or len(self.blocks) < 2 or self._mismatch(x) is not None:
            return None
        p, q = self._patch()
        shape = (x.shape[0], self.size[1], x.shape[2] // p, x.shape[3] // q)
        y = torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=memory_format(x))
        if self.micro_batch is None:
            return depth_first.images(y, len(self.blocks), self.size[2:], self.act), y
        return min(self.micro_batch or len(x), len(x)), y

    @torch.no_grad()
    def _depth_first(self, x: Tensor) -> Tensor | None:
        found = self.micro_batch_of(x)
        if found is None:
            return None
        ops = (*(("patch_embed",) if self.stem else ()), "depthwise_block", "pointwise_block")
        kernels = depth_first.kernels(x, found[1], dict(zip(ops, self.shapes, strict=False)), self.act)
        if kernels is None:
            return None
        now = Parameters(self.stores)
        if not now.fit(self.shapes, x, torch.is_autocast_enabled(x.device.type)):
            return None
        return depth_first.run(x, *found, kernels, self.act, *now.layers(x.dtype, bool(self.stem)))

    @torch.no_grad()
    def _pack(self, x: Tensor, mixed: bool) -> PackedStack | None:
        now = Parameters(self.stores)
        if not now.fit(self.shapes, x, mixed):
            return None
        return block_stack.pack(*now.layers(x.dtype, bool(self.stem)), self.act, x.dtype)

    def _why_not_one_call(self) -> str | None:
        """A stack has one width, one kernel size and one activation."""
        width = self.units[0].conv.out_channels
        convs = [conv for block in self.blocks for conv in (block[0].conv, block[1].conv)]
        if any((conv.in_channels, conv.out_channels) != (width, width) for conv in convs):
            return "its blocks differ in width"
        if len({conv.kernel_size for conv in convs[::2]}) > 1:
            return "its blocks differ in kernel size"
        acts = {name_of(unit.act) for unit in self.units}
        return "its blocks differ in activation" if len(acts) > 1 else None

    def __reduce__(self) -> tuple[Any, ...]:
        return type(None), ()  # a copy of the owner makes its own


def _settings(owner: nn.Module) -> tuple[bool, int | None]:
    return getattr(owner, "recompute_depthwise", False), getattr(owner, "micro_batch", None)


def current(owner: nn.Module, build: Callable[[], Stack]) -> tuple[Stack, list[Tensor]]:
    """The owner's stack and its tensors, built again if it does not fit any more; Refusal where there can be none."""
    stack: Stack | None = owner.__dict__.get(STATE)
    tensors = None if stack is None else stack.tensors(owner)
    if stack is None or tensors is None:
        stack = owner.__dict__[STATE] = build()
        tensors = stack.tensors(owner)
        if tensors is None:
            raise Refusal("its modules changed meanwhile")
    return stack, tensors


def _watch(modules: Iterable[nn.Module]) -> list[tuple[Any, ...]]:
    """For each class: the modules, their classes, their __dict__, methods, a reader of the __dict__, what it reads."""
    kinds: dict[type, list[nn.Module]] = {}
    for module in modules:
        kinds.setdefault(type(module), []).append(module)
    watched = []
    for kind, alike in kinds.items():
        names = (*HOOKS, *_SETTINGS.get(kind, () if kind in _LEAVES else ("_modules",)))
        states = [module.__dict__ for module in alike]
        expected = [tuple({} if n in HOOKS else copy.copy(state[n]) for n in names) for state in states]
        watched.append((alike, [kind] * len(alike), states, methods(kind), itemgetter(*names), expected))
    return watched
