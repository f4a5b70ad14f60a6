"""python benchmarks/plots.py RESULTS.json ...: the pictures of a result, as PNG files beside it.

NAME_throughput.png   images per second of every provider, and the limit of the machine
NAME_latency.png      milliseconds an image against the batch size
"""

import json
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")  # no window

from matplotlib import pyplot
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter, NullLocator

Row = Mapping[str, Any]

# The subject in the one warm colour, peers in cool ones, plain PyTorch in greys.
_COLOURS = {
    "fused": "#d1495b",
    "openvino": "#00798c",
    "onnxruntime": "#3f88c5",
    "inductor": "#7a6ff0",
    "eager channels_last": "#8d99ae",
    "eager": "#4a5568",
}
_MARKERS = {
    "fused": "o",
    "openvino": "s",
    "onnxruntime": "D",
    "inductor": "^",
    "eager channels_last": "v",
    "eager": "P",
}
_DTYPES = {"fp32": "float32", "bf16": "bfloat16"}
_STYLE = {
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#888888",
    "axes.titlesize": 11,
    "axes.titleweight": "bold",
    "figure.facecolor": "white",
}


def draw(path: Path) -> list[Path]:
    """Draw what the file holds; returns what was written."""
    content = json.loads(path.read_text())
    rows = [row for row in content["models"] if row["status"] == "timed"]
    if not rows:
        return []
    written = []
    with pyplot.rc_context(_STYLE):
        for name, figure in (("throughput", _throughput(rows)), ("latency", _latency(rows))):
            about = content["machine"]
            versions = "   ".join(f"{package} {version}" for package, version in about["versions"].items())
            text = f"{about['cpu']}, {about['threads']} threads, {about['isa']}   {versions}   {about['date'][:10]}"
            figure.text(0.01, 0.006, text, fontsize=7.5, color="#777777")
            written.append(path.with_name(f"{path.stem}_{name}.png"))
            figure.savefig(written[-1], dpi=150)
            pyplot.close(figure)
    return written


