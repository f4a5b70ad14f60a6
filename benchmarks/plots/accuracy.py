"""Throughput against published top-1, the rivals of the paper's table beside ConvMixer, plain and fused."""

from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter, ScalarFormatter

from benchmarks.plots import records, style
from benchmarks.plots.style import Content


def accuracy(content: Content) -> Figure | None:
    rows = records.rivals(content)
    if not rows:
        return None
    columns = list(dict.fromkeys((row["dtype"], row["batch"]) for row in rows))
    title = "ImageNet-1k top-1, as published, against images per second here"
    figure, grid = style.grid(1, len(columns), title, (5.4 * len(columns) + 0.6, 4.4))
    for axes, (dtype, batch) in zip(grid[0], columns, strict=True):
        for row in rows:
            if (row["dtype"], row["batch"]) != (dtype, batch):
                continue
            plain, top1 = max(row["plain"].values()), row["top1"]
            ours = "fused" in row
            axes.plot(plain, top1, "o", color="#4a5568" if ours else "#00798c", zorder=3)
            if ours:
                arrow = {"arrowstyle": "-|>", "color": "#d1495b", "linewidth": 1.8, "shrinkA": 4, "shrinkB": 0}
                axes.annotate("", (row["fused"], top1), (plain, top1), arrowprops=arrow)
                axes.plot(row["fused"], top1, "o", color="#d1495b", zorder=4)
            name = row["model"].removesuffix("_224").removesuffix("_patch16")
            axes.annotate(name, (plain, top1), (0, 7), textcoords="offset points", fontsize=8, ha="center")
        axes.set_xscale("log")
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 3, 5)))
        axes.xaxis.set_major_formatter(ScalarFormatter())
        axes.xaxis.set_minor_formatter(NullFormatter())
        axes.set_title(f"{style.DTYPES[dtype]}, batch {batch}")
        axes.set_xlabel("images per second; arrow: plain to fused")
        axes.margins(0.18)
        axes.grid(which="both", color="#eeeeee")
    grid[0][0].set_ylabel("top-1, %")
    return figure
