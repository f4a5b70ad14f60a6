"""Pictures of the races: images per second, latency against batch size, errors against float64."""

from collections.abc import Iterable, Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from benchmarks.plots import style
from benchmarks.plots.style import Content, Row

_MOST_BATCHES = 3


def throughput(content: Content) -> Figure | None:
    """A column a model, a row a dtype; a bar a provider and batch size; the limit as a line."""
    rows = style.timed(content, "models")
    if not rows:
        return None
    batches = style.kinds(rows, "batch")
    title = "ConvMixer inference, 224 x 224: images per second"
    if len(batches) > _MOST_BATCHES:  # a bar for each would be too many: the one with most providers
        most = max(batches, key=lambda batch: len({row["provider"] for row in rows if row["batch"] == batch}))
        batches, rows, title = [most], [row for row in rows if row["batch"] == most], f"{title}, batch {most}"
    models, dtypes = style.kinds(rows, "model"), style.kinds(rows, "dtype")
    names = style.providers(rows)
    size = (4.3 * len(models) + 1.2, (0.22 * len(names) * len(batches) + 1.1) * len(dtypes) + 0.9)
    figure, grid = style.grid(len(dtypes), len(models), title, size)
    for i, dtype in enumerate(dtypes):
        of_dtype = [row for row in rows if row["dtype"] == dtype]
        present = style.providers(of_dtype)
        for j, model in enumerate(models):
            _bars(grid[i][j], [row for row in of_dtype if row["model"] == model], present, batches)
            if i == 0:
                grid[i][j].set_title(model)
            if j == 0:
                grid[i][j].set_ylabel(style.DTYPES[dtype], fontweight="bold", fontsize=11)
            else:
                grid[i][j].set_yticklabels([])
        grid[i][len(models) // 2].set_xlabel("images per second" if i == len(dtypes) - 1 else "")
    keys = [Patch(color="#555555", alpha=_shade(i, batches), label=f"batch {b}") for i, b in enumerate(batches)]
    if any("limit_images_per_s" in row for row in rows):
        label = "limit: all multiply-adds at the peak"
        keys.append(Line2D([], [], color="#222222", linestyle="--", linewidth=1.2, label=label))
    figure.legend(handles=keys, loc="upper right", ncols=len(keys), frameon=False, fontsize=9)
    return figure


def _bars(axes: Axes, rows: Iterable[Row], names: Sequence[str], batches: Sequence[int]) -> None:
    found = {(row["provider"], row["batch"]): row for row in rows}
    height = 0.82 / len(batches)
    limits = [row["limit_images_per_s"] for row in found.values() if "limit_images_per_s" in row]
    top = max([row["images_per_s"] for row in found.values()] + limits, default=1)
    for i, provider in enumerate(reversed(names)):
        for j, batch in enumerate(batches):
            row = found.get((provider, batch))
            if row is None:
                continue
            rate, y = row["images_per_s"], i + 0.41 - (j + 0.5) * height
            axes.barh(y, rate, height * 0.92, color=style.colour(provider), alpha=_shade(j, batches))
            weight = _weight(provider)
            behind = {"facecolor": "white", "edgecolor": "none", "pad": 0.8}  # hides the line of the limit
            place = (rate + top * 0.012, y)
            number = f"{rate:#.3g}" if rate < 1000 else f"{rate:.0f}"
            axes.text(*place, number, va="center", fontsize=8, fontweight=weight, bbox=behind, zorder=4)
    if limits:
        axes.axvline(max(limits), color="#222222", linestyle="--", linewidth=1.2, zorder=3)
    axes.set_yticks(range(len(names)), reversed(names))
    for label in axes.get_yticklabels():
        label.set_fontweight(_weight(label.get_text()))
    axes.set_xlim(0, top * 1.14)
    axes.locator_params(axis="x", nbins=5)
    axes.tick_params(axis="y", length=0)


def _weight(provider: str) -> str:
    return "bold" if provider.startswith("fused") else "normal"


def _shade(index: int, batches: Sequence[int]) -> float:
    """Darker for larger batches."""
    return 1.0 if len(batches) == 1 else 0.5 + 0.5 * index / (len(batches) - 1)


def latency(content: Content) -> Figure | None:
    """A column a model; a line a provider and dtype. More than two dtypes: a row each."""
    rows = style.timed(content, "models")
    if len(style.kinds(rows, "batch")) < 2:
        return None
    models, dtypes, names = style.kinds(rows, "model"), style.kinds(rows, "dtype"), style.providers(rows)
    parts = [dtypes] if len(dtypes) < 3 else [[dtype] for dtype in dtypes]
    title = "ConvMixer inference, 224 x 224: time of an image, in a batch"
    size = (4.3 * len(models) + (1.2 if len(parts) == 1 else 3), 4.6 * len(parts))
    figure, grid = style.grid(len(parts), len(models), title, size)
    for line, part in zip(grid, parts, strict=True):
        for axes, model in zip(line, models, strict=True):
            here = [row for row in rows if row["model"] == model and row["dtype"] in part]
            for name in reversed(names):
                for dtype in part:
                    points = sorted(
                        (r["batch"], r["ms_per_image"]) for r in here if (r["provider"], r["dtype"]) == (name, dtype)
                    )
                    style.line(axes, [x for x, _ in points], [y for _, y in points], name, dtype)
            axes.set_title(model if len(part) > 1 else f"{model}, {style.DTYPES[part[0]]}")
            axes.set_xlabel("images in a batch")
            unit = "milliseconds an image" if model == models[0] else ""
            style.log_scale(axes, style.kinds(rows, "batch"), unit)
    style.legend(figure, names, dtypes if len(parts) == 1 else ())
    return figure


def errors(content: Content) -> Figure | None:
    """Largest error of the logits against float64, over what the rule allows: a column a dtype."""
    rows = [row for row in content.get("models", ()) if row.get("error") and row.get("allowed")]
    if not rows:
        return None
    dtypes, models, names = style.kinds(rows, "dtype"), style.kinds(rows, "model"), style.providers(rows)
    title = "Largest error of the logits against float64"
    figure, grid = style.grid(1, len(dtypes), title, (4.8 * len(dtypes) + 2, 3.8))
    for axes, dtype in zip(grid[0], dtypes, strict=True):
        for i, name in enumerate(names):
            of_name = [row for row in rows if (row["provider"], row["dtype"]) == (name, dtype)]
            step = min(0.1, 0.8 / len(names))
            x = [models.index(row["model"]) + (i - len(names) / 2) * step for row in of_name]
            axes.semilogy(x, [row["error"] for row in of_name], style.marker(name), color=style.colour(name))
        for j, model in enumerate(models):
            allowed = [row["allowed"] for row in rows if (row["model"], row["dtype"]) == (model, dtype)]
            if allowed:
                axes.hlines(max(allowed), j - 0.4, j + 0.4, color="#222222", linestyle="--", linewidth=1.2)
        axes.set_title(style.DTYPES[dtype])
        axes.set_xticks(range(len(models)), [m.removeprefix("convmixer_") for m in models], fontsize=8)
        axes.set_ylim(axes.get_ylim()[0] / 2, axes.get_ylim()[1] * 2)
        axes.grid(axis="y", color="#eeeeee")
    grid[0][0].set_ylabel("error; dashed: allowed by the rule")
    style.legend(figure, names, ())
    return figure
