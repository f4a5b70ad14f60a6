"""Fused networks: the stem, all blocks and the average pool in one call, where a network has them in that order.

The class of a fused network is made for the class it had, and derives from it: isinstance, the name, pickling and
copies are those of the original.
"""

import sys
import types
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from cmx_kernels import backends, checkpoints
from cmx_kernels.models.fused import Block, Fused, Stem, run_unit
from cmx_kernels.models.obstacles import bypassable, check_bypass, check_call, check_unit, plain_is_wanted
from cmx_kernels.models.stack import current
from cmx_kernels.models.structure import Refusal, Unit, averages, children, stem_unit, why_not_one_operator
from cmx_kernels.models.training import recomputed
from cmx_kernels.models.units import Parts, Units

_FORWARDS = ("forward", "forward_features", "forward_head")
_DROPS = (nn.Dropout, nn.Identity)
_POOLS = ("cmx_kernels.models.pooling", "timm.layers.adaptive_avgmax_pool")


class FusedNetwork(Fused):
    """Mixin in front of the original class."""

    original: ClassVar[type[nn.Module]]

    def ready(self, x: Any) -> tuple[Units, list[Tensor]] | None:
        """The stack and its tensors, if fused. Reasons against it are said by the parts, which then run one by one."""
        traced = torch.compiler.is_compiling()
        if plain_is_wanted(x) or (self.checkpoints() and not traced):
            return None
        if traced and not (self.training or torch.is_grad_enabled()):
            return None  # a graph's inference runs part by part
        try:
            check_call(x)
            stack, tensors = current(self)
        except Refusal:
            return None
        if self.checkpoints():  # in a graph, of a block's pre-activations
            stack.recompute = True
        return stack, tensors

    def checkpoints(self) -> bool:
        """Whether blocks keep no activations, and so have to be called one by one outside of a graph."""
        return getattr(self, "grad_checkpointing", False) and torch.is_grad_enabled()

    def last_layer(self, stack: Units) -> nn.Module | None:
        """What is called on the pooled channels, if they reach it as they are."""
        raise NotImplementedError

    def load_state_dict(self, state_dict: Any, strict: bool = True, assign: bool = False) -> Any:
        """As nn.Module's; takes the keys of timm and of the paper, ``module.`` prefixes and training wrappers too."""
        state_dict = checkpoints.fit(state_dict, self, strict)
        return super().load_state_dict(state_dict, strict=strict, assign=assign)

    def __reduce_ex__(self, protocol: Any) -> Any:
        recipe: Any = super().__reduce_ex__(max(2, protocol))
        if recipe[0].__name__ != "__newobj__":
            return recipe  # the original class has its own way
        return _remake, (self.original, *recipe[1][1:]), *recipe[2:]


class FusedConvMixer(FusedNetwork):
    """For networks with timm's methods and the children stem, blocks, global_pool, head_drop and head."""

    if TYPE_CHECKING:  # the original's; TorchScript would take annotations of the class literally
        stem: nn.Module
        blocks: nn.Sequential
        global_pool: nn.Module
        head_drop: nn.Module
        head: nn.Module
        forward_head: Callable[[Tensor], Tensor]
        _plain_forward: Callable[[Tensor], Tensor]
        _plain_forward_features: Callable[[Tensor], Tensor]

    def forward(self, x: Tensor) -> Tensor:
        if torch.jit.is_scripting():
            return self._plain_forward(x)
        else:  # noqa: RET505 (TorchScript skips what stands in an else)
            return self._forward(x)

    def forward_features(self, x: Tensor) -> Tensor:
        if torch.jit.is_scripting():
            return self._plain_forward_features(x)
        else:  # noqa: RET505
            return self._forward_features(x)

    def _forward(self, x: Tensor) -> Tensor:
        found = None if "forward_features" in self.__dict__ else self.ready(x)
        if found is not None:
            stack, tensors = found
            head, pool = self.last_layer(stack), stack.pool and "forward_head" not in self.__dict__
            y = stack.run(x, tensors, pool, head)
            if y is not None and head is None:
                return self.head(self.head_drop(y)) if pool else self.forward_head(y)
            if y is not None:
                return y
        return self._plain_forward(x)

    def _forward_features(self, x: Tensor) -> Tensor:
        found = self.ready(x)
        y = None if found is None else found[0].run(x, found[1])
        if y is not None:
            return y
        if self.checkpoints() and not plain_is_wanted(x):
            x = self.stem(x)
            for block in self.blocks:
                x = recomputed(block, x)
            return x
        return self._plain_forward_features(x)

    def last_layer(self, stack: Units) -> nn.Module | None:
        drop = self.head_drop
        if not stack.pool or "forward_head" in self.__dict__:
            return None
        return self.head if type(drop) in _DROPS and not drop.training and bypassable(drop) else None

    def parts(self) -> Parts:
        if type(self.stem) is not Stem or not len(self.blocks):
            raise Refusal("it has no fused stem, or no blocks")
        if getattr(type(self.blocks), "forward", None) not in (nn.Sequential.forward, FusedSequence.forward):
            raise Refusal(f"its blocks are in a {type(self.blocks).__name__} with a forward of its own")
        pool = _known(type(self.global_pool), *_POOLS) and averages(children(self.global_pool))
        bypassed: list[nn.Module] = [self.stem, self.blocks]
        if pool:
            bypassed += [self.global_pool, *children(self.global_pool)]
        return _parts(self.stem.checked_unit(), self.blocks, bypassed, pool)


