"""The fused forms of modules: the same children under the same names, another forward.

A module becomes fused when its __class__ is set, and plain again when it is set back; nothing else changes. Its forward
asks again in every call whether everything is still as it was, and else runs the plain one.
"""

import contextlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from cmx_kernels import backends, ops
from cmx_kernels.activations import name_of
from cmx_kernels.models.obstacles import check_bypass, check_call, check_unit, plain_is_wanted
from cmx_kernels.models.stack import STATE, Stack, current
from cmx_kernels.models.structure import (
    BlockParts,
    Refusal,
    Unit,
    block_parts,
    children,
    stem_unit,
    why_not_one_operator,
    why_not_size,
)
from cmx_kernels.models.units import Parts, Units
from cmx_kernels.ops.batchnorm import fold
from cmx_kernels.ops.checks import autocast, check_activations
from cmx_kernels.ops.depthwise_block import check as check_depthwise
from cmx_kernels.ops.kept_weights import for_autocast, forget_moved
from cmx_kernels.ops.patch_embed import check as check_patches
from cmx_kernels.ops.pointwise_block import check as check_pointwise


class Fused(nn.Module):
    """What all fused classes share: nothing in the state dict, and packed weights are dropped when parameters move."""

    recompute_depthwise = False  # in backward, compute depthwise convolutions again: half the memory of activations
    micro_batch: int | None = None  # images that pass all blocks together on a GPU; 0: all; None: the cost model's

    def parts(self) -> Parts:
        """Refusal, with the reason, where no call can replace those of the modules."""
        raise NotImplementedError

    def stack(self) -> Stack:
        return Stack(self, self.parts())

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        self.__dict__.pop(STATE, None)
        found = super()._apply(fn, recurse)
        forget_moved(self.parameters())
        return found


class Stem(Fused, nn.Sequential):
    """nn.Sequential(conv, act, bn): images [N, Cin, H, W] -> [N, C, H // p, W // q]."""

    def forward(self, x: Tensor) -> Tensor:
        if torch.jit.is_scripting():
            for module in self:
                x = module(x)
            return x
        else:  # noqa: RET505 (TorchScript skips what stands in an else)
            return self._fused(x)

    def _fused(self, x: Tensor) -> Tensor:
        if plain_is_wanted(x):
            return nn.Sequential.forward(self, x)
        check_activations(x)
        try:
            check_call(x)
            stack, tensors = current(self)
            y = stack.run(x, tensors)
            if y is not None:
                return y
            check_folds(x, stack, "patch_embed")
        except Refusal as reason:
            backends.fall_back("part of the model", reason.args[0])
            return nn.Sequential.forward(self, x)
        return run_unit("patch_embed", stack.units[0], x)

    def checked_unit(self) -> Unit:
        unit = stem_unit(children(self))
        check_unit(unit)
        return unit

    def parts(self) -> Parts:
        return Parts(self.checked_unit())


class Block(Fused, nn.Sequential):
    """nn.Sequential(x + Sequential(depthwise conv, act, bn), conv 1x1, act, bn): [N, C, H, W] -> [N, C, H, W]."""

    def forward(self, x: Tensor) -> Tensor:
        if torch.jit.is_scripting():
            for module in self:
                x = module(x)
            return x
        else:  # noqa: RET505
            return self._fused(x)

    def _fused(self, x: Tensor) -> Tensor:
        if plain_is_wanted(x):
            return nn.Sequential.forward(self, x)
        check_activations(x)
        try:
            check_call(x)
            stack, tensors = current(self)
            y = stack.run(x, tensors)
            if y is not None:
                return y
            check_folds(x, stack, "depthwise_block", "pointwise_block")
        except Refusal as reason:
            backends.fall_back("part of the model", reason.args[0])
            return nn.Sequential.forward(self, x)
        depthwise, pointwise = stack.units
        x = run_unit("depthwise_block", depthwise, x, residual=children(self)[0])
        return run_unit("pointwise_block", pointwise, x)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        with contextlib.suppress(Refusal):
            block_parts(self)  # looks at the class of the residual now: torch.compile cannot

    def checked_parts(self) -> BlockParts:
        parts = block_parts(self)
        for module in parts.wrappers:
            check_bypass(module)
        check_unit(parts.depthwise)
        check_unit(parts.pointwise)
        return parts

    def parts(self) -> Parts:
        found = self.checked_parts()
        return Parts(None, [(found.depthwise, found.pointwise)], found.wrappers)


def check_folds(x: Tensor, stack: Units, *names: str) -> None:
    """Refuse operators one by one where a BatchNorm has no scale and shift before its batch is seen.

    names: of the operators of the units.
    """
    for op, unit in zip(names, stack.units, strict=True):
        reason = why_not_one_operator(unit)
        if reason is not None:
            check_arguments(op, unit, x)
            obstacle = stack.obstacle(autocast(x)[0], True)
            raise Refusal(reason if obstacle is None else f"{reason}; {obstacle}")


_CHECKS = {"patch_embed": check_patches, "depthwise_block": check_depthwise, "pointwise_block": check_pointwise}


def check_arguments(op: str, unit: Unit, x: Tensor) -> None:
    """Name what does not go together, dtypes, devices, shapes, before modules run into it and have counted a batch."""
    if why_not_size(unit.conv) is None and not torch.compiler.is_compiling():
        given, weight = autocast(x, unit.conv.weight)
        _CHECKS[op](given, weight, None, None, None, "none")


def run_unit(op: str, unit: Unit, x: Tensor, residual: nn.Module | None = None) -> Tensor:
    """One operator on the raw parameters, differentiable and traceable; the modules where no backend takes it."""
    act = name_of(unit.act)
    assert act is not None
    if not backends.has_kernel(op, autocast(x)[0], act, weight=unit.conv.weight.shape):
        check_arguments(op, unit, x)
        return residual(x) if residual is not None else unit.norm(unit.act(unit.conv(x)))
    weight = for_autocast(x, unit.conv.weight, unit.conv.bias, unit.norm.weight, unit.norm.bias)
    return getattr(ops, op)(x, weight, unit.conv.bias, *fold(unit.norm), act)
