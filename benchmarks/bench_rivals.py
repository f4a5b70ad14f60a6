"""The paper's table, redone here: ConvMixer plain and fused, and its rivals from timm, random weights for all.

    pytest benchmarks/bench_rivals.py --benchmark-only --results NAME

Runs when it is named, or with --full; needs timm. All in this process, in turns, each in both memory layouts; the fused
logits are held against the plain ones in float64 first (one image).
"""

import statistics
from dataclasses import dataclass
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from benchmarks import photos, timm_models
from benchmarks.networks import DTYPES, QUICK_DTYPES, SPECS
from benchmarks.recording import CLOCK
from cmx_kernels import create_model
from cmx_kernels.bench import in_turns

LAYOUTS = {"NCHW": torch.contiguous_format, "NHWC": torch.channels_last}
BATCH = 4
SOURCE = "timm results-imagenet.csv"


@dataclass(frozen=True)
class Network:
    """timm's name; top-1 of ``weights`` at 224 x 224 in percent; timm's count of multiply-adds, unless we have one."""

    name: str
    weights: str
    top1: float
    gmac: float = 0.0


NETWORKS = (
    Network("convmixer_1536_20", "in1k", 81.382),
    Network("convmixer_768_32", "in1k", 80.158),
    Network("convmixer_1024_20_ks9_p14", "in1k", 76.944),
    Network("resnet152", "tv_in1k", 78.330, 11.56),
    Network("deit_base_patch16_224", "fb_in1k", 81.980, 17.58),
    Network("mixer_b16_224", "goog_in21k_ft_in1k", 76.616, 12.62),
    Network("convnext_base", "fb_in1k", 83.838, 15.38),
)


@pytest.mark.benchmark(timer=CLOCK)
@pytest.mark.parametrize("dtype", QUICK_DTYPES)
@pytest.mark.parametrize("network", NETWORKS, ids=lambda n: n.name)
@torch.no_grad()
def bench_network(benchmark: Any, network: Network, dtype: str, keep: Any, say: Any) -> None:
    absent = timm_models.why_absent()
    if absent is not None:
        pytest.skip(absent)
    x = photos.photographs(224)[:BATCH]
    plain = timm_models.create(network.name)
    error, fused = _fused(network, plain, x[:1], DTYPES[dtype])
    x = x.to(DTYPES[dtype])
    plain.to(DTYPES[dtype])
    calls = {}
    for name, layout in LAYOUTS.items():
        own = plain if name == "NCHW" else _copy(network, plain).to(memory_format=layout)
        calls[name] = partial(own, x.contiguous(memory_format=layout))
    if fused is not None:
        calls["fused"] = partial(fused, x)
    seconds = {name: statistics.median(times) for name, times in in_turns(calls, 0.5, (3, 15)).items()}
    rates = {name: BATCH / value for name, value in seconds.items()}
    record = {
        "model": network.name,
        "top1": network.top1,
        "source": f"{SOURCE}, {network.weights}",
        "parameters_m": sum(p.numel() for p in plain.parameters()) / 1e6,
        "gmac": network.gmac or SPECS[network.name].flop / 2e9,
        "dtype": dtype,
        "batch": BATCH,
        "plain": {name: rates[name] for name in LAYOUTS},
    }
    if fused is not None:
        record |= {"fused": rates["fused"], "speedup": rates["fused"] / max(record["plain"].values()), "error": error}
    keep("rivals", record)
    say(None, f"{network.name} {dtype}, images/s: " + ", ".join(f"{name} {rate:.2f}" for name, rate in rates.items()))
    benchmark.group = f"rivals {dtype}"
    benchmark.extra_info.update(record)
    CLOCK.into(benchmark, [seconds.get("fused", min(seconds.values()))])


def _copy(network: Network, plain: nn.Module) -> nn.Module:
    copy = timm_models.create(network.name).to(next(plain.parameters()).dtype)
    copy.load_state_dict(plain.state_dict())
    return copy


def _fused(network: Network, plain: nn.Module, x: Tensor, dtype: torch.dtype) -> tuple[float, nn.Module | None]:
    """The fused ConvMixer on the same weights, and its largest error; None for a rival."""
    if not network.name.startswith("convmixer"):
        return float("nan"), None
    fused = create_model(network.name, dtype=dtype).eval().requires_grad_(False)
    fused.load_state_dict(plain.state_dict())
    out = fused(x.to(dtype)).double()
    exact = plain.double()(x.double())
    plain.to(dtype)
    of_plain = (plain(x.to(dtype)).double() - exact).abs().max().item()
    error = (out - exact).abs().max().item()
    allowed = 2 * of_plain + 16 * torch.finfo(dtype).eps / 2 * exact.abs().max().item()
    assert error <= allowed, f"{network.name} is wrong: error {error:.2g}, allowed are {allowed:.2g}"
    return error, fused
