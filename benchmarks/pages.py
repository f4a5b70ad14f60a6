"""python -m benchmarks.pages: the tables of README.md and RESULTS.md again, from the stored results.

A table stands between ``<!-- table: KIND FILE -->`` and ``<!-- end -->``. KIND is a function of this module, FILE one
of results/ without its ending; "published" has figures of others, which timm_models.py holds, and no file.
"""

import json
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks import tables, timm_models
from benchmarks.networks import SPECS

ROOT = Path(__file__).resolve().parent.parent
PAGES = ("README.md", "RESULTS.md")
TABLE = re.compile(r"(<!-- table: (\w+) ?(\S*) -->\n).*?(<!-- end -->)", re.DOTALL)
NAMES = {
    "eager": "eager NCHW",
    "eager channels_last": "eager channels_last",
    "inductor": "Inductor",
    "onnxruntime": "ONNX Runtime",
    "openvino": "OpenVINO",
    "fused": "**fused**",
}
Rows = Sequence[Mapping[str, Any]]


def stored(name: str) -> dict[str, Any]:
    """The content of results/NAME.json."""
    found: dict[str, Any] = json.loads((ROOT / "benchmarks" / "results" / f"{name}.json").read_text())
    return found


def written(text: str) -> str:
    """The page with its tables as the stored results give them."""

    def table(match: re.Match[str]) -> str:
        begin, kind, name, end = match.groups()
        lines = TABLES[kind](stored(name) if name else {})
        return "\n".join([begin.rstrip(), *tables.markdown(lines), end])

    return TABLE.sub(table, text)


def rate(value: float | None) -> str:
    """Images per second, to three digits or whole."""
    if value is None:
        return ""
    return f"{value:,.0f}" if value >= 1000 else f"{value:#.3g}".rstrip(".")


def by_race(rows: Rows, *keys: str) -> dict[tuple[Any, ...], dict[str, Mapping[str, Any]]]:
    """The providers that ran against each other, in the order of the rows."""
    found: dict[tuple[Any, ...], dict[str, Mapping[str, Any]]] = {}
    for row in rows:
        found.setdefault(tuple(row[key] for key in keys), {})[row["provider"]] = row
    return found


def networks(results: Mapping[str, Any]) -> list[list[str]]:
    races = by_race(results["models"], "model", "batch", "dtype")
    providers = [name for name in NAMES if any(name in race for race in races.values())]
    columns = ["x eager", "x best peer", "of the arithmetic limit"]
    lines, before = [["model", "dtype", "batch", *map(NAMES.__getitem__, providers), *columns]], ""
    for (model, batch, dtype), race in races.items():
        spec, fused = SPECS[model], race["fused"]
        label = "" if model == before else f"{spec.dim}/{spec.depth}, k {spec.kernel_size}"
        rates = [rate(race[name]["images_per_s"]) if name in race else "" for name in providers]
        rates[-1] = f"**{rates[-1]}**"
        ratios = [f"{fused['speedup']:.2f}", f"{fused['over_peers']:.2f}", f"{fused['percent_of_limit']:.0f} %"]
        lines.append([label, dtype, str(batch), *rates, *ratios])
        before = model
    return lines


def training(results: Mapping[str, Any]) -> list[list[str]]:
    providers = ("eager", "eager channels_last", "fused")
    names = [NAMES[name] for name in providers]
    ratios, memory = "x eager NCHW, channels_last", "MiB that a step adds: eager, channels_last, fused"
    lines = [["model", "batch", *names, ratios, memory]]
    for (model, batch), race in by_race(results["training"], "model", "batch").items():
        spec, rates = SPECS[model], [race[name]["images_per_s"] for name in providers]
        size = f"k {spec.kernel_size}, patch {spec.patch_size}, {spec.image_size} x {spec.image_size}"
        lines.append(
            [
                f"{spec.dim}/{spec.depth} ({size})",
                str(batch),
                *map(rate, rates[:2]),
                f"**{rate(rates[2])}**",
                ", ".join(f"{rates[2] / eager:.2f}" for eager in rates[:2]),
                ", ".join(f"{race[name]['memory']['call']:.0f}" for name in providers),
            ]
        )
    return lines


def rivals(results: Mapping[str, Any]) -> list[list[str]]:
    """Plain: the faster of the two layouts."""
    dtypes = ("fp32", "bf16")
    kinds = [f"{dtype} {kind}" for dtype in dtypes for kind in ("plain", "fused")]
    lines = [["network", "top-1", "GMAC", *kinds]]
    rows = {(row["model"], row["dtype"]): row for row in results["rivals"]}
    for model in dict.fromkeys(model for model, _ in rows):
        first, found = rows[model, dtypes[0]], []
        for dtype in dtypes:
            fused = rate(rows[model, dtype].get("fused"))
            found += [rate(max(rows[model, dtype]["plain"].values())), fused and f"**{fused}**"]
        lines.append([model, f"{first['top1']:.1f}", f"{first['gmac']:.1f}", *found])
    return lines


