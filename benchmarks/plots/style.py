"""Colours, sizes and names that all pictures share, and what they do with rows."""

from collections.abc import Iterable, Mapping
from typing import Any

import matplotlib

matplotlib.use("Agg")  # no window

from matplotlib import pyplot
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter, NullLocator

Row = Mapping[str, Any]
Content = Mapping[str, Any]

# The subject in the one warm colour, peers in cool ones, plain PyTorch in greys.
COLOURS = {
    "fused": "#d1495b",
    "openvino": "#00798c",
    "onnxruntime": "#3f88c5",
    "inductor": "#7a6ff0",
    "eager channels_last": "#8d99ae",
    "eager": "#4a5568",
    # on a GPU
    "fused, CUDA graph": "#8f2d56",
    "inductor, layout kept": "#b8a9ff",
    "inductor, max-autotune": "#4b3fa8",
    "eager channels_last, cudnn.benchmark": "#c9b458",
    "eager, cudnn.benchmark": "#a0843a",
    "eager, CUDA graph": "#222222",
}
MARKERS = {
    "fused": "o",
    "openvino": "s",
    "onnxruntime": "D",
    "inductor": "^",
    "eager channels_last": "v",
    "eager": "P",
}
MARKERS |= {name: "." for name in COLOURS if name not in MARKERS}
DTYPES = {"fp32": "float32", "tf32": "TF32", "bf16": "bfloat16", "fp16": "float16"}
STYLE = {
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#888888",
    "axes.titlesize": 11,
    "axes.titleweight": "bold",
    "figure.facecolor": "white",
}


def grid(rows: int, columns: int, title: str, size: tuple[float, float]) -> tuple[Figure, Any]:
    """Axes [rows][columns] under a title, with room for the line about the machine."""
    figure, axes = pyplot.subplots(rows, columns, figsize=size, squeeze=False, layout="constrained")
    engine: Any = figure.get_layout_engine()
    engine.set(rect=(0, 0.035, 1, 0.965), wspace=0.04, hspace=0.06)
    figure.suptitle(title, x=0.01, ha="left", fontweight="bold")
    return figure, axes


def kinds(rows: Iterable[Row], key: str) -> list[Any]:
    """The values of a column, in their order."""
    return list(dict.fromkeys(row[key] for row in rows))


def providers(rows: Iterable[Row]) -> list[str]:
    found = kinds(rows, "provider")
    return [name for name in COLOURS if name in found]


def timed(content: Content, section: str) -> list[Row]:
    return [row for row in content.get(section, ()) if row["status"] == "timed"]


def dash(dtype: str) -> str:
    return "--" if dtype == "fp32" else "-"


def line(axes: Axes, x: list[float], y: list[float], provider: str, dtype: str) -> None:
    subject = provider == "fused"
    axes.plot(
        x,
        y,
        color=COLOURS[provider],
        linestyle=dash(dtype),
        marker=MARKERS[provider],
        markersize=6 if subject else 4,
        linewidth=2.4 if subject else 1.2,
        zorder=3 if subject else 2,
    )


def legend(figure: Figure, names: Iterable[str], dtypes: Iterable[str]) -> None:
    lines = [Line2D([], [], color=COLOURS[n], marker=MARKERS[n], markersize=5, label=n) for n in names]
    lines += [Line2D([], [], color="#555555", linestyle=dash(d), label=DTYPES[d]) for d in dtypes]
    figure.legend(handles=lines, loc="outside right center", frameon=False, fontsize=9)


def log_scale(axes: Axes, x: Iterable[float], y: str) -> None:
    """Both logarithmic; ticks at the given x, and readable ones at y, which is named."""
    x = sorted(set(x))
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xticks(x, [f"{value:g}" for value in x])
    axes.set_xlim(x[0] / 1.3, x[-1] * 1.3)
    axes.xaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 1.5, 2, 3, 5, 7)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.grid(which="both", color="#eeeeee", linewidth=0.8)
    axes.set_ylabel(y)
