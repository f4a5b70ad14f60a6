"""BatchNorm per channel, in float32 (float64 for float64): with running statistics folded to a scale and a shift, and
with the statistics of the batch, alone or over the processes of a group.

    eval       scale * a + shift           scale = gamma / sqrt(var + eps)   shift = beta - mean * scale
    training   (a - mean) * scale + beta   mean and var over N, H, W of all processes; the difference first, because
               mean * scale may be large against what is left
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from cmx_kernels import cuda
from cmx_kernels.registry import below_autograd, define

KINDS = (nn.BatchNorm2d, nn.SyncBatchNorm)
BatchNorm = nn.BatchNorm2d | nn.SyncBatchNorm


def uses_batch(bn: BatchNorm) -> bool:
    """Whether it normalises with the statistics of the batch: in training, and without running statistics always."""
    return bn.training or bn.running_mean is None or bn.running_var is None


def why_not_fold(bn: nn.Module) -> str | None:
    """A sentence if this BatchNorm uses the statistics of its batch, or is not a plain BatchNorm2d."""
    if type(bn) not in KINDS:
        return f"the normalisation is a {type(bn).__name__}, not nn.BatchNorm2d"
    if bn.training:
        return "BatchNorm is in training mode: its statistics are those of the batch"
    if bn.running_mean is None or bn.running_var is None:
        return "BatchNorm keeps no running statistics (track_running_stats=False)"
    return None


def fold(bn: BatchNorm) -> tuple[Tensor, Tensor]:
    """(scale, shift) [C] in float32 (float64 for a float64 module); differentiable in gamma and beta."""
    if bn.running_mean is None or bn.running_var is None:
        raise ValueError(
            "running_mean: got None, wanted the running statistics of a BatchNorm in eval mode; "
            "build it with track_running_stats=True, or call .train()"
        )
    return _folded((bn.running_mean, bn.running_var, bn.weight, bn.bias), bn.eps)


def _folded(vectors: Sequence[Any], eps: float) -> tuple[Tensor, Tensor]:
    mean, var, gamma, beta = vectors
    dtype = torch.float64 if var.dtype == torch.float64 else torch.float32
    scale = torch.rsqrt(var.to(dtype) + eps)
    if gamma is not None:
        scale = scale * gamma.to(dtype)
    shift = -mean.to(dtype) * scale
    if beta is not None:
        shift = shift + beta.to(dtype)
    return scale, shift


Vectors = Sequence[Tensor | None]


def fold_all(vectors: Sequence[Vectors], eps: Sequence[float]) -> list[tuple[Tensor, Tensor]]:
    """fold() of running mean, running variance, gamma and beta of several: the same bits.

    Of equal ones all at once, in ten launches on a GPU instead of six for each.
    """
    kinds = [tuple(None if v is None else (v.dtype, v.shape) for v in one) for one in vectors]
    if len(set(kinds)) > 1 or len(set(eps)) > 1:
        return [_folded(one, e) for one, e in zip(vectors, eps, strict=True)]
    columns: Any = zip(*vectors, strict=True)
    scale, shift = _folded([None if column[0] is None else torch.stack(column) for column in columns], eps[0])
    return list(zip(scale.unbind(), shift.unbind(), strict=True))


def float_rows(vectors: Vectors) -> Vectors:
    """In float32, all at once where they are equal but for their values."""
    given = [v for v in vectors if v is not None]
    if len(given) < len(vectors) or len({(v.dtype, v.shape) for v in given}) > 1:
        return [None if v is None else v.float() for v in vectors]
    return given if given[0].dtype == torch.float32 else torch.stack(given).float().unbind()


def _fold_rows_reference(vectors: Sequence[Tensor], eps: float) -> Tensor:
    """[units, 3, C] bias, scale, shift of bias, mean, var, gamma, beta of every unit."""
    biases, norms = vectors[::5], [vectors[i + 1 : i + 5] for i in range(0, len(vectors), 5)]
    rows = zip(biases, fold_all(norms, [eps] * len(norms)), strict=True)
    return torch.stack([torch.stack((bias.float(), *affine)) for bias, affine in rows])


_fold_rows = define(
    "fold_rows",
    "(Tensor[] vectors, float eps) -> Tensor",
    lambda vectors, eps: vectors[0].new_empty((len(vectors) // 5, 3, len(vectors[0])), dtype=torch.float32),
    _fold_rows_reference,
    flops=lambda vectors, eps, out_shape: 0,
).default


def alike(biases: Vectors, norms: Sequence[Vectors], eps: Sequence[float]) -> list[Tensor] | None:
    """What fold_rows takes of all units; None where they are not equal but for their values, or not on a GPU."""
    vectors = [v for bias, norm in zip(biases, norms, strict=True) for v in (bias, *norm)]
    given = [v for v in vectors if v is not None and v.dtype != torch.float64 and v.is_contiguous()]
    same = len(given) == len(vectors) and len({(v.dtype, v.shape) for v in given}) == len(set(eps)) == 1
    return given if same and _on_gpu(given[0]) else None


def fold_rows(vectors: Sequence[Tensor], eps: float) -> Tensor:
    """[units, 3, C] bias, scale and shift of vectors that are alike(), in one launch"""
    with torch.no_grad(), below_autograd():
        return _fold_rows(vectors, eps)


def constants(biases: Vectors, norms: Sequence[Vectors], eps: Sequence[float]) -> list[tuple[Tensor | None, ...]]:
    """bias, scale and shift of every unit in float32; of equal ones on a GPU in one launch."""
    given = alike(biases, norms, eps)
    if given is not None:
        rows = fold_rows(given, eps[0]).flatten(0, 1).unbind()
        return list(zip(rows[::3], rows[1::3], rows[2::3], strict=True))
    folded = zip(float_rows(biases), fold_all(norms, eps), strict=True)
    return [(bias, *affine) for bias, affine in folded]


def _on_gpu(vector: Tensor) -> bool:
    return vector.is_cuda and cuda.why_not(vector.device.index or 0) is None


class Norm(NamedTuple):
    """How one call normalises: with the moments of the batch, over a process group if there is one, or ``fixed``."""

    eps: float
    fixed: Tensor | None = None  # [2, C] running mean and variance
    group: Any = None


class Affine(NamedTuple):
    """``rows`` [3, C]: mean, scale, shift."""

    rows: Tensor
    rstd: Tensor
    moments: Tensor  # [2, C] mean and unbiased variance, as running statistics want them
    values: int  # per channel, of all processes


def norm_of(bn: BatchNorm) -> Norm:
    """The settings of a BatchNorm2d or SyncBatchNorm now."""
    if not uses_batch(bn):
        assert bn.running_mean is not None and bn.running_var is not None
        return Norm(bn.eps, torch.stack((bn.running_mean, bn.running_var)))
    group = None
    if type(bn) is nn.SyncBatchNorm and bn.training and torch.distributed.is_initialized():
        group = bn.process_group or torch.distributed.group.WORLD
        group = group if torch.distributed.get_world_size(group) > 1 else None
    return Norm(bn.eps, None, group)


def _rows_reference(
    moments: Tensor, gamma: Tensor | None, beta: Tensor | None, eps: float, count: int
) -> tuple[Tensor, Tensor, Tensor]:
    mean, var = moments
    rstd = torch.rsqrt(var + eps)
    scale = rstd if gamma is None else rstd * gamma.to(rstd.dtype)
    shift = torch.zeros_like(mean) if beta is None else beta.to(mean.dtype)
    unbiased = var * (count / max(1, count - 1))
    return torch.stack((mean, scale, shift)), rstd, torch.stack((mean, unbiased))


def _gradients_reference(
    sums: Tensor, rows: Tensor, rstd: Tensor, count: int, fixed: bool
) -> tuple[Tensor, Tensor, Tensor]:
    mean, scale, _ = rows
    p, nothing = scale, torch.zeros_like(scale)
    total, centred = sums / count
    q, r = (nothing, nothing) if fixed else (-scale * rstd * rstd * centred, -scale * total)
    return torch.stack((p, q, r, mean)), sums[1] * rstd, sums[0].clone()


def _no_products(*_: Any, **__: Any) -> int:
    return 0


# A launch each: what follows a unit's moments, and what its sums become in backward
_rows = define(
    "batchnorm_rows",
    "(Tensor moments, Tensor? gamma, Tensor? beta, float eps, SymInt count) -> (Tensor, Tensor, Tensor)",
    lambda moments, *_: tuple(moments.new_empty((*rows, moments.shape[1])) for rows in ((3,), (), (2,))),
    _rows_reference,
    flops=_no_products,
).default
_gradients = define(
    "batchnorm_gradients",
    "(Tensor sums, Tensor rows, Tensor rstd, SymInt count, bool fixed) -> (Tensor, Tensor, Tensor)",
    lambda sums, *_: tuple(sums.new_empty((*rows, sums.shape[1])) for rows in ((4,), (), ())),
    _gradients_reference,
    flops=_no_products,
).default


def affine(a: Tensor, moments: Tensor, gamma: Tensor | None, beta: Tensor | None, norm: Norm) -> Affine:
    """a: the pre-activation [N, C, H, W] that the moments are of."""
    count = a.numel() // a.shape[1]
    if norm.fixed is not None:
        moments = norm.fixed.to(moments.dtype)
    elif norm.group is not None:
        moments, count = _gather(moments, count, norm.group)
    if norm.fixed is None and count == 1:
        raise ValueError(f"Expected more than 1 value per channel when training, got input size {a.size()}")
    run = _rows_reference if moments.dtype == torch.float64 else _rows
    rows, rstd, found = run(moments, gamma, beta, norm.eps, count)
    return Affine(rows, rstd, found, count)


def gradients(sums: Tensor, rows: Tensor, rstd: Tensor, count: int, norm: Norm) -> tuple[Tensor, Tensor, Tensor]:
    """Coefficients [4, C], and the gradients of gamma and beta.

    Coefficients p, q, r, mean: p * grad + q * (g - mean) + r is the gradient of g = act(a).
    sums [2, C]: sum(grad), sum(grad * (g - mean)), of this process.

    dg = scale * (grad - sum(grad) / count - (g - mean) * rstd^2 * sum(grad * (g - mean)) / count)
    """
    run = _gradients_reference if sums.dtype == torch.float64 else _gradients
    k, dgamma, dbeta = run(sums, rows, rstd, count, norm.fixed is not None)
    if norm.group is not None and norm.fixed is None:
        sums = sums.clone()
        torch.distributed.all_reduce(sums, group=norm.group)
        k, *_ = run(sums, rows, rstd, count, False)
    return k, dgamma, dbeta


def _gather(moments: Tensor, count: int, group: Any) -> tuple[Tensor, int]:
    """Moments over all processes, in the order of their ranks: the same bits in each of them."""
    mine = torch.cat((moments.flatten().double(), moments.new_tensor([count], dtype=torch.float64)))
    every = [torch.empty_like(mine) for _ in range(torch.distributed.get_world_size(group))]
    torch.distributed.all_gather(every, mine, group=group)
    found = torch.stack(every)
    counts = found[:, -1:]
    means, variances = found[:, :-1].chunk(2, dim=1)
    share = counts / counts.sum()
    mean = torch.where(counts > 0, means * share, 0).sum(0)
    var = torch.where(counts > 0, (variances + (means - mean) ** 2) * share, 0).sum(0)
    return torch.stack((mean, var)).to(moments.dtype), int(counts.sum())


@torch.no_grad()
def update_running(found: Sequence[tuple[BatchNorm, Tensor]]) -> None:
    """What nn.BatchNorm2d does to its buffers in a training step. moments [2, C]: mean and unbiased variance.

    All at once, in a few launches; one that is met again waits for its first turn.
    """
    turn: dict[BatchNorm, Tensor] = {}
    for bn, moments in found:
        if bn.training and bn.track_running_stats:
            if bn in turn:
                _update(turn)
                turn = {}
            turn[bn] = moments
    _update(turn)


def _update(turn: dict[BatchNorm, Tensor]) -> None:
    for momentum in dict.fromkeys(bn.momentum for bn in turn):
        group = [bn for bn in turn if bn.momentum == momentum]
        counters = [bn.num_batches_tracked for bn in group if bn.num_batches_tracked is not None]
        if counters:
            torch._foreach_add_(counters, 1)
        running, now, shares = [], [], []
        for bn in group:
            share: Any = momentum
            if share is None:  # a cumulative average; a tensor: no graph may ask for its value
                tracked = bn.num_batches_tracked
                share = turn[bn].new_zeros(()) if tracked is None else 1.0 / tracked
            for buffer, value in zip((bn.running_mean, bn.running_var), turn[bn].unbind(), strict=True):
                if buffer is not None:
                    running.append(buffer)
                    now.append(value)
                    shares.append(share)
        if running:
            share = shares if momentum is None else momentum
            kept = [1 - s for s in shares] if momentum is None else 1 - momentum
            torch._foreach_mul_(running, kept)
            torch._foreach_add_(running, torch._foreach_mul(now, share))
