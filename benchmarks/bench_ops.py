"""Single layers over many shapes: each operator against the same in plain PyTorch, in both memory layouts.

Runs with --full, or when it is named: pytest benchmarks/bench_ops.py --benchmark-only -k "k9 and c768"
A user who swaps a layer keeps the layout; a user who optimises takes the best one. A shape counts as slower if the
fused operator loses either way by more than noise; one that seems to, or wins by less than noise, is measured again,
three times as long, and one that still does in two more processes, whose memory lies elsewhere; the medians are those
of all its calls. Both run in one process, in turns: they share PyTorch's threads.
"""

import multiprocessing
import statistics
from collections.abc import Callable, Sequence
from functools import partial
from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks import fields, machine, memory, reference
from benchmarks.layers import MODULES, Layer, Shape
from benchmarks.networks import DTYPES, LAYOUTS, QUICK_DTYPES
from benchmarks.recording import CLOCK
from cmx_kernels.bench import in_turns

KERNELS = (3, 5, 7, 8, 9, 11, 15, 31)
# (C, H, W): ConvMixer, ConvNeXt and RepLKNet sizes, and some that fit no vector
PLANES = (
    *((96, 56, 56), (192, 28, 28), (384, 14, 14), (768, 7, 7), (256, 64, 64), (512, 33, 20), (100, 17, 23)),
    *((768, 32, 32), (1024, 16, 16), (1536, 32, 32), (96, 7, 7), (96, 14, 14), (1536, 7, 7), (1536, 14, 14)),
)
BATCHES = (1, 8, 32)
SWEPT = [("pointwise_block", 1), *product(("depthwise_block", *MODULES), KERNELS)]
# ends of a network and training steps: at the sizes of the networks; op, k, (C, H, W)
OTHERS = [
    *(("patch_embed", k, plane) for k, plane in ((7, (768, 32, 32)), (14, (1024, 16, 16)), (2, (256, 16, 16)))),
    *(("pool_head", 1, plane) for plane in ((768, 32, 32), (1024, 16, 16))),
    *(("depthwise_block_train", k, p) for k, p in ((7, (768, 32, 32)), (9, (1024, 16, 16)), (5, (256, 16, 16)))),
]
_MOST_FLOP, _MOST_ELEMENTS = 5e9, 2**24  # beyond, plain PyTorch takes seconds
_SECONDS, _ROUNDS = 0.15, (3, 30)  # of each shape
_AGAIN = 3  # times as long, where it is not clear which is faster
_PROCESSES = 2  # more, where the fused one seems to be slower
_NOISE = 0.05  # of a ratio of two medians on a quiet machine

Calls = dict[tuple[str, str], Callable[[], Any]]  # by provider and layout
Times = dict[tuple[str, str], list[float]]


def quick(s: Shape) -> bool:
    """Part of every run: one plane under all kernel sizes."""
    return (s.batch, s.c, s.h, s.w) == (1, 768, 32, 32) and s.op not in MODULES


def _shapes() -> list[Shape]:
    layers = [*((*kind, plane) for kind, plane in product(SWEPT, PLANES)), *OTHERS]
    every = [Shape(op, k, n, *plane, d) for (op, k, plane), n, d in product(layers, BATCHES, QUICK_DTYPES)]
    some = [s for s in every if s.op != "depthwise_train_layer" or s.batch == 8]  # plain PyTorch takes seconds
    return [s for s in some if s.work.flop <= _MOST_FLOP and s.batch * s.c * s.h * s.w <= _MOST_ELEMENTS]


