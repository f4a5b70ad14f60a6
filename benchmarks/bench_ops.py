"""Single layers over many shapes: each operator against the same in plain PyTorch, in both memory layouts.

Runs with --full, or when it is named: pytest benchmarks/bench_ops.py --benchmark-only -k "k9 and c768"
A user who swaps a layer keeps the layout; a user who optimises takes the best one. A shape counts as slower if the
fused operator loses either way by more than noise. Both run in this process, in turns: they share PyTorch's threads.
"""

import statistics
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.networks import DTYPES, QUICK_DTYPES
from benchmarks.recording import CLOCK
from cmx_kernels.bench import in_turns

KERNELS = (3, 5, 7, 8, 9, 11, 15, 31)
# (C, H, W): ConvMixer, ConvNeXt and RepLKNet sizes, and some that fit no vector
PLANES = (
    *((96, 56, 56), (192, 28, 28), (384, 14, 14), (768, 7, 7), (256, 64, 64), (512, 33, 20), (100, 17, 23)),
    *((768, 32, 32), (1024, 16, 16), (1536, 32, 32), (96, 7, 7), (96, 14, 14), (1536, 7, 7), (1536, 14, 14)),
)
BATCHES = (1, 8, 32)
LAYOUTS = {"NCHW": torch.contiguous_format, "NHWC": torch.channels_last}
_MOST_FLOP, _MOST_ELEMENTS = 5e9, 2**24  # beyond, plain PyTorch takes seconds
_SECONDS, _ROUNDS = 0.15, (3, 30)  # of each shape
_NOISE = 0.05  # of a ratio of two medians on a quiet machine


class Shape(NamedTuple):
    op: str
    k: int
    batch: int
    c: int
    h: int
    w: int
    dtype: str

    def __str__(self) -> str:
        return f"{self.op}-k{self.k}-n{self.batch}-c{self.c}-{self.h}x{self.w}-{self.dtype}"

    @property
    def flop(self) -> int:
        return 2 * self.batch * self.c * self.h * self.w * (self.c if self.op == "pointwise_block" else self.k**2)

    @property
    def bytes(self) -> int:
        """x, y and the weight, each moved once."""
        weight = self.c * (self.c if self.op == "pointwise_block" else self.k**2)
        return (2 * self.batch * self.c * self.h * self.w + weight) * DTYPES[self.dtype].itemsize

    @property
    def quick(self) -> bool:
        """Part of every run: one plane under all kernel sizes."""
        return (self.batch, self.c, self.h, self.w) == (1, 768, 32, 32) and self.op != "depthwise_layer"


def _shapes() -> list[Shape]:
    kinds = [("pointwise_block", 1)] + [(op, k) for op in ("depthwise_block", "depthwise_layer") for k in KERNELS]
    every = (
        Shape(op, k, n, *plane, dtype) for op, k in kinds for plane in PLANES for n in BATCHES for dtype in QUICK_DTYPES
    )
    return [s for s in every if s.flop <= _MOST_FLOP and s.batch * s.c * s.h * s.w <= _MOST_ELEMENTS]


@dataclass
class Layer:
    """A layer in plain PyTorch, in one dtype; its BatchNorm in float32 at least, as under autocast."""

    shape: Shape
    weight: Tensor
    bias: Tensor
    norm: tuple[Tensor, ...]  # mean, variance, weight, bias

    @staticmethod
    def random(s: Shape) -> "Layer":
        torch.manual_seed(0)
        inputs = s.c if s.op == "pointwise_block" else 1
        weight = torch.randn(s.c, inputs, s.k, s.k) / (inputs * s.k**2) ** 0.5
        norm = (torch.randn(s.c) / 4, torch.rand(s.c) + 0.5, torch.rand(s.c) + 0.5, torch.randn(s.c) / 4)
        return Layer(s, weight, torch.randn(s.c) / 4, norm).to(DTYPES[s.dtype])

    def to(self, dtype: torch.dtype) -> "Layer":
        norm = tuple(t.to(torch.promote_types(torch.float32, dtype)) for t in self.norm)
        return Layer(self.shape, self.weight.to(dtype), self.bias.to(dtype), norm)

    def __call__(self, x: Tensor) -> Tensor:
        op = self.shape.op
        groups = 1 if op == "pointwise_block" else x.shape[1]
        y = F.conv2d(x, self.weight, self.bias, padding="same", groups=groups)
        if op == "depthwise_layer":
            return y
        y = F.batch_norm(F.gelu(y), *self.norm)
        return x + y if op == "depthwise_block" else y


