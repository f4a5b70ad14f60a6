"""The paper's table, redone here: ConvMixer plain and fused, and its rivals from timm, random weights for all.

    pytest benchmarks/bench_rivals.py --benchmark-only --results NAME

Runs when it is named, or with --full; needs timm. All in this process, in turns, each in both memory layouts; the fused
logits are held against the plain ones in float64 first (one image).
"""

import copy
import statistics
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from benchmarks import fields, machine, memory, photos, reference, timm_models
from benchmarks.fields import Work
from benchmarks.networks import DTYPES, LAYOUTS, QUICK_DTYPES, SPECS, plain
from benchmarks.peers import fused as fused_peer
from benchmarks.recording import CLOCK
from benchmarks.timm_models import NETWORKS, Network
from cmx_kernels.bench import in_turns

BATCH = 4
SOURCE = "timm results-imagenet.csv"


TINY = Network("tiny", "", 0.0)  # to try the benchmark itself


def _work(network: Network, dtype: str) -> Work:
    """Of a rival all multiply-adds count as products, and the bytes of its operators are not counted."""
    if network.name in SPECS:
        return SPECS[network.name].work(BATCH, DTYPES[dtype].itemsize)
    return Work(BATCH, 0, 2e9 * network.gmac * BATCH)


@pytest.mark.benchmark(timer=CLOCK)
@pytest.mark.parametrize("dtype", QUICK_DTYPES)
@pytest.mark.parametrize("network", (*NETWORKS, TINY), ids=lambda n: n.name)
@torch.no_grad()
def bench_network(benchmark: Any, network: Network, dtype: str, keep: Any, say: Any) -> None:
    absent = timm_models.why_absent()
    if absent is not None:
        pytest.skip(absent)
    x = photos.photographs(224)[:BATCH].to(DTYPES[dtype])
    contiguous = plain(SPECS["tiny"]) if network.name == "tiny" else timm_models.create(network.name)
    error, allowed, fused = _checked(network, contiguous, x[:1])
    networks = {"NCHW": contiguous, "NHWC": copy.deepcopy(contiguous).to(memory_format=torch.channels_last)}
    calls = {name: partial(net, x.contiguous(memory_format=LAYOUTS[name])) for name, net in networks.items()}
    if fused is not None:
        calls["fused"] = partial(fused, x)
    seconds = {name: statistics.median(times) for name, times in in_turns(calls, 0.5, (3, 15)).items()}
    rates = {name: BATCH / value for name, value in seconds.items()}
    best = min(LAYOUTS, key=seconds.__getitem__) if fused is None else "fused"
    used = memory.of_steady_call(calls[best]) | memory.of_model(fused or networks[best])
    measured = (error, allowed, used, _work(network, dtype), seconds[best], machine.peaks())
    record = {
        "model": network.name,
        "top1": network.top1,
        "source": f"{SOURCE}, {network.weights}",
        "parameters_m": sum(p.numel() for p in contiguous.parameters()) / 1e6,
        "gmac": _work(network, dtype).flop / 2e9 / BATCH,
        "batch": BATCH,
        "plain": {name: rates[name] for name in LAYOUTS},
    }
    if fused is None:
        record |= fields.record("eager", dtype, best, {"network": "torch"}, *measured)
    else:
        record |= fields.record("fused", dtype, "NCHW", fields.backends_of(fused, x), *measured)
        record |= {"fused": rates["fused"], "speedup": rates["fused"] / max(record["plain"].values())}
    keep("rivals", record)
    say(None, f"{network.name} {dtype}, images/s: " + ", ".join(f"{name} {rate:.2f}" for name, rate in rates.items()))
    benchmark.group = f"rivals {dtype}"
    benchmark.extra_info.update(record)
    CLOCK.into(benchmark, [seconds[best]])


def _checked(network: Network, plain: nn.Module, x: Tensor) -> tuple[float, float, nn.Module | None]:
    """The largest error, what is allowed, and the fused ConvMixer on the same weights; a rival has nothing to check.

    Leaves ``plain`` in x's dtype.
    """
    if network.name not in SPECS:
        plain.to(x.dtype)
        return float("nan"), float("nan"), None
    fused = fused_peer.network(SPECS[network.name]).eval().requires_grad_(False)
    fused.load_state_dict(plain.state_dict())
    out = fused.to(x.dtype)(x)
    exact = plain.double()(x.double())
    error, allowed = reference.rule(exact, plain.to(x.dtype)(x), out)
    assert error <= allowed, f"{network.name} is wrong: error {error:.2g}, allowed are {allowed:.2g}"
    return error, allowed, fused