class FusedSequence(FusedNetwork, nn.Sequential):
    """For an nn.Sequential that holds fused blocks, perhaps with a stem before them and a pool behind, among others."""

    def forward(self, x: Tensor) -> Tensor:
        if torch.jit.is_scripting():
            for module in self:
                x = module(x)
            return x
        else:  # noqa: RET505
            return self._forward(x)

    def _forward(self, x: Tensor) -> Tensor:
        found = self.ready(x)
        if found is None:
            traced = torch.compiler.is_compiling() and not (plain_is_wanted(x) or backends.transformed())
            return self._in_turn(x) if traced else nn.Sequential.forward(self, x)
        stack, tensors = found
        if stack.stem_refusal is not None:
            backends.fall_back("the stem of the model", stack.stem_refusal)
        first, last = stack.span
        modules = children(self)
        for module in modules[:first]:
            x = module(x)
        head = self.last_layer(stack)
        y = stack.run(x, tensors, stack.pool, head)
        if y is None:
            return self._in_turn(x, first)
        for module in modules[last + (head is not None) :]:
            y = module(y)
        return y

    def last_layer(self, stack: Units) -> nn.Module | None:
        return dict(enumerate(children(self))).get(stack.span[1]) if stack.pool else None

    def _in_turn(self, x: Tensor, begin: int = 0) -> Tensor:
        """The children one by one, the three before the blocks as one operator where they are a stem."""
        modules = children(self)
        at, _ = longest_run(modules)
        stem = self.stem_before(at)[0] if at >= begin + 3 else None
        if stem is not None and why_not_one_operator(stem) is None:
            for module in modules[begin : at - 3]:
                x = module(x)
            x, begin = run_unit("patch_embed", stem, x), at
        for module in modules[begin:]:
            x = module(x)
        return x

    def stem_before(self, first: int) -> tuple[Unit | None, str | None]:
        """What the three modules before a block are as a stem, or why these, which are one, cannot run as that."""
        try:
            stem = stem_unit(children(self)[first - 3 : first])
        except Refusal:  # something else stands before the blocks
            return None, None
        try:
            check_unit(stem)
        except Refusal as reason:
            return None, reason.args[0]
        return stem, None

    def parts(self) -> Parts:
        modules = children(self)
        first, last = longest_run(modules)
        if first == last:
            raise Refusal("it holds no fused block")
        blocks = modules[first:last]
        bypassed: list[nn.Module] = []
        stem, refusal = None, None
        before = modules[first - 1] if first else None
        if isinstance(before, Stem):
            bypassed.append(before)
            stem, first = before.checked_unit(), first - 1
        elif first >= 3:
            stem, refusal = self.stem_before(first)
            first -= 3 if stem else 0
        pool = averages(modules[last : last + 2])
        if pool:
            bypassed += modules[last : last + 2]
            last += 2
        return _parts(stem, blocks, bypassed, pool, (first, last))._replace(stem_refusal=refusal)


def _parts(
    stem: Unit | None,
    blocks: Iterable[nn.Module],
    bypassed: list[nn.Module],
    pool: bool,
    span: tuple[int, int] = (0, 0),
) -> Parts:
    """bypassed: besides the blocks and what they hold"""
    units = []
    for block in blocks:
        if type(block) is not Block:
            raise Refusal(f"a block is a {type(block).__name__}")
        parts = block.checked_parts()
        units.append((parts.depthwise, parts.pointwise))
        bypassed += [block, *parts.wrappers]
    for module in bypassed:
        check_bypass(module)
    return Parts(stem, units, bypassed, pool, span)


def longest_run(modules: Sequence[nn.Module]) -> tuple[int, int]:
    """Where the most blocks in a row begin and end."""
    best = run = (0, 0)
    for i, module in enumerate(modules):
        run = (run[0], i + 1) if type(module) is Block else (i + 1, i + 1)
        if run[1] - run[0] > best[1] - best[0]:
            best = run
    return best


def _known(kind: type, *places: str) -> bool:
    """Whether ``kind`` is the class of that name in one of these modules, none of which is imported to find out."""
    return kind.__module__ in places and getattr(sys.modules[kind.__module__], kind.__name__, None) is kind


def _is_convmixer(original: type[nn.Module]) -> bool:
    """A ConvMixer, ours or timm's, or a class derived from one that computes the same."""
    for kind in original.__mro__:
        if kind.__name__ == "ConvMixer" and _known(kind, "cmx_kernels.models.convmixer", "timm.models.convmixer"):
            return all(getattr(original, name) is getattr(kind, name) for name in _FORWARDS)
    return False


_classes: dict[type[nn.Module], type[FusedNetwork]] = {}


def fused_class(original: type[nn.Module]) -> type[FusedNetwork] | None:
    """The class that a network of class ``original`` has when it is fused; None for a network that is not known."""
    if original in _classes:
        return _classes[original]
    if getattr(original, "forward", None) is nn.Sequential.forward:  # a scripted module's class has none
        mixin: type[FusedNetwork] = FusedSequence
    elif _is_convmixer(original):
        mixin = FusedConvMixer
    else:
        return None
    body: dict[str, Any] = {
        f"_plain_{name}": _renamed(getattr(original, name)) for name in _FORWARDS if hasattr(original, name)
    }
    body |= {"original": original, "__module__": original.__module__, "__qualname__": original.__qualname__}
    return _classes.setdefault(original, type(original.__name__, (mixin, original), body))


def _renamed(function: types.FunctionType) -> types.FunctionType:
    """TorchScript compiles a method under its __name__, and ``forward`` is taken."""
    copy = types.FunctionType(
        function.__code__, function.__globals__, f"_plain_{function.__name__}", closure=function.__closure__
    )
    copy.__defaults__, copy.__annotations__ = function.__defaults__, function.__annotations__
    return copy


def _remake(original: type[nn.Module], *args: Any) -> nn.Module:
    """Called by pickle and copy."""
    fused = fused_class(original)
    assert fused is not None
    return fused.__new__(fused, *args)
