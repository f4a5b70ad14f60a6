"""What was measured, as records (flat dictionaries), as JSON and as Markdown."""

import json
import statistics
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from benchmarks import fields, report_ops, tables, timm_csv
from benchmarks.machine import header
from benchmarks.networks import DTYPES, SPECS
from benchmarks.peers import PROVIDERS
from benchmarks.race import Result, Row

SECTIONS = {  # of the JSON file, besides machine and ops: what each is called, and its table
    "goals": ("Goals for an H200", tables.GOALS),
    "models": ("Inference", tables.NETWORKS),
    "breakdown": ("Where the time goes: parts of a network, milliseconds", tables.BREAKDOWN),
    "training": ("Training steps", tables.TRAINING),
    "rivals": ("The paper's table", tables.RIVALS),
    "swapped": ("Depthwise convolutions of other networks, swapped by fuse()", tables.SWAPPED),
    "rival_networks": ("Rivals of the paper's table", tables.NETWORKS),
    "gpu_ops": (
        "Depthwise block: conv, bias, GELU, scale, shift, residual; steps of a layer. Microseconds, L2 flushed",
        tables.GPU_OPS,
    ),
    "gpu_product": (
        "Products: output shape, patch. Microseconds, L2 flushed; cuBLAS: the product alone",
        tables.GPU_PRODUCT,
    ),
}


def records(results: Mapping[Row, Result]) -> list[dict[str, Any]]:
    """One flat dictionary a row; numbers only for what was timed."""
    return [{**record(result, results), "seconds": result.seconds} for result in results.values()]


def record(result: Result, results: Mapping[Row, Result], times: int = 1) -> dict[str, Any]:
    """times: how many times the arithmetic of a forward."""
    row, settings, timed = result.row, result.settings, result.status == "timed"
    found: dict[str, Any] = {**row._asdict(), "kind": PROVIDERS[row.provider].kind}
    found |= {"status": result.status, "note": result.note, "backend": settings.get("backend", "")}
    peaks = {dtype: statistics.median(rounds) for dtype, rounds in result.peaks.items() if rounds}
    backends = settings.get("backends", {"network": row.provider})
    work = SPECS[row.model].work(row.batch, DTYPES[row.dtype].itemsize, times)
    measured = (result.error, result.allowed, result.memory, work, result.median if timed else None, peaks)
    found |= fields.record(row.provider, row.dtype, settings.get("layout", ""), backends, *measured)
    if result.status in ("absent", "failed"):
        return found
    found |= {"match": result.status != "wrong", "top1": "{}/{}".format(*result.top1), "settings": settings}
    if not timed:
        return found
    found |= {
        "ms": result.median * 1e3,
        "ms_per_image": result.median / row.batch * 1e3,
        "spread": result.spread if len(result.seconds) > 1 else None,
        "calls": len(result.seconds),
        "peak_gflops": {dtype: [peak / 1e9 for peak in found] for dtype, found in result.peaks.items()},
    }
    for key, kind in (("speedup", "eager"), ("over_peers", "peer")):
        best = _best(row, kind, results)
        if best is not None:
            found[key] = best / result.median
    return found


def _best(row: Row, kind: str, results: Mapping[Row, Result]) -> float | None:
    """The fastest of a kind, in this dtype or a more exact one: who accepts bfloat16 would accept float32."""
    dtypes = ("fp32",) if row.dtype == "fp32" else ("fp32", row.dtype)
    return min(
        (
            other.median
            for key, other in results.items()
            if other.status == "timed" and PROVIDERS[key.provider].kind == kind
            if (key.model, key.batch) == (row.model, row.batch) and key.dtype in dtypes
        ),
        default=None,
    )


def remarks(rows: Iterable[Mapping[str, Any]]) -> list[str]:
    """What the table cannot say: races on a machine that was not quiet; why a row has no times."""
    lines, races = [], {}
    for row in rows:
        if row["note"]:
            lines.append("{model} b{batch} {dtype} {provider}: ".format_map(row) + row["note"].splitlines()[0])
        elif row["peak_gflops"].get("fp32"):
            races[row["model"], row["batch"]] = row["peak_gflops"]["fp32"]
    best = max((max(peaks) for peaks in races.values()), default=0)
    for (model, batch), peaks in races.items():
        if min(peaks) < 0.85 * best:
            found = f"its fp32 peak was down to {min(peaks):.0f} of {best:.0f} GFLOP/s"
            lines.append(f"{model} b{batch}: the machine was not quiet ({found}), time it again")
    return lines


def summary(kept: Mapping[str, list[dict[str, Any]]], style: str) -> list[str]:
    """style: "text" for the terminal, or "markdown"."""
    layout = {"text": tables.plain_text, "markdown": tables.markdown}[style]
    lines: list[str] = []
    for name, (title, columns) in SECTIONS.items():
        if kept.get(name):
            legend = tables.LEGEND if name == "models" else ()
            ends = "  " if style == "markdown" else ""
            lines += ["", f"## {title}" if ends else title, *(f"{line}{ends}" for line in legend), ""]
            lines += layout(tables.cells(kept[name], columns))
    if kept.get("ops"):
        fence = ["```"] if style == "markdown" else []
        lines += ["", *fence, *report_ops.summary(kept["ops"]), *fence]
    notes = [*remarks(kept.get("models", ())), *remarks(kept.get("training", ()))]
    return [*lines, "", *(f"- {line}" for line in notes)] if notes else lines


def write(folder: Path, name: str, about: Mapping[str, Any], kept: Mapping[str, list[dict[str, Any]]]) -> Path:
    """NAME.json, NAME.md, and in NAME-timm what timm has columns for."""
    folder.mkdir(exist_ok=True)
    path = folder / f"{name}.json"
    path.write_text(json.dumps({"machine": about, **kept}, indent=1) + "\n")
    text = ["# Benchmark results", "", *(f"{line}  " for line in header(about)), *summary(kept, "markdown")]
    (folder / f"{name}.md").write_text("\n".join(text) + "\n")
    for kind, section in (("infer", "models"), ("train", "training")):
        timm_csv.write(folder / f"{name}-timm", kind, kept.get(section, ()))
    return path
