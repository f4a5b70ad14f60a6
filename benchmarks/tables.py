"""Rows as lines: in the terminal, and as Markdown. A column that no row fills is left out."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

Columns = Sequence[tuple[str, str]]

NETWORKS: Columns = (
    ("model", "{model}"),
    ("batch", "{batch}"),
    ("dtype", "{dtype}"),
    ("provider", "{provider}"),
    ("images/s", "{images_per_s:.2f}"),
    ("ms/image", "{ms_per_image:.1f}"),
    ("calls", "{calls}"),
    ("spread", "{spread:.1%}"),
    ("x eager", "{speedup:.2f}"),
    ("x best peer", "{over_peers:.2f}"),
    ("GFLOP/s", "{gflops:.0f}"),
    ("% of limit", "{percent_of_limit:.0f}"),
    ("% of floor", "{percent_of_floor:.0f}"),
    ("largest error", "{error:.1e}"),
    ("allowed", "{allowed:.1e}"),
    ("top-1", "{top1}"),
    ("MiB", "{memory[process]:.0f}"),
    ("call", "{memory[call]:.0f}"),
    ("weights", "{memory[weights]:.0f}"),
    ("packed", "{memory[packed]:.0f}"),
    ("backend", "{backend}"),
)
TRAINING: Columns = tuple(c for c in NETWORKS if c[0] not in ("ms/image", "x best peer", "top-1", "packed", "backend"))
BREAKDOWN: Columns = (
    *NETWORKS[:4],
    *((f"{part}, ms", f"{{ms[{part}]:.1f}}") for part in ("depthwise", "pointwise", "activation", "BatchNorm")),
    ("stem, pool, head, rest, ms", "{ms[stem, pool, head, rest]:.1f}"),
)
RIVALS: Columns = (
    ("network", "{model}"),
    ("top-1", "{top1:.1f}"),
    ("published by", "{source}"),
    ("parameters, M", "{parameters_m:.1f}"),
    ("GMAC", "{gmac:.1f}"),
    ("dtype", "{dtype}"),
    ("batch", "{batch}"),
    ("plain NCHW, images/s", "{plain[NCHW]:.2f}"),
    ("plain NHWC, images/s", "{plain[NHWC]:.2f}"),
    ("fused, images/s", "{fused:.2f}"),
    ("x plain", "{speedup:.2f}"),
    ("largest error", "{error:.1e}"),
)
SWAPPED: Columns = (
    ("network", "{model}"),
    ("what", "{kind}"),
    ("dtype", "{dtype}"),
    ("batch", "{batch}"),
    ("swapped", "{swapped} of {depthwise}"),
    *((f"{name}, ms", f"{{ms[{name}]:.0f}}") for name in ("plain NCHW", "plain NHWC", "fused NCHW", "fused NHWC")),
    ("x plain", "{speedup:.2f}"),
    ("GFLOP/s", "{gflops:.0f}"),
    ("largest error", "{error:.1e}"),
    ("allowed", "{allowed:.1e}"),
)
GPU_OPS: Columns = (
    ("op", "{op}"),
    ("shape", "{shape}"),
    ("k", "{k}"),
    ("dtype", "{dtype}"),
    ("kernel", "{kernel}"),
    ("floor", "{floor_us:.1f}"),
    ("predicted", "{predicted_us:.1f}"),
    ("fused", "{us[fused]:.1f}"),
    ("fused channels_last", "{us[fused channels_last]:.1f}"),
    ("fused triton", "{us[fused triton]:.1f}"),
    ("eager", "{us[eager]:.1f}"),
    ("eager channels_last", "{us[eager channels_last]:.1f}"),
    ("eager, cudnn.benchmark", "{us[eager, cudnn.benchmark]:.1f}"),
    ("channels_last, cudnn.benchmark", "{us[eager channels_last, cudnn.benchmark]:.1f}"),
    ("inductor", "{us[inductor]:.1f}"),
    ("inductor, layout kept", "{us[inductor, layout kept]:.1f}"),
    ("GFLOP/s", "{gflops:.0f}"),
    ("GB/s", "{gb_per_s:.0f}"),
    ("% of floor", "{percent_of_floor:.0f}"),
    ("% of copy", "{percent_of_copy:.0f}"),
    ("x best PyTorch", "{speedup:.2f}"),
    ("largest error", "{error:.1e}"),
    ("note", "{note}"),
)
GPU_PRODUCT: Columns = (
    ("op", "{op}"),
    ("shape", "{shape}"),
    ("dtype", "{dtype}"),
    ("kernel", "{kernel}"),
    ("fused", "{us[fused]:.1f}"),
    ("fused channels_last", "{us[fused channels_last]:.1f}"),
    ("fused triton", "{us[fused triton]:.1f}"),
    ("eager", "{us[eager]:.1f}"),
    ("eager channels_last", "{us[eager channels_last]:.1f}"),
    *((f"kernel {tile}", f"{{us[kernel {tile}]:.1f}}") for tile in ("128x128", "64x64", "64x32", "wgmma")),
    ("cuBLAS", "{us[cuBLAS]:.1f}"),
    ("cuBLAS channels_last", "{us[cuBLAS channels_last]:.1f}"),
    ("GFLOP/s", "{gflops:.0f}"),
    ("GB/s", "{gb_per_s:.0f}"),
    ("% of floor", "{percent_of_floor:.0f}"),
    ("% of cuBLAS", "{percent_of_cublas:.0f}"),
    ("x best PyTorch", "{speedup:.2f}"),
    ("largest error", "{error:.1e}"),
    ("note", "{note}"),
)
GOALS: Columns = (
    ("goal", "{goal}"),
    ("wanted", "{wanted}"),
    ("reached", "{reached:.4g}"),
    ("by", "{of}"),
    ("verdict", "{verdict}"),
)
_TEXT = (
    *("op", "model", "network", "dtype", "provider", "backend", "published by", "shape", "note", "kernel", "layout"),
    *("goal", "by", "verdict"),
)

LEGEND = (
    "224 x 224 photographs, random weights; medians of calls; spread: half the distance of the quartiles",
    "x eager, x best peer: against the fastest of them in this dtype or a more exact one",
    "limit: all multiply-adds at the arithmetic peak measured in the same turns (depthwise: at that of fp32);",
    "fused float32 networks need an eighth fewer in their products (Strassen), or use AMX tiles, and may pass it",
    "largest error: against float64; allowed: twice that of plain PyTorch in the same dtype, and rounding",
    "top-1: photographs whose class is that of plain float32",
    "MiB: the most that the provider's process held in a call after the first, used parts of libraries included;",
    "call: what that call added to what the process keeps from one call to the next;",
    "weights, packed: the model's tensors, and their copy in the kernels' layout",
)


def cells(rows: Iterable[Mapping[str, Any]], columns: Columns) -> list[list[str]]:
    """Header and cells."""
    lines = [[_cell(form, row) for _, form in columns] for row in rows]
    used = [i for i in range(len(columns)) if any(line[i] for line in lines)]
    return [[columns[i][0] for i in used], *([line[i] for i in used] for line in lines)]


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
        padded = (c.ljust(w) if flush else c.rjust(w) for c, w, flush in zip(line, widths, left, strict=True))
        text.append("  ".join(padded).rstrip())
    return text


def markdown(lines: list[list[str]]) -> list[str]:
    rule = ["---" if name in _TEXT else "---:" for name in lines[0]]
    return ["| " + " | ".join(line) + " |" for line in (lines[0], rule, *lines[1:])]
