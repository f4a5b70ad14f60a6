"""Where the time of a network goes, plain and fused.

Plain: every module on its own, by hooks. Fused: the kernels of a stack look at the clock before and after each half of
a block; what is left of the whole are stem, pool, head, Python and waiting for the slower worker.
"""

import statistics
import time
from collections import defaultdict
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from benchmarks import fields, machine, memory, photos, reference
from benchmarks.networks import DTYPES, QUICK_DTYPES, RELEASED, SPECS, plain
from benchmarks.peers import fused as fused_peer
from benchmarks.recording import CLOCK
from cmx_kernels import registry

PARTS = ("depthwise", "pointwise", "activation", "BatchNorm", "stem, pool, head, rest")


@pytest.mark.skipif(registry.C is None, reason="no native kernels, whose halves could be timed")
@pytest.mark.benchmark(timer=CLOCK)
@pytest.mark.parametrize("dtype", QUICK_DTYPES)
@pytest.mark.parametrize("model", [*RELEASED, "tiny"])
@torch.no_grad()
def bench_parts(benchmark: Any, model: str, dtype: str, keep: Any, say: Any) -> None:
    spec = SPECS[model]
    x = photos.photographs(spec.image_size)[:1].to(DTYPES[dtype])
    torch.manual_seed(0)
    network = plain(spec)
    fused = fused_peer.network(spec).eval().requires_grad_(False)
    fused.load_state_dict(network.state_dict())
    exact = network.double()(x.double())
    networks = {"eager": network.to(DTYPES[dtype]), "fused": fused.to(DTYPES[dtype])}
    logits = {provider: net(x) for provider, net in networks.items()}
    parts = {"eager": _plain, "fused": _fused}
    for provider, net in networks.items():
        error, allowed = reference.rule(exact, logits["eager"], logits[provider])
        assert error <= allowed, f"{model} {dtype} {provider} is wrong: error {error:.2g}, allowed are {allowed:.2g}"
        used = memory.of_steady_call(partial(net, x)) | memory.of_model(net)
        backends = {"network": "torch"} if provider == "eager" else fields.backends_of(net, x)
        found = parts[provider](net, x)
        work = spec.work(1, DTYPES[dtype].itemsize)
        measured = (error, allowed, used, work, sum(found.values()), machine.peaks())
        milliseconds = {part: found.get(part, 0.0) * 1e3 for part in PARTS}
        record = {"model": model, "batch": 1, "ms": milliseconds}
        record |= fields.record(provider, dtype, "NCHW", backends, *measured)
        keep("breakdown", record)
        benchmark.extra_info[provider] = record
        say(None, f"{model} {dtype} {provider}: " + ", ".join(f"{k} {v:.1f} ms" for k, v in milliseconds.items() if v))
    benchmark.group = f"breakdown {model} {dtype}"
    CLOCK.into(benchmark, [sum(found.values())])


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


def _fused(network: nn.Module, x: Tensor) -> dict[str, float]:
    """Seconds of the two halves of the blocks, the mean of all workers; activation and BatchNorm are part of them."""
    rounds: list[dict[str, float]] = []
    for _ in range(6):
        registry.C.time_stages(True)
        start = time.perf_counter()
        network(x)
        whole = time.perf_counter() - start
        halves = registry.C.stage_seconds()
        rounds.append({part: halves[part] / torch.get_num_threads() for part in ("depthwise", "pointwise")})
        rounds[-1][PARTS[-1]] = whole - sum(rounds[-1].values())
    registry.C.time_stages(False)
    return {part: statistics.median(r[part] for r in rounds[1:]) for part in rounds[0]}
