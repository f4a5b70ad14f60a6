"""A stem and a run of blocks as one call takes them: what is in the way of that, whether it trains, and training."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from cmx_kernels import backends
from cmx_kernels.activations import name_of
from cmx_kernels.models import training
from cmx_kernels.models.structure import Unit
from cmx_kernels.ops import block_stack
from cmx_kernels.ops.batchnorm import uses_batch
from cmx_kernels.ops.checks import autocast


class Parts(NamedTuple):
    """What a fused module runs in one call.

    bypassed: the modules besides the units' whose forward is replaced.
    pool: an average pool follows.
    span: in an nn.Sequential, the first child that is replaced and the next that is not.
    stem_refusal: why the three modules before them, which are a stem, are none of ``stem``.
    """

    stem: Unit | None
    blocks: Sequence[tuple[Unit, Unit]] = ()
    bypassed: Sequence[nn.Module] = ()
    pool: bool = False
    span: tuple[int, int] = (0, 0)
    stem_refusal: str | None = None


class Units:
    """Units that run one after the other, for one owner. torch.compile traces this class: it remembers nothing."""

    def __init__(self, owner: nn.Module, parts: Parts) -> None:
        self.stem, self.blocks, _, self.pool, self.span, self.stem_refusal = parts
        self.recompute: bool = getattr(owner, "recompute_depthwise", False)
        self.units = ([self.stem] if self.stem else []) + [unit for block in self.blocks for unit in block]
        kernel = self.blocks[0][0].conv.kernel_size if self.blocks else ()
        self.size = (len(self.blocks), self.units[0].conv.out_channels, *kernel)  # by which tune() knows it
        self.act = name_of(self.units[0].act) or ""
        self.why_not = self._why_not_one_call()

    def all_tensors(self) -> list[Tensor]:
        """All parameters and running statistics, wherever they are now."""
        found = []
        for conv, _, norm in self.units:
            found += [conv.weight, conv.bias, norm.weight, norm.bias, norm.running_mean, norm.running_var]
        return [t for t in found if t is not None]

    def obstacle(self, x: Tensor, trains: bool) -> str | None:
        """A sentence if ``x``, in the dtype of autocast, cannot pass all units in one call."""
        reason = self.mismatch(x)
        if reason is not None:
            return reason
        return training.why_not(x, self.act) if trains else block_stack.why_not(x, self.act, self.size)

    def mismatch(self, x: Tensor) -> str | None:
        if self.why_not is not None:
            return self.why_not
        conv, size = self.units[0].conv, self.patch()
        if x.dim() != 4 or x.shape[1] != conv.in_channels or x.shape[2] < size[0] or x.shape[3] < size[1]:
            return f"x has shape {list(x.shape)}, wanted [N, {conv.in_channels}, {size[0]} or more, {size[1]} or more]"
        return None

    def patch(self) -> tuple[int, ...]:
        return self.stem.conv.kernel_size if self.stem else (1, 1)

    def batch_decides(self) -> bool:
        """Whether a BatchNorm normalises with the statistics of its batch."""
        return any(uses_batch(unit.norm) for unit in self.units)

    def trains(self, x: Tensor, tensors: Sequence[Tensor]) -> bool:
        """Whether this call needs a gradient or the statistics of its batch."""
        if self.batch_decides():
            return True
        return torch.is_grad_enabled() and (x.requires_grad or any(t.requires_grad for t in tensors))

    def run(
        self, x: Tensor, tensors: Sequence[Tensor], pool: bool = False, head: nn.Module | None = None
    ) -> Tensor | None:
        """All units in one call; None where their operators have to be called one by one, as a graph's inference does.

        x: [N, Cin, H, W] -> [N, C, H', W'], or [N, C] with ``pool``, or what ``head`` makes of that; the dtype of
        autocast, if that is on.
        """
        (x,) = autocast(x)
        if backends.exporting() or not self.trains(x, tensors) or self.obstacle(x, True) is not None:
            return None
        y = self.train(x, pool)
        return y if y is None or head is None else head(y)

    def train(self, x: Tensor, pool: bool) -> Tensor | None:
        return training.run(self.stem, self.blocks, x, self.act, self.recompute, pool)

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