@pytest.mark.benchmark(timer=CLOCK)
@pytest.mark.parametrize("shape", _shapes(), ids=str)
@torch.no_grad()
def bench_op(benchmark: Any, shape: Shape, record_op: Callable[[dict[str, Any]], None]) -> None:
    layer, inputs = Layer.random(shape), _inputs(shape)
    calls = _calls(layer, inputs)
    errors = {name: _error(layer, x[:1]) for name, x in inputs.items()}
    times = in_turns(calls, _SECONDS, _ROUNDS)
    if _worst(_compared(_medians(times))) < 1 + _NOISE:
        times = _joined(times, _longer(calls))
    for _ in range(_PROCESSES if _compared(_medians(times))["slower"] else 0):
        times = _joined(times, _elsewhere(shape, torch.get_num_threads()))
    seconds = _medians(times)
    best = min(LAYOUTS, key=lambda name: seconds["fused", name])
    used = memory.of_steady_call(calls["fused", best])
    backends = fields.backends_of(layer.fused_module() if shape.op in MODULES else shape.op, inputs[best])
    of_best = (*max(errors.values()), used, shape.work, seconds["fused", best], machine.peaks())
    record = {**shape._asdict(), "flop": shape.work.flop, "bytes": shape.work.bytes, **_compared(seconds)}
    record |= {f"error_{name}": error for name, (error, _) in errors.items()}
    record |= fields.record("fused", shape.dtype, best, backends, *of_best)
    record_op(record)
    benchmark.group = f"{shape.op} {shape.dtype}"
    benchmark.extra_info.update(record)
    CLOCK.into(benchmark, times["fused", best])


def _inputs(shape: Shape) -> dict[str, Tensor]:
    torch.manual_seed(1)
    x = torch.randn(shape.input).to(DTYPES[shape.dtype])
    return {name: x.contiguous(memory_format=layout) for name, layout in LAYOUTS.items()}


def _calls(layer: Layer, inputs: dict[str, Tensor]) -> Calls:
    providers = {"fused": layer.fused(), "plain": layer.plain()}
    return {(who, name): partial(run, x) for who, run in providers.items() for name, x in inputs.items()}


def _longer(calls: Calls) -> Times:
    return in_turns(calls, _AGAIN * _SECONDS, (_ROUNDS[0], _AGAIN * _ROUNDS[1]))


def _elsewhere(shape: Shape, threads: int) -> Times:
    with multiprocessing.get_context("spawn").Pool(1, torch.set_num_threads, (threads,)) as process:
        return process.apply(_in_this_process, (shape,))


@torch.no_grad()
def _in_this_process(shape: Shape) -> Times:
    return _longer(_calls(Layer.random(shape), _inputs(shape)))


def _joined(times: Times, more: Times) -> Times:
    return {key: times[key] + more[key] for key in times}


def _error(layer: Layer, x: Tensor) -> tuple[float, float]:
    """The largest error, and what is allowed, of the result that is nearest to it; all are checked."""
    exact = layer.to(torch.float64).plain()(x.double())
    results: Sequence[Sequence[Tensor]] = (exact, layer.plain()(x), layer.fused()(x))
    found = [reference.rule(*tensors, roundings=8) for tensors in zip(*results, strict=True)]
    for error, allowed in found:
        assert error <= allowed, f"{layer.shape} is wrong: error {error:.2g}, allowed are {allowed:.2g}"
    return max(found, key=lambda pair: pair[0] / pair[1])


def _medians(times: Times) -> dict[tuple[str, str], float]:
    return {key: statistics.median(t) for key, t in times.items()}


def _compared(seconds: dict[Any, float]) -> dict[str, Any]:
    """Milliseconds of all, and how many times faster the fused operator is, layout kept and with the best of each."""
    found: dict[str, Any] = {f"ms_{who}_{name}": value * 1e3 for (who, name), value in seconds.items()}
    found |= {f"x_{name}": seconds["plain", name] / seconds["fused", name] for name in LAYOUTS}
    found["x_best"] = min(seconds["plain", n] for n in LAYOUTS) / min(seconds["fused", n] for n in LAYOUTS)
    found["slower"] = _worst(found) < 1 - _NOISE
    return found


def _worst(found: dict[str, Any]) -> float:
    return min(found["x_best"], *(found[f"x_{name}"] for name in LAYOUTS))