def _throughput(rows: Sequence[Row]) -> Figure:
    """A column a model, a row a dtype; a bar a provider and batch size; the limit as a line."""
    models, dtypes, batches = _kinds(rows, "model"), _kinds(rows, "dtype"), _kinds(rows, "batch")
    providers = [name for name in _COLOURS if name in _kinds(rows, "provider")]
    size = (4.3 * len(models) + 1.2, (0.22 * len(providers) * len(batches) + 1.1) * len(dtypes) + 0.9)
    figure, grid = pyplot.subplots(len(dtypes), len(models), figsize=size, squeeze=False, layout="constrained")
    figure.get_layout_engine().set(rect=(0, 0.035, 1, 0.965), wspace=0.04, hspace=0.06)
    for i, dtype in enumerate(dtypes):
        of_dtype = [row for row in rows if row["dtype"] == dtype]
        present = [name for name in providers if name in _kinds(of_dtype, "provider")]
        for j, model in enumerate(models):
            _bars(grid[i][j], [row for row in of_dtype if row["model"] == model], present, batches)
            if i == 0:
                grid[i][j].set_title(model)
            if j == 0:
                grid[i][j].set_ylabel(_DTYPES[dtype], fontweight="bold", fontsize=11)
            else:
                grid[i][j].set_yticklabels([])
        grid[i][len(models) // 2].set_xlabel("images per second" if i == len(dtypes) - 1 else "")
    shades = [Patch(color="#555555", alpha=_shade(i, batches), label=f"batch {b}") for i, b in enumerate(batches)]
    limit = Line2D([], [], color="#222222", linestyle="--", linewidth=1.2, label="limit: all multiply-adds at the peak")
    figure.legend(handles=[*shades, limit], loc="upper right", ncols=len(batches) + 1, frameon=False, fontsize=9)
    figure.suptitle("ConvMixer inference, 224 x 224: images per second", x=0.01, ha="left", fontweight="bold")
    return figure


def _bars(axes: Axes, rows: Iterable[Row], providers: Sequence[str], batches: Sequence[int]) -> None:
    found = {(row["provider"], row["batch"]): row for row in rows}
    height = 0.82 / len(batches)
    top = max([row["images_per_s"] for row in found.values()] + [row.get("limit_images_per_s", 0) for row in rows])
    for i, provider in enumerate(reversed(providers)):
        for j, batch in enumerate(batches):
            row = found.get((provider, batch))
            y = i + 0.41 - (j + 0.5) * height
            if row is None:
                continue
            rate = row["images_per_s"]
            axes.barh(y, rate, height * 0.92, color=_COLOURS[provider], alpha=_shade(j, batches))
            weight = "bold" if provider == "fused" else "normal"
            behind = {"facecolor": "white", "edgecolor": "none", "pad": 0.8}  # hides the line of the limit
            place = (rate + top * 0.012, y)
            axes.text(*place, f"{rate:#.3g}", va="center", fontsize=8, fontweight=weight, bbox=behind, zorder=4)
    limits = [row["limit_images_per_s"] for row in found.values() if "limit_images_per_s" in row]
    if limits:
        axes.axvline(max(limits), color="#222222", linestyle="--", linewidth=1.2, zorder=3)
    axes.set_yticks(range(len(providers)), reversed(providers))
    for label in axes.get_yticklabels():
        label.set_fontweight("bold" if label.get_text() == "fused" else "normal")
    axes.set_xlim(0, top * 1.14)
    axes.tick_params(axis="y", length=0)


def _latency(rows: Sequence[Row]) -> Figure:
    """A column a model; a line a provider and dtype; both axes logarithmic."""
    models, dtypes = _kinds(rows, "model"), _kinds(rows, "dtype")
    providers = [name for name in _COLOURS if name in _kinds(rows, "provider")]
    size = (4.3 * len(models) + 1.2, 4.6)
    figure, grid = pyplot.subplots(1, len(models), figsize=size, squeeze=False, layout="constrained")
    figure.get_layout_engine().set(rect=(0, 0.035, 1, 0.965), wspace=0.04)
    for axes, model in zip(grid[0], models, strict=True):
        for provider in reversed(providers):
            for dtype in dtypes:
                _line(axes, [r for r in rows if (r["model"], r["provider"], r["dtype"]) == (model, provider, dtype)])
        axes.set_title(model)
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        batches = _kinds([row for row in rows if row["model"] == model], "batch")
        axes.set_xticks(batches, map(str, batches))
        axes.set_xlim(batches[0] / 1.3, batches[-1] * 1.3)
        axes.xaxis.set_minor_locator(NullLocator())
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 1.5, 2, 3, 5, 7)))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.yaxis.set_minor_locator(LogLocator(subs=(4,)))
        axes.yaxis.set_minor_formatter(NullFormatter())
        axes.grid(which="both", color="#eeeeee", linewidth=0.8)
        axes.set_xlabel("images in a batch")
    grid[0][0].set_ylabel("milliseconds an image")
    lines = [
        Line2D([], [], color=_COLOURS[name], marker=_MARKERS[name], markersize=5, label=name) for name in providers
    ]
    lines += [Line2D([], [], color="#555555", linestyle=_dash(dtype), label=_DTYPES[dtype]) for dtype in dtypes]
    figure.legend(handles=lines, loc="outside right center", frameon=False, fontsize=9)
    figure.suptitle(
        "ConvMixer inference, 224 x 224: time of an image, in a batch", x=0.01, ha="left", fontweight="bold"
    )
    return figure


def _line(axes: Axes, rows: Sequence[Row]) -> None:
    if not rows:
        return
    rows = sorted(rows, key=lambda row: row["batch"])
    provider, subject = rows[0]["provider"], rows[0]["provider"] == "fused"
    axes.plot(
        [row["batch"] for row in rows],
        [row["ms"] / row["batch"] for row in rows],
        color=_COLOURS[provider],
        linestyle=_dash(rows[0]["dtype"]),
        marker=_MARKERS[provider],
        markersize=6 if subject else 4,
        linewidth=2.4 if subject else 1.2,
        zorder=3 if subject else 2,
    )


def _dash(dtype: str) -> str:
    return "--" if dtype == "fp32" else "-"


def _shade(index: int, batches: Sequence[int]) -> float:
    """Darker for larger batches."""
    return 1.0 if len(batches) == 1 else 0.5 + 0.5 * index / (len(batches) - 1)


def _kinds(rows: Iterable[Row], key: str) -> list[Any]:
    """The values of a column, in their order."""
    return list(dict.fromkeys(row[key] for row in rows))


if __name__ == "__main__":
    for argument in sys.argv[1:]:
        for png in draw(Path(argument)):
            print(png)
