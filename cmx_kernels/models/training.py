"""A stem and blocks with gradients and batch statistics: one autograd node a block, which keeps two pre-activations."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

from cmx_kernels import backends
from cmx_kernels.models.structure import Unit, why_not_size
from cmx_kernels.ops import batchnorm, depth_first
from cmx_kernels.ops.batchnorm import BatchNorm
from cmx_kernels.ops.checks import autocast, autocast_is_on, memory_format
from cmx_kernels.ops.differentiable import Block, Pooled, Value
from cmx_kernels.ops.differentiable import Unit as UnitFunction
from cmx_kernels.ops.training_forms import patches_backward, patches_forward

# In torch 2.11 a graph loses the gradients of autograd functions, without a word
TRACEABLE = tuple(map(int, torch.__version__.split(".")[:2])) >= (2, 13)
OPS = ("patch_embed_train", "depthwise_block_train", "pointwise_block_train")


def why_not(x: Tensor, act: str) -> str | None:
    """A sentence if no backend has the operators of training for ``x``, in the dtype of autocast."""
    if x.numel() == 0:
        return "the batch is empty"
    if torch.compiler.is_compiling():
        if not TRACEABLE:
            return f"torch.compile of torch {torch.__version__} cannot trace training, that of 2.13 can"
    elif torch.is_inference(x):
        return "x comes from torch.inference_mode()"
    if all(backends.has_kernel(op, x, act, quiet=True) for op in OPS):
        return None
    return f"no backend trains on {x.device.type} in {x.dtype}"


def run(
    stem: Unit | None, blocks: Sequence[tuple[Unit, Unit]], x: Tensor, act: str, recompute: bool, pool: bool
) -> Tensor | None:
    """[N, Cin, H, W] -> [N, C, H', W'], or [N, C] with ``pool``, in the dtype of autocast.

    None where dtypes or sizes do not fit, as the modules would refuse.
    Running statistics are updated as nn.BatchNorm2d updates them.
    """
    mixed = autocast_is_on(x) and x.dtype != torch.float64  # the operators take a weight in the dtype of x
    (x,) = autocast(x)
    units = ([stem] if stem else []) + [unit for block in blocks for unit in block]
    for conv, _, _ in units:
        weight = conv.weight
        fits = weight.dtype == x.dtype or (mixed and weight.is_floating_point())
        if not fits or weight.device != x.device or why_not_size(conv) is not None:
            return None
    layout = memory_format(x)
    if x.device.type == "cpu":
        x = x.contiguous(memory_format=torch.channels_last)  # the CPU kernels read vectors of channels
    x = depth_first.laid_out(x, depth_first.layout(x, act, len(blocks), "depthwise_block_train"))
    run_block = Block.apply
    if recompute and torch.compiler.is_compiling():
        run_block, recompute = _recomputed_block, False
    with torch.autocast(x.device.type, enabled=False):
        updates: list[tuple[BatchNorm, Tensor]] = []
        rows: Tensor | None = None
        moments: Tensor | None = None
        if stem:
            backend = backends.select("patch_embed_train", x, act, quiet=True)
            forward = partial(patches_forward, act=act, backend=backend)
            backward = partial(patches_backward, act=act, backend=backend)
            x, rows, moments = UnitFunction.apply(forward, backward, x, *_parameters(stem), _norm(stem))
            updates.append((stem.norm, moments))
        backend = backends.select("depthwise_block_train", x, act, quiet=True)
        for one, two in blocks:
            how = (_norm(one), _norm(two), act, backend, recompute)
            x, rows, moments, inner = run_block(x, rows, moments, *_parameters(one), *_parameters(two), *how)
            updates += [(one.norm, inner), (two.norm, moments)]
        y = (Pooled if pool else Value).apply(x, rows, moments, act)
        batchnorm.update_running(updates)
    return y if pool else y.contiguous(memory_format=layout)


_KEPT = partial(
    create_selective_checkpoint_contexts,
    [torch.ops.cmx.pointwise_block_train.default, torch.ops.cmx.batchnorm_rows.default],
)


def _recomputed_block(*args: Any) -> Any:
    """Block.apply without the depthwise pre-activation, in a graph: its compiler keeps it unless it is told so."""
    return checkpoint(Block.apply, *args, use_reentrant=False, context_fn=_KEPT)


def _parameters(unit: Unit) -> tuple[Any, ...]:
    return unit.conv.weight, unit.conv.bias, unit.norm.weight, unit.norm.bias


def _norm(unit: Unit) -> batchnorm.Norm:
    return batchnorm.norm_of(unit.norm)


def recomputed(block: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """``block(x)`` whose activations are computed again in backward, without touching running statistics again."""
    if torch.compiler.is_compiling():  # the compiler recomputes only what has no effects
        return checkpoint(block, x, use_reentrant=False)
    return checkpoint(block, x, use_reentrant=False, context_fn=lambda: (nullcontext(), _statistics_kept(block)))


@contextmanager
def _statistics_kept(block: Any) -> Iterator[None]:
    """Inside, BatchNorm counts into copies of its running statistics."""
    kept = [(module._buffers, dict(module._buffers)) for module in block.modules() if module._buffers]
    for buffers, values in kept:
        buffers.update({name: None if value is None else value.clone() for name, value in values.items()})
    try:
        yield
    finally:
        for buffers, values in kept:
            buffers.update(values)
