"""Invented records of every row that a GPU's run is to have: each provider of ours takes ``factor``, others 10."""

from typing import Any

from benchmarks.gpu import network, ops, product, training
from benchmarks.timm_models import NETWORKS

MACHINE = {
    "title": "NVIDIA Imaginary, CUDA 99, cuDNN 9",
    "date": "2026-01-02T03:04+00:00",
    "python": "3.12.0",
    "commit": "abc1234",
    "command": "python -m benchmarks.gpu.part --seconds 480",
    "versions": {"torch": "2.13.0", "triton": "3.9.0"},
    "ceilings": {"copy": 4000.0, "fp32": 5e4, "tf32": 3e5, "bf16": 7e5, "fp16": 7e5},
}
US = ("fused", "fused channels_last", "fused triton", "kernel wgmma", *network.goals.PEERS, "cuBLAS")
TRAINED = ("eager", "eager channels_last", "inductor", "fused", "fused triton")


def _times(provider: str, factor: float) -> float:
    return factor if provider.startswith("fused") else 10.0


def _network(model: str, dtype: str, batch: int, provider: str, ms: float) -> dict[str, Any]:
    row = {"model": model, "dtype": dtype, "batch": batch, "provider": provider, "ms": ms, "ms_per_image": ms / batch}
    row |= {"images_per_s": 1e3 * batch / ms, "status": "timed", "note": "", "error": 1e-3, "allowed": 2e-3}
    return {**row, "kind": provider.split(",")[0].split()[0], "match": True, "peak_gflops": {}}


def _networks(rows: list[dict[str, Any]], cells: list[network.Cell], factor: float) -> None:
    for model, dtype, batch, providers in cells:
        for provider in providers:
            if not (model in {n.name for n in NETWORKS if n.gmac} and provider.startswith("fused")):
                rows.append(_network(model, dtype, batch, provider, batch / 100 * _times(provider, factor)))


def _operators(keys: list[dict[str, Any]], factor: float) -> list[dict[str, Any]]:
    rows = []
    for key in keys:
        us = {name: _times(name, factor) for name in US}
        row = {**key, "us": us, "flop": 1e9, "bytes": 1e6 * (1 + key.get("k", 40)), "note": "", "match": True}
        row |= {"error": 1e-3, "percent_of_copy": 100 / factor, "percent_of_floor": 100 / factor}
        rows.append({**row, "percent_of_cublas": 1000 / factor, "speedup": 10 / factor})
    return rows


def records(factor: float) -> dict[str, Any]:
    found: dict[str, Any] = {"machine": MACHINE, "models": [], "rival_networks": [], "training": []}
    for section, known in (("models", True), ("rival_networks", False)):
        cells = [cell for cell in network.CELLS if (cell[0] not in network.RIVALS) == known]
        _networks(found[section], cells, factor)
    for model, dtype, batch in training.CELLS:
        for provider in TRAINED:
            row = _network(model, dtype, batch, provider, batch / 1000 * _times(provider, factor))
            found["training"].append({**row, "memory": {"call": _times(provider, 10 * factor)}})
    found["gpu_ops"] = _operators([ops.key_of(*case) for case in ops.CASES], factor)
    found["gpu_product"] = _operators([product.key_of(*case) for case in product.CASES], factor)
    return found
