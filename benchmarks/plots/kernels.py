"""Pictures of kernels: speed-up against kernel size, roofline, where the time of a network goes."""

import statistics
from collections.abc import Mapping

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from benchmarks.networks import SPECS
from benchmarks.plots import records, style
from benchmarks.plots.style import Content

_OPS = {"depthwise_block": "o", "depthwise_layer": "s", "depthwise_block_train": "v", "depthwise_train_layer": "h"}
_OPS |= {"pointwise_block": "^", "patch_embed": "D", "pool_head": "P"}
_INK = {"fp32": "#3f88c5", "tf32": "#00798c", "bf16": "#d1495b", "fp16": "#e09f3e"}
_LINES = {"fused": "-", "fused channels_last": ":", "fused triton": "--"}
_FILLS = {"fused": "full", "fused channels_last": "left", "fused triton": "none"}
_BESIDE = {"loc": "center left", "bbox_to_anchor": (1, 0.5)}  # a legend, to the right of its axes
_PARTS = {
    "depthwise": "#d1495b",
    "pointwise": "#3f88c5",
    "activation": "#e09f3e",
    "BatchNorm": "#8d99ae",
    "stem, pool, head, rest": "#cccccc",
}


def speedup(content: Content) -> Figure | None:
    """Of a depthwise block over PyTorch in its best way: the middle of all shapes, and their range."""
    rows = [row for row in records.operators(content) if row["op"] == "depthwise_block" and "x_best" in row]
    if len(style.kinds(rows, "k")) < 3:
        return None
    peers = "best of eager, cudnn.benchmark, Inductor" if "gpu_ops" in content else "plain PyTorch"
    figure, grid = style.grid(1, 1, f"Depthwise block: times faster than {peers}", (8.2, 4.2))
    axes = grid[0][0]
    for dtype, name in dict.fromkeys((row["dtype"], row["provider"]) for row in rows):
        mine = [row for row in rows if (row["dtype"], row["provider"]) == (dtype, name)]
        sizes = sorted(style.kinds(mine, "k"))
        groups = [[row["x_best"] for row in mine if row["k"] == k] for k in sizes]
        label = style.DTYPES[dtype] if name == "fused" else f"{style.DTYPES[dtype]}, {name}"
        middle = list(map(statistics.geometric_mean, groups))
        axes.plot(sizes, middle, "o", linestyle=_LINES[name], color=_INK[dtype], label=label)
        if name == "fused":
            axes.fill_between(sizes, *(list(map(f, groups)) for f in (min, max)), color=_INK[dtype], alpha=0.15)
    style.log_scale(axes, style.kinds(rows, "k"), "PyTorch / fused")
    axes.axhline(1, color="#222222", linewidth=1)
    axes.set_xlabel("kernel size k")
    axes.legend(frameon=False, fontsize=8, **_BESIDE)
    return figure


def roofline(content: Content) -> Figure | None:
    """GFLOP/s against FLOP a byte: every operator that was timed, under the ceilings of the machine."""
    ceilings = content["machine"].get("ceilings", {})
    rows = [row for row in records.operators(content) if "gflops" in row]
    if not rows or "copy" not in ceilings:
        return None
    figure, grid = style.grid(1, 1, "Roofline: operators alone, tensors moved once", (8.2, 4.6))
    axes = grid[0][0]
    x = [row["flop"] / row["bytes"] for row in rows]
    ends = [min(x) / 2, max(x) * 2]
    for op, dtype, name in dict.fromkeys((row["op"], row["dtype"], row["provider"]) for row in rows):
        mine = [row for row in rows if (row["op"], row["dtype"], row["provider"]) == (op, dtype, name)]
        points = [row["flop"] / row["bytes"] for row in mine], [row["gflops"] for row in mine]
        axes.loglog(*points, _OPS[op], color=_INK[dtype], markersize=5, fillstyle=_FILLS[name])
    dtypes = style.kinds(rows, "dtype")
    for dtype in [dtype for dtype in dtypes if dtype in ceilings]:
        knee = ceilings[dtype] / ceilings["copy"]
        roof = sorted([ends[0], min(max(knee, ends[0]), ends[1]), ends[1]])
        axes.loglog(roof, [min(ceilings[dtype], i * ceilings["copy"]) for i in roof], color=_INK[dtype], linewidth=1)
    axes.set_xlabel("FLOP a byte (input, output and weight moved once)")
    axes.set_ylabel("GFLOP/s")
    for axis in (axes.xaxis, axes.yaxis):
        style.readable(axis)
    axes.grid(which="both", color="#eeeeee")
    _key(axes, style.kinds(rows, "op"), dtypes, style.providers(rows), ceilings)
    return figure


def _key(axes: Axes, ops: list[str], dtypes: list[str], names: list[str], ceilings: Mapping[str, float]) -> None:
    """Colours are dtypes, with their ceilings; markers are operators; fillings are providers."""
    point = {"linestyle": "", "markersize": 5, "color": "#555555"}
    lines = [
        Line2D([], [], color=_INK[d], label=style.DTYPES[d] + (f", peak {ceilings[d]:.3g}" if d in ceilings else ""))
        for d in dtypes
    ]
    lines += [Line2D([], [], marker=_OPS[op], label=op, **point) for op in ops]
    if len(names) > 1:
        lines += [Line2D([], [], marker="o", fillstyle=_FILLS[name], label=name, **point) for name in names]
    axes.legend(handles=lines, frameon=False, fontsize=8, **_BESIDE)


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
        loc="upper right",
        ncols=len(_PARTS),
        frameon=False,
        fontsize=9,
    )
    return figure


def training(content: Content) -> Figure | None:
    """Memory that a training step takes, and its time, against the batch size: a column a model and dtype.

    Those with one batch size only where no other has more."""
    rows = style.timed(content, "training")
    if not rows:
        return None
    batches: dict[tuple[str, str], set[int]] = {}
    for row in rows:
        batches.setdefault((row["model"], row["dtype"]), set()).add(row["batch"])
    most = max(map(len, batches.values()))
    columns = [column for column, found in batches.items() if len(found) > 1 or most == 1]
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
