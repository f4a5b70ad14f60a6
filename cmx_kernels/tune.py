"""tune: measures the backends on this machine for the shapes of a model, and keeps the fastest."""

import copy
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from statistics import median
from typing import NamedTuple

import torch
from torch import Tensor, nn

from cmx_kernels import backends, tuned
from cmx_kernels.explain import Report, Row, after_patches, inputs_of, outermost, stack_of
from cmx_kernels.layers import LargeKernelDepthwiseConv2d
from cmx_kernels.models.fused import Block, Stem, run_unit
from cmx_kernels.models.networks import FusedNetwork
from cmx_kernels.models.stack import Stack
from cmx_kernels.models.structure import Refusal, Unit
from cmx_kernels.ops import block_stack, depth_first
from cmx_kernels.ops.checks import autocast

TURNS, SECONDS = 7, 0.004  # of each candidate; a turn is as many calls as take that long


class Candidate(NamedTuple):
    """One thing to measure: an operator, or a stack in one call, on one input."""

    part: str
    op: str
    x: Tensor
    weight: tuple[int, ...]
    act: str
    run: Callable[[Tensor], Tensor]
    plain: nn.Module  # what it stands for, in PyTorch
    under: Callable[[str], AbstractContextManager[None]] = backends.use  # by the name of what is measured


class Plain(nn.Module):
    """The modules of a unit, one after the other."""

    def __init__(self, unit: Unit, residual: bool) -> None:
        super().__init__()
        self.unit, self.residual = nn.Sequential(*unit), residual

    def forward(self, x: Tensor) -> Tensor:
        y = self.unit(x)
        return y + x if self.residual else y


