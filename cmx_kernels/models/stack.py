"""The fused form of a stem and a run of blocks, and what must not have changed since it was made for it to be used."""

from collections.abc import Sequence
from operator import itemgetter
from typing import Any

import torch
from torch import Tensor, nn

from cmx_kernels import backends, registry
from cmx_kernels.models.obstacles import PLAIN, bypassable
from cmx_kernels.models.parameters import Parameters
from cmx_kernels.models.structure import Refusal
from cmx_kernels.models.units import Parts, Units
from cmx_kernels.models.watch import Watch
from cmx_kernels.ops import block_stack, depth_first
from cmx_kernels.ops.block_stack import PackedCache, PackedStack, places
from cmx_kernels.ops.checks import autocast, memory_format

STATE = "_cmx"  # the one entry a fused module has in its __dict__
_STATISTICS = ("running_mean", "running_var")
_statistics = itemgetter(*_STATISTICS)


class Stack(Units):
    """Units outside of a graph: what they were when it was made, and the packed form of their parameters."""

    def __init__(self, owner: nn.Module, parts: Parts) -> None:
        super().__init__(owner, parts)
        self.children = dict(owner._modules)
        self.settings = _settings(owner)
        _, self.micro_batch = self.settings
        if self.micro_batch is not None and (not isinstance(self.micro_batch, int) or self.micro_batch < 0):
            raise ValueError(f"micro_batch: got {self.micro_batch!r}, wanted a number of images, 0 for all, or None")
        self.watched = Watch([*parts.bypassed, *(module for unit in self.units for module in unit)])
        convs = [unit.conv for unit in self.units]
        self.shapes = [(c.out_channels, c.in_channels // c.groups, *c.kernel_size) for c in convs]
        self.stores = [(unit.conv.__dict__, unit.norm.__dict__) for unit in self.units]
        norms = [unit.norm for unit in self.units]
        self.always_batch = any(norm.running_mean is None or norm.running_var is None for norm in norms)
        self.held = self._hold()
        self.count = len(self.held[0])
        self.cache = PackedCache()
        self.found: tuple[Any, Parameters | None, Any] | None = None  # by _parameters
        self.lines = _lines([self.watched, self.held[1]], self.held[0])

    def tensors(self, owner: nn.Module) -> list[Tensor] | None:
        """Parameters and running statistics; None unless the modules are still the same, plain and in the same mode."""
        if self.lines is not None:
            self.lines.fetch()
        if owner.__dict__["_modules"] != self.children or _settings(owner) != self.settings:
            return None
        if not self.watched.unchanged():
            return None
        held = self.held  # read once: other threads may write it
        if not held[1].unchanged():
            try:
                self.held = held = self._hold()
            except KeyError:  # a parameter or a buffer that is none any more
                return None
        tensors = held[0]
        return tensors if len(tensors) == self.count and PLAIN.issuperset(map(type, tensors)) else None

    def _hold(self) -> tuple[list[Tensor], Watch]:
        """The tensors, and where they were found."""
        places: list[tuple[dict[str, Any], str, tuple[str, ...] | None]] = []
        for conv, norm in self.stores:
            places += [(conv, "_parameters", None), (norm, "_parameters", None), (norm, "_buffers", _STATISTICS)]
        return self.all_tensors(), Watch(dictionaries=places)

    def all_tensors(self) -> list[Tensor]:
        found: list[Any] = []
        for conv, norm in self.stores:
            found += conv["_parameters"].values()
            found += norm["_parameters"].values()
            found += _statistics(norm["_buffers"])
        return found if PLAIN.issuperset(map(type, found)) else [t for t in found if t is not None]

    def batch_decides(self) -> bool:
        return self.always_batch or any(norm["training"] for _, norm in self.stores)

    def run(
        self, x: Tensor, tensors: Sequence[Tensor], pool: bool = False, head: nn.Module | None = None
    ) -> Tensor | None:
        """The whole stack in one call; None where its operators have to be called one by one.

        x: [N, Cin, H, W] -> [N, C, H', W'], or [N, C] with ``pool``, or what ``head``, which is called on that or is
        part of the call, makes of it; the dtype of autocast, if that is on.
        """
        (x,) = autocast(x)
        trains = self.trains(x, tensors)
        if self.obstacle(x, trains) is not None:
            y = None if trains else self._depth_first(x, tensors)
            if y is not None and pool:
                y = nn.functional.adaptive_avg_pool2d(y, 1).flatten(1)
            elif y is not None:
                y = depth_first.laid_out(y, memory_format(x))
        elif trains:
            y = self.train(x, pool)
        else:
            linear = None if head is None else linear_of(head, x)
            y, head = self._whole(x, tensors, pool, *(linear or ())), None if linear else head
        return y if y is None or head is None else head(y)

    def _whole(self, x: Tensor, tensors: Sequence[Tensor], pool: bool, *head: Tensor | None) -> Tensor | None:
        mixed = torch.is_autocast_enabled(x.device.type)
        key = (x.dtype, mixed)
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
        return None if packed is None else block_stack.block_stack(x, packed, pool, *head)

    def layout(self, x: Tensor) -> torch.memory_format:
        """In which its operators run one by one."""
        return depth_first.layout(x, self.act, len(self.blocks))

    def micro_batch_of(self, x: Tensor) -> tuple[int, Tensor] | None:
        """Images that pass all blocks together, and a tensor for the results; None where blocks run one by one."""
        if not (x.is_cuda or self.micro_batch) or len(self.blocks) < 2 or self.mismatch(x) is not None:
            return None
        p, q = self.patch()
        shape = (x.shape[0], self.size[1], x.shape[2] // p, x.shape[3] // q)
        y = torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=self.layout(x))
        if self.micro_batch is None:
            return depth_first.images(y, len(self.blocks), self.size[2:], self.act), y
        return min(self.micro_batch or len(x), len(x)), y

    @torch.no_grad()
    def _depth_first(self, x: Tensor, tensors: Sequence[Tensor]) -> Tensor | None:
        found = self.micro_batch_of(x)
        if found is None:
            return None
        ops = (*(("patch_embed",) if self.stem else ()), "depthwise_block", "pointwise_block")
        m, y = found
        x = depth_first.laid_out(x, self.layout(x))
        chosen = depth_first.backends_of(x, y, dict(zip(ops, self.shapes, strict=False)), self.act)
        now = None if chosen is None else self._parameters(x, tensors)
        if chosen is None or now is None:
            return None
        rows = now.rows() if depth_first.in_one_call(chosen) else None
        if rows is not None:
            y.untyped_storage().resize_(0)  # the call makes its own
            return depth_first.run_blocks(x, *rows, m, self.act, bool(self.stem))
        kernels = depth_first.kernels(chosen)
        return depth_first.run(x, m, y, kernels, self.act, *now.layers(x.dtype, bool(self.stem)))

    def _parameters(self, x: Tensor, tensors: Sequence[Tensor]) -> Parameters | None:
        """Those for ``x``, looked up again when one is another tensor or elsewhere; None where they do not fit."""
        mixed = torch.is_autocast_enabled(x.device.type)
        state = (x.dtype, x.device, mixed, list(map(id, tensors)), places(tensors))
        found = self.found  # read once: other threads may write it
        if found is None or found[0] != state:
            now = Parameters(self.stores)
            fit = now.fit(self.shapes, x, mixed)
            if fit:
                now.prepare(x.dtype)
            # held, so that neither an identity nor an address is given to another one
            self.found = found = state, now if fit else None, [(t, t.detach()) for t in tensors]
        return found[1]

    @torch.no_grad()
    def _pack(self, x: Tensor, mixed: bool) -> PackedStack | None:
        now = Parameters(self.stores)
        if not now.fit(self.shapes, x, mixed):
            return None
        return block_stack.pack(*now.layers(x.dtype, bool(self.stem)), self.act, x.dtype)

    def __reduce__(self) -> tuple[Any, ...]:
        return type(None), ()  # a copy of the owner makes its own


def linear_of(head: nn.Module, x: Tensor) -> tuple[Tensor, Tensor | None] | None:
    """Weight and bias of a last layer that can join the call on ``x``; None where it has to be called."""
    if type(head) is not nn.Linear or not bypassable(head):
        return None
    found = [t for t in head._parameters.values() if t is not None]
    if not PLAIN.issuperset(map(type, found)) or any(t.dtype != x.dtype or t.device != x.device for t in found):
        return None
    wanted = torch.is_grad_enabled() and any(t.requires_grad for t in found)
    return None if wanted or not head.weight.is_contiguous() else (head.weight, head.bias)


def _settings(owner: nn.Module) -> tuple[bool, int | None]:
    return getattr(owner, "recompute_depthwise", False), getattr(owner, "micro_batch", None)


def current(owner: Any) -> tuple[Units, list[Tensor]]:
    """The owner's stack and its tensors, built again if it does not fit any more; Refusal where there can be none."""
    if torch.compiler.is_compiling():  # a graph is traced once, and has guards
        units = Units(owner, owner.parts())
        return units, units.all_tensors()
    stack: Stack | None = owner.__dict__.get(STATE)
    if stack is not None and stack.stem_refusal is not None and owner.stem_before(stack.span[0])[0] is not None:
        stack = None  # what stood against the stem is gone
    tensors = None if stack is None else stack.tensors(owner)
    if stack is None or tensors is None:
        stack = owner.__dict__[STATE] = Stack(owner, owner.parts())
        tensors = stack.tensors(owner)
        if tensors is None:
            raise Refusal("its modules changed meanwhile")
    return stack, tensors


def _lines(watches: Sequence[Watch], tensors: Sequence[Tensor]) -> Any:
    """Where a call's checks look: behind a network, which has filled the caches, that is a third of their time."""
    if registry.C is None:
        return None
    objects = {id(thing): thing for watch in watches for thing in watch.read()}
    # at::TensorImpl and c10::StorageImpl, as far as data_ptr() and _version read them
    structures = [(tensor._cdata, 256) for tensor in tensors]
    structures += [(tensor.untyped_storage()._cdata, 128) for tensor in tensors if tensor.device.type == "cpu"]
    return registry.C.Lines(list(objects.values()), structures)
