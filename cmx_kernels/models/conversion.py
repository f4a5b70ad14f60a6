"""Finds what can be fused in a module tree and sets its class; and back."""

from typing import Any, NamedTuple

from torch import nn

from cmx_kernels.models.fused import Block, Fused, Stem
from cmx_kernels.models.networks import FusedConvMixer, FusedNetwork, fused_class, longest_run
from cmx_kernels.models.stack import STATE
from cmx_kernels.models.structure import Refusal, block_parts, children, looks_like_block, stem_unit


class Conversion(NamedTuple):
    fused: list[str]  # names of blocks, stems and networks; "" is the model itself
    refused: dict[str, str]  # name -> reason, for what looks as if it should fuse

    @property
    def problem(self) -> str:
        """What is refused, in a sentence for each reason; empty where nothing is."""
        names: dict[str, list[str]] = {}
        for name, reason in self.refused.items():
            names.setdefault(reason, []).append(name or "the model")
        return "; ".join(f"{_listed(parts)} not fused: {reason}" for reason, parts in names.items())


def _listed(parts: list[str]) -> str:
    return f"{parts[0]} is" if len(parts) == 1 else f"{parts[0]} and {len(parts) - 1} more are"


def convert(model: nn.Module) -> Conversion:
    """Fuse in place: blocks wherever they are, then stems and the networks around them."""
    found = Conversion([], {})
    modules = list(model.named_modules())
    for name, module in modules:
        if looks_like_block(module):
            _set_class(name, module, Block, found)
        elif isinstance(module, Block):
            found.fused.append(name)
    for name, module in modules:
        kind = None if isinstance(module, Fused) else fused_class(type(module))
        if kind is not None and _is_worth_it(name, module, kind, found):
            _become(module, kind)
        if isinstance(module, FusedNetwork):
            found.fused.append(name)
    return found


def revert(model: nn.Module) -> None:
    """Every module becomes what it was; nothing is left in its __dict__."""
    for module in model.modules():
        if isinstance(module, FusedNetwork):
            _become(module, module.original)
        elif isinstance(module, (Stem, Block)):
            if type(module) not in (Stem, Block):
                raise TypeError(
                    f"model: got a {type(module).__name__}, derived from a fused class; unfuse before wrapping"
                )
            _become(module, nn.Sequential)
        module.__dict__.pop(STATE, None)


def _is_worth_it(name: str, module: nn.Module, kind: type[FusedNetwork], found: Conversion) -> bool:
    """Whether more than one block would run in a call; fuses the stem on the way."""
    if issubclass(kind, FusedConvMixer):
        parts = module._modules
        stem, blocks = parts.get("stem"), parts.get("blocks")
        if stem is None or blocks is None or not all(isinstance(block, Block) for block in children(blocks)):
            return False
        return _fuse_stem(f"{name}.stem".lstrip("."), stem, found)
    modules = children(module)
    first, last = longest_run(modules)
    if first == last:
        return False
    before = modules[first - 1] if first else None
    if isinstance(before, (nn.Sequential, Stem)):
        return _fuse_stem(f"{name}.{first - 1}".lstrip("."), before, found) or last - first > 1
    return last - first > 1 or first >= 3


def _fuse_stem(name: str, stem: nn.Module, found: Conversion) -> bool:
    if type(stem) is nn.Sequential:
        _set_class(name, stem, Stem, found)
    elif not isinstance(stem, Stem):
        found.refused[name] = f"it is a {type(stem).__name__}, not nn.Sequential"
    return isinstance(stem, Stem)


def _become(module: nn.Module, kind: type[Any]) -> None:
    module.__class__ = kind


def _set_class(name: str, module: nn.Module, kind: type[Stem] | type[Block], found: Conversion) -> None:
    try:
        stem_unit(children(module)) if kind is Stem else block_parts(module)
    except Refusal as reason:
        found.refused[name] = str(reason)
    else:
        _become(module, kind)
        found.fused.append(name)
