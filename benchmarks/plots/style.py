"""Colours, sizes and names that all pictures share, and what they do with rows."""

import textwrap
from collections.abc import Iterable
from typing import Any

import matplotlib

matplotlib.use("Agg")  # no window

from matplotlib import pyplot
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter, NullLocator

from benchmarks.plots.records import Content, Row

# By network and layout, which stand before the first comma of a provider's name: the subject in warm colours, peers in
# cool ones, plain PyTorch in greys.
COLOURS = {
    "fused": "#d1495b",
    "fused channels_last": "#8f2d56",
    "fused triton": "#e07a3f",
    "openvino": "#00798c",
    "onnxruntime": "#3f88c5",
    "inductor": "#7a6ff0",
    "eager channels_last": "#8d99ae",
    "eager": "#4a5568",
}
# By the same, or by what stands behind the comma.
MARKERS = {
    "fused": "o",
    "fused channels_last": "p",
    "fused triton": "h",
    "openvino": "s",
    "onnxruntime": "D",
    "inductor": "^",
    "eager channels_last": "v",
    "eager": "P",
    "CUDA graph": "*",
    "at once, CUDA graph": "<",
    "micro-batches, CUDA graph": ">",
    "cudnn.benchmark": "X",
    "layout kept": "d",
    "max-autotune": "8",
    "max-autotune, layout kept": "H",
}
DTYPES = {"fp32": "float32", "tf32": "TF32", "bf16": "bfloat16", "fp16": "float16", "bf16-model": "bfloat16 model"}
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
    """Axes [rows][columns] under a title."""
    figure, axes = pyplot.subplots(rows, columns, figsize=size, squeeze=False, layout="constrained")
    figure.get_layout_engine().set(wspace=0.04, hspace=0.06)
    figure.suptitle(title, x=0.01, ha="left", fontweight="bold")
    return figure, axes


def footer(figure: Figure, lines: Iterable[str]) -> None:
    """Small lines at the lower edge, as many as their words need; the axes make room for them."""
    width, height = figure.get_size_inches()
    wrapped = [part for line in lines for part in textwrap.wrap(line, int(18 * width))]
    room = (0.12 * len(wrapped) + 0.1) / height
    figure.get_layout_engine().set(rect=(0, room, 1, 1 - room))
    figure.text(0.01, 0.05 / height, "\n".join(wrapped), fontsize=6.5, color="#777777", va="bottom")


def kinds(rows: Iterable[Row], key: str) -> list[Any]:
    """The values of a column, in their order."""
    return list(dict.fromkeys(row[key] for row in rows))


def providers(rows: Iterable[Row]) -> list[str]:
    """All of them, in the order of the tables above."""
    heads, ends = list(COLOURS), list(MARKERS)

    def place(name: str) -> tuple[int, int]:
        return heads.index(name.split(", ")[0]), ends.index(name.split(", ", 1)[-1])

    return sorted(kinds(rows, "provider"), key=place)


def colour(provider: str) -> str:
    return COLOURS[provider.split(", ")[0]]


def marker(provider: str) -> str:
    return MARKERS[provider.split(", ", 1)[-1]]


def timed(content: Content, section: str) -> list[Row]:
    return [row for row in content.get(section, ()) if row["status"] == "timed"]


def dash(dtype: str) -> str:
    return "--" if dtype == "fp32" else "-"


def line(axes: Axes, x: list[float], y: list[float], provider: str, dtype: str) -> None:
    subject = provider.startswith("fused")
    axes.plot(
        x,
        y,
        color=colour(provider),
        linestyle=dash(dtype),
        marker=marker(provider),
        markersize=6 if subject else 4,
        linewidth=2.4 if subject else 1.2,
        zorder=3 if subject else 2,
    )


def legend(figure: Figure, names: Iterable[str], dtypes: Iterable[str]) -> None:
    lines = [Line2D([], [], color=colour(n), marker=marker(n), markersize=5, label=n) for n in names]
    lines += [Line2D([], [], color="#555555", linestyle=dash(d), label=DTYPES[d]) for d in dtypes]
    figure.legend(handles=lines, loc="outside right center", frameon=False, fontsize=9)


def readable(axis: Axis, steps: tuple[float, ...] = (1, 2, 5)) -> None:
    """Ticks of a logarithmic axis at these steps of each decade, as plain numbers."""
    axis.set_major_locator(LogLocator(subs=steps))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_formatter(NullFormatter())


def log_scale(axes: Axes, x: Iterable[float], y: str) -> None:
    """Both logarithmic; ticks at the given x, and readable ones at y, which is named."""
    x = sorted(set(x))
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xticks(x, [f"{value:g}" for value in x])
    axes.set_xlim(x[0] / 1.3, x[-1] * 1.3)
    axes.xaxis.set_minor_locator(NullLocator())
    readable(axes.yaxis, (1, 1.5, 2, 3, 5, 7))
    axes.grid(which="both", color="#eeeeee", linewidth=0.8)
    axes.set_ylabel(y)
