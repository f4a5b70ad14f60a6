"""Results as a table in the terminal, as Markdown and as JSON."""

import json
import math
import os
import platform
import statistics
import subprocess
import sys
from collections.abc import Iterable, Mapping
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from benchmarks import report_ops
from benchmarks.networks import SPECS
from benchmarks.peers import PROVIDERS
from benchmarks.race import Result, Row

_COLUMNS = (
    ("model", "{model}"),
    ("batch", "{batch}"),
    ("dtype", "{dtype}"),
    ("provider", "{provider}"),
    ("images/s", "{images_per_s:.2f}"),
    ("ms/image", "{ms_per_image:.1f}"),
    ("spread", "{spread:.1%}"),
    ("x eager", "{speedup:.2f}"),
    ("x best peer", "{over_peers:.2f}"),
    ("GFLOP/s", "{gflops:.0f}"),
    ("% of limit", "{percent_of_limit:.0f}"),
    ("largest error", "{error:.1e}"),
    ("allowed", "{allowed:.1e}"),
    ("top-1", "{top1}"),
    ("MiB", "{memory_mib:.0f}"),
    ("backend", "{backend}"),
)
_TEXT = ("model", "dtype", "provider", "backend")


def machine() -> dict[str, Any]:
    """What a number depends on. No names of hosts or paths."""
    from cmx_kernels import registry

    packages = ("torch", "onnxruntime", "openvino", "timm", "numpy", "pytest-benchmark")
    isa = registry.isa_level() if hasattr(registry, "isa_level") else None
    return {
        "cpu": _cpu_model(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "threads": torch.get_num_threads(),
        "isa": isa or f"no compiled kernels (torch: {torch.backends.cpu.get_cpu_capability()})",
        "os": platform.system(),
        "python": platform.python_version(),
        "versions": {name: metadata.version(name) for name in packages if _installed(name)},
        "commit": _commit(),
        "date": datetime.now(timezone.utc).isoformat(timespec="minutes"),
        "command": " ".join(["pytest", *sys.argv[1:]]),
    }


def records(results: Mapping[Row, Result]) -> list[dict[str, Any]]:
    """One flat dictionary a row; numbers only for what was timed."""
    return [{**record(result, results), "seconds": result.seconds} for result in results.values()]


def limit_seconds(row: Row, peaks: Mapping[str, float]) -> float | None:
    """Of one image, if the products ran at the peak of the dtype and the depthwise convolutions at float32's."""
    spec = SPECS[row.model]
    if not {"fp32", row.dtype} <= peaks.keys():
        return None
    return spec.depthwise_flop / peaks["fp32"] + spec.matrix_flop / peaks[row.dtype]


def record(result: Result, results: Mapping[Row, Result]) -> dict[str, Any]:
    row, spec = result.row, SPECS[result.row.model]
    found: dict[str, Any] = {**row._asdict(), "kind": PROVIDERS[row.provider].kind}
    found |= {"status": result.status, "note": result.note, "backend": result.settings.get("backend", "")}
    if result.status == "absent" or result.status == "failed":
        return found
    found |= {
        "error": result.error if math.isfinite(result.error) else None,
        "allowed": result.allowed,
        "top1": "{}/{}".format(*result.top1),
    }
    found |= {"layout": result.settings.get("layout", ""), "settings": result.settings}
    if result.status != "timed":
        return found
    seconds = result.median / row.batch
    found |= {
        "images_per_s": 1 / seconds,
        "ms": result.median * 1e3,
        "ms_per_image": seconds * 1e3,
        "spread": result.spread,
        "calls": len(result.seconds),
        "gflops": spec.flop / seconds / 1e9,
        "memory_mib": result.memory,
        "peak_gflops": {dtype: [peak / 1e9 for peak in found] for dtype, found in result.peaks.items()},
    }
    limit = limit_seconds(row, {dtype: statistics.median(found) for dtype, found in result.peaks.items()})
    if limit is not None:
        found |= {"limit_images_per_s": 1 / limit, "percent_of_limit": 100 * limit / seconds}
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


LEGEND = (
    "224 x 224 photographs, random weights; medians of calls; spread: half the distance of the quartiles",
    "x eager, x best peer: against the fastest of them in this dtype or a more exact one",
    "limit: all multiply-adds at the arithmetic peak measured in the same turns (depthwise: at that of fp32)",
    "largest error: against float64; allowed: twice that of plain PyTorch in the same dtype, and rounding",
    "top-1: photographs whose class is that of plain float32",
)


def header(about: Mapping[str, Any]) -> list[str]:
    versions = ", ".join(f"{name} {version}" for name, version in about["versions"].items())
    return [
        f"{about['cpu']}, {about['cores']} cores, {about['threads']} threads, {about['isa']}; {about['date']}",
        f"{versions}; Python {about['python']}; commit {about['commit']}",
        f"command: {about['command']}",
    ]


def table(rows: Iterable[Mapping[str, Any]]) -> list[list[str]]:
    """Header and cells; columns that nobody fills are left out."""
    cells = [[_cell(form, row) for _, form in _COLUMNS] for row in rows]
    used = [i for i in range(len(_COLUMNS)) if any(line[i] for line in cells)]
    return [[_COLUMNS[i][0] for i in used], *([line[i] for i in used] for line in cells)]


def _cell(form: str, row: Mapping[str, Any]) -> str:
    try:
        return form.format_map(row)
    except (KeyError, TypeError):  # not measured
        return row["status"] if form.startswith("{images_per_s") else ""


def plain_text(lines: list[list[str]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    left = [name in _TEXT for name in lines[0]]
    text = []
    for i, line in enumerate(lines):
        if i > 1 and line[:2] != lines[i - 1][:2]:
            text.append("")
        cells = (c.ljust(w) if flush else c.rjust(w) for c, w, flush in zip(line, widths, left, strict=True))
        text.append("  ".join(cells).rstrip())
    return text


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


def markdown(lines: list[list[str]]) -> list[str]:
    rule = ["---" if name in _TEXT else "---:" for name in lines[0]]
    return ["| " + " | ".join(line) + " |" for line in (lines[0], rule, *lines[1:])]


def write(
    folder: Path, name: str, about: Mapping[str, Any], rows: list[dict[str, Any]], ops: list[dict[str, Any]]
) -> Path:
    folder.mkdir(exist_ok=True)
    path = folder / f"{name}.json"
    path.write_text(json.dumps({"machine": about, "models": rows, "ops": ops}, indent=1) + "\n")
    text = ["# Benchmark results", "", *(f"{line}  " for line in header(about)), ""]
    if rows:
        text += [*(f"{line}  " for line in LEGEND), "", *markdown(table(rows))]
    if ops:
        text += ["", "```", *report_ops.summary(ops), "```"]
    notes = [f"- {line}" for line in remarks(rows)]
    (folder / f"{name}.md").write_text("\n".join([*text, *(["", *notes] if notes else [])]) + "\n")
    return path


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def _installed(name: str) -> bool:
    try:
        metadata.version(name)
    except metadata.PackageNotFoundError:
        return False
    return True


def _commit() -> str:
    def git(*arguments: str) -> str:
        command = ["git", "-C", str(Path(__file__).parent), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    try:
        changed = git("status", "--porcelain", "--untracked-files=no")
        return git("rev-parse", "--short", "HEAD") + (" with changes" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
