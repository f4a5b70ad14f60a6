"""Pictures of kernels: speed-up against kernel size, roofline, where the time of a network goes."""

import statistics

from matplotlib.figure import Figure
from matplotlib.patches import Patch

from benchmarks.networks import SPECS
from benchmarks.plots import style
from benchmarks.plots.style import Content

_OPS = {"depthwise_block": "o", "depthwise_layer": "s", "pointwise_block": "^"}
_INK = {"fp32": "#3f88c5", "bf16": "#d1495b", "fp16": "#e09f3e"}
_PARTS = {
    "depthwise": "#d1495b",
    "pointwise": "#3f88c5",
    "activation": "#e09f3e",
    "BatchNorm": "#8d99ae",
    "stem, pool, head, rest": "#cccccc",
}


def speedup(content: Content) -> Figure | None:
    """Of a depthwise block over plain PyTorch in its best layout: the middle of all shapes, and their range."""
    rows = [row for row in content.get("ops", ()) if row["op"] == "depthwise_block"]
    if len(style.kinds(rows, "k")) < 3:
        return None
    figure, grid = style.grid(1, 1, "Depthwise block: times faster than plain PyTorch", (6.4, 4.2))
    axes = grid[0][0]
    for dtype in style.kinds(rows, "dtype"):
        groups = {k: [r["x_best"] for r in rows if (r["k"], r["dtype"]) == (k, dtype)] for k in style.kinds(rows, "k")}
        sizes = sorted(k for k in groups if groups[k])
        middle = [statistics.geometric_mean(groups[k]) for k in sizes]
        axes.plot(sizes, middle, "o-", color=_INK[dtype], label=style.DTYPES[dtype])
        axes.fill_between(sizes, *([f(groups[k]) for k in sizes] for f in (min, max)), color=_INK[dtype], alpha=0.15)
    style.log_scale(axes, style.kinds(rows, "k"), "plain / fused")
    axes.axhline(1, color="#222222", linewidth=1)
    axes.set_xlabel("kernel size k")
    axes.legend(frameon=False)
    return figure


def roofline(content: Content) -> Figure | None:
    """GFLOP/s against FLOP a byte: every operator that was timed, under the ceilings of the machine."""
    ceilings = content["machine"].get("ceilings", {})
    rows = [row for row in content.get("ops", ()) if "gflops" in row]
    if not rows or "copy" not in ceilings:
        return None
    figure, grid = style.grid(1, 1, "Roofline: operators alone, tensors moved once", (6.8, 4.6))
    axes = grid[0][0]
    x = [row["flop"] / row["bytes"] for row in rows]
    ends = [min(x) / 2, max(x) * 2]
    for dtype in style.kinds(rows, "dtype"):
        for op, marker in _OPS.items():
            of_op = [row for row in rows if (row["op"], row["dtype"]) == (op, dtype)]
            points = [row["flop"] / row["bytes"] for row in of_op], [row["gflops"] for row in of_op]
            if of_op:
                axes.loglog(*points, marker, color=_INK[dtype], markersize=5, label=f"{op}, {style.DTYPES[dtype]}")
        if dtype in ceilings:
            knee = ceilings[dtype] / ceilings["copy"]
            roof = [ends[0], knee, ends[1]]
            axes.loglog(
                roof, [min(ceilings[dtype], i * ceilings["copy"]) for i in roof], color=_INK[dtype], linewidth=1
            )
            axes.text(ends[1], ceilings[dtype] * 1.05, f"{style.DTYPES[dtype]} peak", ha="right", fontsize=8)
    axes.set_xlabel("FLOP a byte (input, output and weight moved once)")
    axes.set_ylabel("GFLOP/s")
    axes.grid(which="both", color="#eeeeee")
    axes.legend(frameon=False, fontsize=8)
    return figure


def breakdown(content: Content) -> Figure | None:
    """A bar a model, dtype and provider; time stacked by part."""
    rows = content.get("breakdown", ())
    if not rows:
        return None
    figure, grid = style.grid(1, len(style.kinds(rows, "dtype")), "Time of one image, by part", (11, 3.9))
    for axes, dtype in zip(grid[0], style.kinds(rows, "dtype"), strict=True):
        of_dtype = [row for row in rows if row["dtype"] == dtype][::-1]
        names = [f"{row['model'].removeprefix('convmixer_')}  {row['provider']}" for row in of_dtype]
        left = [0.0] * len(of_dtype)
        for part, colour in _PARTS.items():
            widths = [row["ms"].get(part, 0.0) for row in of_dtype]
            axes.barh(names, widths, left=left, color=colour)
            left = [a + b for a, b in zip(left, widths, strict=True)]
        axes.set_title(style.DTYPES[dtype])
        axes.set_xlabel("milliseconds")
    figure.legend(
        handles=[Patch(color=colour, label=part) for part, colour in _PARTS.items()],
        loc="outside lower right",
        ncols=len(_PARTS),
        frameon=False,
        fontsize=9,
    )
    return figure


def training(content: Content) -> Figure | None:
    """Memory that a training step takes, and its time, against the batch size: a column a model and dtype."""
    rows = style.timed(content, "training")
    if not rows:
        return None
    columns = list(dict.fromkeys((row["model"], row["dtype"]) for row in rows))
    size = (4.3 * len(columns) + 1.2, 6.4)
    figure, grid = style.grid(2, len(columns), "Training step: forward, backward, AdamW", size)
    for j, (model, dtype) in enumerate(columns):
        here = [row for row in rows if (row["model"], row["dtype"]) == (model, dtype)]
        for name in reversed(style.providers(here)):
            mine = sorted((row for row in here if row["provider"] == name), key=lambda row: row["batch"])
            batches = [row["batch"] for row in mine]
            if all("call" in row["memory"] for row in mine):
                style.line(grid[0][j], batches, [row["memory"]["call"] for row in mine], name, dtype)
            style.line(grid[1][j], batches, [row["ms"] for row in mine], name, dtype)
        pixels = SPECS[model].image_size
        grid[0][j].set_title(f"{model}, {style.DTYPES[dtype]}, {pixels} x {pixels}", fontsize=9)
        style.log_scale(grid[0][j], style.kinds(here, "batch"), "MiB that a step takes" if j == 0 else "")
        style.log_scale(grid[1][j], style.kinds(here, "batch"), "milliseconds a step" if j == 0 else "")
        grid[1][j].set_xlabel("images in a batch")
    style.legend(figure, style.providers(rows), ())
    return figure