def tune(model: nn.Module, x: Tensor) -> Report:
    """Measure every backend that takes the operators of ``model`` on ``x``, check what it computes, keep the fastest.

    From then on, and in later processes, calls of these shapes, in this dtype, layout, number of CPU threads and on
    this device go to the fastest; plain PyTorch is one of the candidates. For inference: in calls with gradients, and
    for what was not measured, the usual order holds. ``cmx_kernels.use`` and CMX_BACKEND override it, and deleting
    $XDG_CACHE_HOME/cmx_kernels/tuned.json takes it back; another driver, torch, Triton or version of this
    package ignores it.

    Args:
        model: in eval mode, fused or with fused parts.
        x: an input as it will be used; torch.autocast counts too.

    Returns:
        One row for each measured call, with the milliseconds of each candidate.

    Raises:
        TypeError, ValueError: ``model`` is no nn.Module, in training mode, or has no fused part.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: got {type(model).__name__}, wanted an nn.Module")
    if not isinstance(x, Tensor):
        raise TypeError(f"x: got {type(x).__name__}, wanted a torch.Tensor as the model takes it")
    if model.training:
        raise ValueError("model: got one in training mode, wanted eval mode, which is what is measured; call .eval()")
    if not [part for _, part in outermost(model, "") if not _is_plain(part)]:
        raise ValueError(f"model: got a {type(model).__name__} without fused parts; call cmx_kernels.fuse(model) first")
    rows: list[Row] = []
    measured: dict[tuned.Call, tuple[str, dict[str, float]]] = {}
    with torch.no_grad():
        for one in _candidates(model, x):
            call = tuned.call_of(one.op, one.x, one.weight, one.act)
            if call not in measured:
                ways = (depth_first.WHOLE, depth_first.PARTS)
                ms, wrong = (_race(one, ways), {}) if one.op == depth_first.OP else _measure(one)
                best = min(ms, key=lambda name: ms[name])
                measured[call] = best, ms
                tuned.remember(call, best)
                times = ", ".join(f"{name} {value:.3g} ms" for name, value in ms.items())
                rows.append(Row(one.part, best, one.op, wrong, times))
    tuned.save([(call, best, ms) for call, (best, ms) in measured.items()])
    return Report(rows)


def _is_plain(part: nn.Module) -> bool:
    return isinstance(part, nn.Conv2d) and not isinstance(part, LargeKernelDepthwiseConv2d)


def _candidates(model: nn.Module, x: Tensor) -> Iterator[Candidate]:
    parts = dict(outermost(model, ""))
    given = {"": x} if "" in parts else inputs_of(model, parts, x)
    for name, part in parts.items():
        if name not in given or _is_plain(part):
            continue
        value = x if name == "" else torch.randn_like(given[name])
        if isinstance(part, LargeKernelDepthwiseConv2d):
            if part.why_plain(value) is None:
                value = autocast(value)[0]
                conv = nn.Conv2d.__new__(nn.Conv2d)
                conv.__dict__.update(part.__dict__)
                yield Candidate(name or "layer", "depthwise_block", value, tuple(part.weight.shape), "none", part, conv)
            continue
        try:
            stack, obstacle = stack_of(part, value)
        except Refusal:
            continue
        for module in list(part.children())[: stack.span[0]]:
            value = module(value)
        label = name or type(part).__name__
        if isinstance(part, FusedNetwork) and not stack.span[0] and (obstacle in (None, block_stack.SLOWER)):
            value = autocast(value)[0]
            yield Candidate(label, "block_stack", value, stack.size, stack.act, part, copy.deepcopy(part))
        if isinstance(part, FusedNetwork):
            value = depth_first.laid_out(value, stack.layout(autocast(value)[0]))
        yield from _one_by_one(label, part, stack, value)
        value = autocast(value)[0]
        found = None if obstacle is None or stack.span[0] else _parts(stack, value)
        if isinstance(part, FusedNetwork) and found and found[0] < len(value) and stack.micro_batch is None:
            images, y = found
            under = partial(_divided, part, images)
            run = partial(_run, part, value)
            yield Candidate(label, depth_first.OP, y, stack.size, stack.act, run, part, under)


def _parts(stack: Stack, x: Tensor) -> tuple[int, Tensor] | None:
    """What is predicted, whatever was measured before: that is measured again."""
    found = stack.micro_batch_of(x)
    if found is None:
        return None
    call = tuned.call_of(depth_first.OP, found[1], stack.size, stack.act)
    return stack.micro_batch_of(x) if tuned.choices.pop(call, None) else found


def _run(net: nn.Module, x: Tensor, blocks_x: Tensor) -> Tensor:
    return net(x)


@contextmanager
def _divided(net: FusedNetwork, images: int, way: str) -> Iterator[None]:
    """All images at once, or so many at a time."""
    net.micro_batch = 0 if way == depth_first.WHOLE else images
    try:
        yield
    finally:
        net.micro_batch = None


def _one_by_one(label: str, part: nn.Module, stack: Stack, x: Tensor) -> Iterator[Candidate]:
    """Stem and blocks by themselves, in one call and operator by operator: what runs where a network cannot, or where
    it is not faster."""
    first, act = True, stack.act
    for name, module in part.named_modules():
        if not isinstance(module, (Stem, Block)) and (module is part or not isinstance(module, FusedNetwork)):
            continue
        if not isinstance(module, Stem) and first and stack.stem is not None:
            x = torch.randn_like(after_patches(x, stack.stem.conv))
        first, x = False, autocast(x)[0]
        label_here = f"{label}.{name}".rstrip(".")
        own: Stack = module.stack()
        yield Candidate(label_here, "block_stack", x, own.size, act, module, copy.deepcopy(module))
        if isinstance(module, Stem):
            yield _of_unit(label_here, "patch_embed", own.units[0], x, act)
            x = torch.randn_like(after_patches(x, own.units[0].conv))
        elif isinstance(module, Block):
            yield _of_unit(label_here, "depthwise_block", own.units[0], x, act)
            yield _of_unit(label_here, "pointwise_block", own.units[1], x, act)


def _of_unit(part: str, op: str, unit: Unit, x: Tensor, act: str) -> Candidate:
    plain = Plain(unit, residual=op == "depthwise_block")
    residual = plain if op == "depthwise_block" else None
    weight = tuple(unit.conv.weight.shape)
    return Candidate(part, op, x, weight, act, lambda v: run_unit(op, unit, v, residual), plain.eval())


def _measure(one: Candidate) -> tuple[dict[str, float], dict[str, str]]:
    """Milliseconds of each backend whose result is right, and what is wrong with the others."""
    takers = [b.name for b in backends.BACKENDS if b.why_not(one.op, one.x, one.act) is None]
    results: dict[str, Tensor] = {}
    wrong: dict[str, str] = {}
    for name in takers:
        try:
            with backends.use(name):
                results[name] = one.run(one.x)
        except Exception as failure:  # whatever a compiler or a driver raises: the others are still measured
            if name == "reference":
                raise
            wrong[name] = f"it fails: {str(failure).strip().partition(chr(10))[0]}; please report it"
    with torch.autocast(one.x.device.type, enabled=False), backends.use("reference"):
        exact = copy.deepcopy(one.plain).double()(one.x.double())
    scale = float(exact.abs().max())
    allowed = 2 * float((results["reference"].double() - exact).abs().max())
    allowed += 8 * torch.finfo(results["reference"].dtype).eps * scale
    for name, result in results.items():
        error = float((result.double() - exact).abs().max())
        if not error <= allowed:
            wrong[name] = f"its result is wrong by {error:.2g}, allowed are {allowed:.2g}; please report it"
    return _race(one, [name for name in takers if name == "reference" or name not in wrong]), wrong


def _race(one: Candidate, names: Sequence[str]) -> dict[str, float]:
    """Median milliseconds of a call, taken in turns, so that the drift of the machine hits all alike."""
    times: dict[str, list[float]] = {name: [] for name in names}
    calls = {name: max(1, int(SECONDS / max(_seconds(one, name, 1), 1e-7))) for name in names}
    for _ in range(TURNS):
        for name in names:
            times[name].append(_seconds(one, name, calls[name]))
    return {name: 1e3 * median(seconds) for name, seconds in times.items()}


def _seconds(one: Candidate, name: str, calls: int) -> float:
    """Of one of ``calls`` calls."""
    with one.under(name):
        _wait(one.x)
        start = time.perf_counter()
        for _ in range(calls):
            one.run(one.x)
        _wait(one.x)
        return (time.perf_counter() - start) / calls


def _wait(x: Tensor) -> None:
    if x.device.type == "cuda":
        torch.cuda.synchronize(x.device)