def _fused(layer: Layer) -> Callable[[Tensor], Tensor]:
    from cmx_kernels import LargeKernelDepthwiseConv2d, ops

    s = layer.shape
    if s.op == "depthwise_layer":
        return _with_weights_of(layer, LargeKernelDepthwiseConv2d(s.c, s.k))
    mean, variance, gamma, beta = layer.norm
    scale = gamma / (variance + 1e-5).sqrt()  # the folding that fuse() does once
    shift = beta - mean * scale
    op = getattr(ops, s.op)
    return lambda x: op(x, layer.weight, layer.bias, scale, shift)


def _plain(layer: Layer) -> Callable[[Tensor], Tensor]:
    """A module against a module: both have the same way to their convolution."""
    s = layer.shape
    if s.op != "depthwise_layer":
        return layer
    return _with_weights_of(layer, torch.nn.Conv2d(s.c, s.c, s.k, groups=s.c, padding="same"))


def _with_weights_of(layer: Layer, module: torch.nn.Module) -> torch.nn.Module:
    module.to(layer.weight.dtype).load_state_dict({"weight": layer.weight, "bias": layer.bias})
    return module.requires_grad_(False)


@pytest.mark.benchmark(timer=CLOCK)
@pytest.mark.parametrize("shape", _shapes(), ids=str)
@torch.no_grad()
def bench_op(benchmark: Any, shape: Shape, record_op: Callable[[dict[str, Any]], None]) -> None:
    layer = Layer.random(shape)
    plain, fused = _plain(layer), _fused(layer)
    x = torch.randn(shape.batch, shape.c, shape.h, shape.w).to(DTYPES[shape.dtype])
    inputs = {name: x.contiguous(memory_format=layout) for name, layout in LAYOUTS.items()}
    errors = {f"error_{name}": _error(layer, fused, x[:1]) for name, x in inputs.items()}
    providers = {"fused": fused, "plain": plain}
    calls = {(who, name): partial(run, inputs[name]) for who, run in providers.items() for name in LAYOUTS}
    times = in_turns(calls, _SECONDS, _ROUNDS)
    record = {**shape._asdict(), **errors, **_compared({key: statistics.median(t) for key, t in times.items()})}
    record |= {"flop": shape.flop, "bytes": shape.bytes, **_rates(record)}
    record_op(record)
    benchmark.group = f"{shape.op} {shape.dtype}"
    benchmark.extra_info.update(record)
    CLOCK.into(benchmark, min((times["fused", name] for name in LAYOUTS), key=statistics.median))


def _error(plain: Layer, fused: Callable[[Tensor], Tensor], x: Tensor) -> float:
    """The rule: |out - ref| <= 2 max|plain - ref| + eps, ref in float64 from the same rounded weights."""
    ref = plain.to(torch.float64)(x.double())
    error, of_plain = ((run(x).double() - ref).abs().max().item() for run in (fused, plain))
    allowed = 2 * of_plain + 4 * torch.finfo(x.dtype).eps * ref.abs().max().item()
    assert error <= allowed, f"{plain.shape} is wrong: error {error:.2g}, allowed are {allowed:.2g}"
    return error


def _rates(record: dict[str, Any]) -> dict[str, Any]:
    """Of the fused operator, in its better layout."""
    shape, ms = Shape(*(record[name] for name in Shape._fields)), min(record[f"ms_fused_{name}"] for name in LAYOUTS)
    return {"gflops": shape.flop / ms / 1e6, "gb_per_s": shape.bytes / ms / 1e6}


def _compared(seconds: dict[Any, float]) -> dict[str, Any]:
    """Milliseconds of all, and how many times faster the fused operator is, layout kept and with the best of each."""
    found: dict[str, Any] = {f"ms_{who}_{name}": value * 1e3 for (who, name), value in seconds.items()}
    found |= {f"x_{name}": seconds["plain", name] / seconds["fused", name] for name in LAYOUTS}
    found["x_best"] = min(seconds["plain", n] for n in LAYOUTS) / min(seconds["fused", n] for n in LAYOUTS)
    found["slower"] = min(found["x_best"], *(found[f"x_{name}"] for name in LAYOUTS)) < 1 - _NOISE
    return found