def swapped(results: Mapping[str, Any]) -> list[list[str]]:
    """Milliseconds."""
    rows = results["swapped"]
    names = list(rows[0]["ms"])
    lines = [["network", "what", "dtype", *names, "x plain"]]
    for row in rows:
        found = [f"{row['ms'][name]:.0f}" for name in names]
        lines.append([row["model"], row["kind"], row["dtype"], *found, f"{row['speedup']:.2f}"])
    return lines


def published(_: Mapping[str, Any]) -> list[list[str]]:
    lines = [["network", "top-1", *timm_models.PUBLISHED_ON]]
    for network in timm_models.NETWORKS:
        lines.append([f"{network.name}.{network.weights}", f"{network.top1:.3f}", *map(str, network.published)])
    return lines


def fastest(race: Mapping[str, Mapping[str, Any]], begins: tuple[str, ...]) -> Mapping[str, Any] | None:
    rows = [row for name, row in race.items() if name.startswith(begins) and row["status"] == "timed"]
    return min(rows, key=lambda row: row["ms"], default=None)


def gpu_networks(results: Mapping[str, Any]) -> list[list[str]]:
    """Eager: the faster of what was measured; fused: called as it is, and the fastest way in a CUDA graph."""
    found = by_race([*results["models"], *results.get("rival_networks", ())], "model", "batch", "dtype")
    lines = [["network", "dtype", "batch", "eager", "Inductor", "**fused**", "**fused**, CUDA graph", "x best PyTorch"]]
    for (model, batch, dtype), race in found.items():
        ours = {name: row for name, row in race.items() if name.startswith("fused")}
        graphs = {name: row for name, row in ours.items() if "CUDA graph" in name}
        others = {name: row for name, row in race.items() if name not in ours}
        rows = (fastest(others, ("eager",)), fastest(others, ("inductor",)), race.get("fused"))
        cells = [rate(row and row.get("images_per_s")) for row in (*rows, fastest(graphs, ("fused",)))]
        best, peer = fastest(ours, ("fused",)), fastest(others, ("eager", "inductor"))
        times = f"{peer['ms'] / best['ms']:.1f}" if best and peer else ""
        lines.append([model, dtype, str(batch), *cells[:2], *(cell and f"**{cell}**" for cell in cells[2:]), times])
    return filled(lines)


def filled(lines: list[list[str]]) -> list[list[str]]:
    """Without the columns that are empty."""
    keep = [any(line[i] for line in lines[1:]) for i in range(len(lines[0]))]
    return [[cell for cell, kept in zip(line, keep, strict=True) if kept] for line in lines]


def gpu_training(results: Mapping[str, Any]) -> list[list[str]]:
    lines = [["network", "dtype", "batch", "eager", "**fused**", "x eager", "MiB that a step adds: eager, fused"]]
    for (model, batch, dtype), race in by_race(results["training"], "model", "batch", "dtype").items():
        eager, fused = fastest(race, ("eager",)), fastest(race, ("fused",))
        if eager and fused:
            rates = eager["images_per_s"], fused["images_per_s"]
            used = ", ".join(f"{row['memory']['call']:.0f}" for row in (eager, fused))
            cells = [rate(rates[0]), f"**{rate(rates[1])}**", f"{rates[1] / rates[0]:.1f}", used]
            lines.append([model, dtype, str(batch), *cells])
    return lines


def _gpu_rows(rows: Rows, columns: Mapping[str, str]) -> list[list[str]]:
    """Microseconds of ours and of the fastest of PyTorch's ways; then columns of the records."""
    lines = [["shape", "dtype", "**fused**, us", "channels_last", "best PyTorch", *columns.values()]]
    for row in rows:
        us = row.get("us", {})
        peers = [value for name, value in us.items() if name.startswith(("eager", "inductor"))]
        shape = f"{row['op']} {row['shape']}" + (f", k {row['k']}" if "k" in row else "")
        times = (us.get("fused"), us.get("fused channels_last"), min(peers, default=None))
        cells = ["" if value is None else f"{value:.1f}" for value in (*times, *map(row.get, columns))]
        lines.append([shape, row["dtype"], *cells])
    return lines


def gpu_ops(results: Mapping[str, Any]) -> list[list[str]]:
    return _gpu_rows(results["gpu_ops"], {"speedup": "x best PyTorch", "percent_of_copy": "% of copy"})


def gpu_product(results: Mapping[str, Any]) -> list[list[str]]:
    return _gpu_rows(results["gpu_product"], {"speedup": "x best PyTorch", "percent_of_cublas": "% of cuBLAS"})


_GPU = (gpu_networks, gpu_training, gpu_ops, gpu_product)
TABLES: Mapping[str, Callable[[Mapping[str, Any]], list[list[str]]]] = {
    function.__name__: function for function in (networks, training, rivals, swapped, published, *_GPU)
}

if __name__ == "__main__":
    for page in PAGES:
        path = ROOT / page
        path.write_text(written(path.read_text()))
