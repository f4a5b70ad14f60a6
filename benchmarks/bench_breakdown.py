"""Where the time of a network goes, plain and fused.

Plain: every module on its own, by hooks. Fused, a block is one loop without seams, so its parts are told by leaving
one out: the same network with 1x1 depthwise kernels has all products and none of the taps, and the difference to it is
what the depthwise convolutions cost. Stem, pool and head are timed alone.
"""

import statistics
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from benchmarks import photos
from benchmarks.networks import DTYPES, RELEASED, SPECS, Spec, plain
from benchmarks.recording import CLOCK
from cmx_kernels import ConvMixer
from cmx_kernels.bench import in_turns

PARTS = ("depthwise", "pointwise", "activation", "BatchNorm", "stem, pool, head, rest")


@pytest.mark.benchmark(timer=CLOCK)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("model", RELEASED)
@torch.no_grad()
def bench_parts(benchmark: Any, model: str, dtype: str, keep: Any, say: Any, tmp_path: Path) -> None:
    spec = SPECS[model]
    x = photos.photographs(spec.image_size)[:1].to(DTYPES[dtype])
    torch.manual_seed(0)
    network = plain(spec)
    parts = {"eager": _plain(network.to(DTYPES[dtype]), x), "fused": _fused(spec, network, x)}
    for provider, found in parts.items():
        milliseconds = {part: found.get(part, 0.0) * 1e3 for part in PARTS}
        record = {"model": model, "batch": 1, "dtype": dtype, "provider": provider, "ms": milliseconds}
        keep("breakdown", record)
        benchmark.extra_info[provider] = milliseconds
        say(None, f"{model} {dtype} {provider}: " + ", ".join(f"{k} {v:.1f} ms" for k, v in milliseconds.items() if v))
    benchmark.group = f"breakdown {model} {dtype}"
    CLOCK.into(benchmark, [sum(parts["fused"].values())])


def _plain(network: nn.Module, x: Tensor) -> dict[str, float]:
    """Seconds of each kind of module, of the whole the rest."""
    rounds: list[dict[str, float]] = []
    began = 0.0

    def before(module: nn.Module, _: Any) -> None:
        nonlocal began
        began = time.perf_counter()

    def after(module: nn.Module, *_: Any) -> None:
        rounds[-1][_kind(module)] += time.perf_counter() - began

    for name, module in network.named_modules():
        if name.startswith("blocks") and not list(module.children()):
            module.register_forward_pre_hook(before)
            module.register_forward_hook(after)
    for _ in range(4):
        rounds.append(defaultdict(float))
        start = time.perf_counter()
        network(x)
        rounds[-1][PARTS[-1]] = time.perf_counter() - start - sum(rounds[-1].values())
    return {part: statistics.median(r[part] for r in rounds[1:]) for part in PARTS}


def _kind(module: nn.Module) -> str:
    if isinstance(module, nn.Conv2d):
        return "depthwise" if module.groups > 1 else "pointwise"
    return "BatchNorm" if isinstance(module, nn.BatchNorm2d) else "activation"


def _fused(spec: Spec, network: nn.Module, x: Tensor) -> dict[str, float]:
    """Seconds; activation and BatchNorm are part of the two kernels."""

    def model(kernel_size: int) -> nn.Module:
        size = (spec.dim, spec.depth, kernel_size, spec.patch_size, spec.classes)
        made = ConvMixer(*size, act_layer=spec.act, fused=True, dtype=x.dtype)
        own = made.state_dict()
        made.load_state_dict({k: v for k, v in network.state_dict().items() if own[k].shape == v.shape}, strict=False)
        return made.eval().requires_grad_(False)

    whole, without = model(spec.kernel_size), model(1)
    activations = whole.stem(x)
    calls = {
        "whole": lambda: whole(x),
        "without": lambda: without(x),
        "stem": lambda: whole.stem(x),
        "pool, head": lambda: whole.head(whole.global_pool(activations)),
    }
    times = {name: statistics.median(found) for name, found in in_turns(calls, 0.4, (3, 15)).items()}
    rest = times["stem"] + times["pool, head"]
    return {
        "depthwise": max(0.0, times["whole"] - times["without"]),
        "pointwise": max(0.0, times["without"] - rest),
        PARTS[-1]: rest,
    }
