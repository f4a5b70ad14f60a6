"""Records of the CPU's and of the GPU's benchmarks in one form."""

from collections.abc import Iterator, Mapping
from itertools import groupby
from typing import Any

from benchmarks.timm_models import NETWORKS

Row = Mapping[str, Any]
Content = Mapping[str, Any]


def operators(content: Content) -> list[Row]:
    """A row an operator, case and provider of ours, with op, k, dtype, provider; flop, bytes, gflops; x_best, the times
    that it is faster than PyTorch in its best way."""
    rows = [{**row, "provider": "fused"} for row in content.get("ops", ())]
    for row in (*content.get("gpu_ops", ()), *content.get("gpu_product", ())):
        rows += _of_gpu(row)
    return rows


def _of_gpu(row: Row) -> Iterator[Row]:
    us = row.get("us", {})
    peers = [value for name, value in us.items() if name.startswith(("eager", "inductor"))]
    for provider, value in us.items():
        if provider.startswith("fused"):
            found = {key: row[key] for key in ("op", "dtype", "flop", "bytes") if key in row}
            found |= {"k": row.get("k", 1), "provider": provider}
            found |= {"gflops": row["flop"] / value * 1e-3} if "flop" in row else {}
            yield {**found, "x_best": min(peers) / value} if peers else found


def rivals(content: Content) -> list[Row]:
    """A row a network, dtype and batch, with its published top-1; images/s ``plain`` by provider, and ``fused``."""
    if not content.get("rival_networks"):
        return list(content.get("rivals", ()))
    top1 = {network.name: network.top1 for network in NETWORKS}
    rows = [*content.get("models", ()), *content["rival_networks"]]
    rows = [row for row in rows if row["status"] == "timed" and row["model"] in top1]

    def key(row: Row) -> tuple[str, int, str]:
        return row["dtype"], row["batch"], row["model"]

    found = []
    for (dtype, batch, model), group in groupby(sorted(rows, key=key), key):
        rates = {row["provider"]: row["images_per_s"] for row in group}
        fused = [rate for name, rate in rates.items() if name.startswith("fused")]
        plain = {name: rate for name, rate in rates.items() if not name.startswith("fused")}
        row = {"model": model, "dtype": dtype, "batch": batch, "top1": top1[model], "plain": plain}
        if plain:
            found.append({**row, "fused": max(fused)} if fused else row)
    there = {(r["dtype"], r["batch"]) for r in found if "fused" not in r} & {  # a rival and one of ours
        (r["dtype"], r["batch"]) for r in found if "fused" in r
    }
    return [row for row in found if (row["dtype"], row["batch"]) in there]
