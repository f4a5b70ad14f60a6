"""Networks of others whose depthwise convolutions fuse() takes: inference and training steps, plain against fused.

    pytest benchmarks/bench_swapped.py --benchmark-only --results NAME

Runs when it is named, or with --full; needs timm. Random weights, photographs; bf16 is autocast, as users have it. All
in this process, in turns, each in both memory layouts. Outputs, and in a step the gradient of the images, are checked
first, against float64.
"""

import copy
import statistics
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import fields, machine, memory, photos, reference, timm_models
from benchmarks.fields import Work
from benchmarks.networks import LAYOUTS, QUICK_DTYPES
from benchmarks.recording import CLOCK
from benchmarks.timm_models import Network
from cmx_kernels import explain, fuse
from cmx_kernels.bench import in_turns

BATCH = 4
NETWORKS = tuple(Network(name, "", 0.0) for name in ("convnext_tiny", "starnet_s4", "caformer_s18", "test_convnext"))
KINDS = ("inference", "step")


def _call(kind: str, model: nn.Module, x: Tensor, mixed: bool) -> tuple[Tensor, ...]:
    """Logits, and in a step the gradient of the images; those of the parameters stay in them."""
    with torch.autocast("cpu", torch.bfloat16, enabled=mixed):
        if kind == "inference":
            with torch.no_grad():
                return (model(x),)
        x = x.detach().requires_grad_()
        logits = model(x)
    logits.to(torch.promote_types(logits.dtype, torch.float32)).square().mean().backward()
    assert x.grad is not None
    return logits.detach(), x.grad


def _checked(kind: str, plain: nn.Module, fused: nn.Module, x: Tensor, mixed: bool) -> tuple[float, float]:
    """The largest error, and what is allowed, of the result that is nearest to it; all are checked."""
    exact = _call(kind, copy.deepcopy(plain).double(), x.double(), False)
    found = [
        reference.rule(*tensors)
        for tensors in zip(exact, _call(kind, plain, x, mixed), _call(kind, fused, x, mixed), strict=True)
    ]
    for error, allowed in found:
        assert error <= allowed, f"{kind} is wrong: error {error:.2g}, allowed are {allowed:.2g}"
    return max(found, key=lambda pair: pair[0] / pair[1])


def _work(kind: str, model: nn.Module, x: Tensor) -> Work:
    """All multiply-adds count as products, and the bytes of the operators are not counted."""
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(x)
    return Work(BATCH, 0, counter.get_total_flops() * (3 if kind == "step" else 1))


@pytest.mark.benchmark(timer=CLOCK)
@pytest.mark.parametrize("dtype", QUICK_DTYPES)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("network", NETWORKS, ids=lambda n: n.name)
def bench_swapped(benchmark: Any, network: Network, kind: str, dtype: str, keep: Any, say: Any) -> None:
    absent = timm_models.why_absent()
    if absent is not None:
        pytest.skip(absent)
    model = timm_models.create(network.name).train(kind == "step").requires_grad_(kind == "step")
    for module in model.modules():  # which would draw other numbers in each
        if isinstance(module, nn.Dropout) or type(module).__name__ == "DropPath":
            module.eval()
    x, mixed = photos.photographs(224)[:BATCH], dtype == "bf16"
    models = {"plain": model, "fused": fuse(copy.deepcopy(model), strict=True)}
    error, allowed = _checked(kind, *models.values(), x[:2], mixed)
    with torch.autocast("cpu", torch.bfloat16, enabled=mixed), torch.set_grad_enabled(kind == "step"):
        rows, backends = list(explain(models["fused"], x)), fields.backends_of(models["fused"], x)
    calls: dict[str, Callable[[], Any]] = {}
    for who, net in models.items():
        for name, layout in LAYOUTS.items():
            own = copy.deepcopy(net).to(memory_format=layout)
            calls[f"{who} {name}"] = partial(_call, kind, own, x.contiguous(memory_format=layout), mixed)
    times = in_turns(calls, 1.0, (5, 15))
    ms = {name: statistics.median(found) * 1e3 for name, found in times.items()}
    plain, fused = (min(LAYOUTS, key=lambda name, who=who: ms[f"{who} {name}"]) for who in models)
    used = memory.of_steady_call(calls[f"fused {fused}"]) | memory.of_model(models["fused"])
    work = _work(kind, model, x)
    measured = (error, allowed, used, work, ms[f"fused {fused}"] / 1e3, machine.peaks())
    record = fields.record("fused", dtype, fused, backends, *measured)
    record |= {"model": network.name, "kind": kind, "batch": BATCH, "ms": ms}
    record |= {"swapped": sum(row.backend == "cpu" for row in rows), "depthwise": len(rows)}
    record |= {"speedup": ms[f"plain {plain}"] / ms[f"fused {fused}"]}
    keep("swapped", record)
    say(None, f"{network.name} {kind} {dtype}, ms: " + ", ".join(f"{name} {value:.0f}" for name, value in ms.items()))
    benchmark.group = f"swapped {kind} {dtype}"
    benchmark.extra_info.update(record)
    CLOCK.into(benchmark, times[f"fused {fused}"])
