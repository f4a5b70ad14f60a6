"""The sweep over single layers, in lines: a mean for every operator, kernel size and dtype, and all that is slower."""

import statistics
from collections.abc import Iterable, Mapping, Sequence
from itertools import groupby
from typing import Any

_MOST_LINES = 60


def summary(ops: Sequence[Mapping[str, Any]]) -> list[str]:
    if not ops:
        return []
    title = (
        f"{'operator':21} {'k':>2} {'dtype':5} {'shapes':>6}  x plain, best layout of each: geometric mean, least, most"
    )
    lines = [title, *_means(ops)]
    slower = sorted((op for op in ops if op["slower"]), key=_worst)
    lines += ["", f"slower than plain PyTorch by more than noise: {len(slower)} of {len(ops)} shapes, the worst first"]
    lines += [f"  {_worst(op):5.2f}x  {_shape(op)}  {_layouts(op)}" for op in slower[:_MOST_LINES]]
    if len(slower) > _MOST_LINES:
        lines.append(f"  and {len(slower) - _MOST_LINES} more, in the JSON file")
    return lines


def _means(ops: Iterable[Mapping[str, Any]]) -> list[str]:
    def key(op: Mapping[str, Any]) -> tuple[str, str, int]:
        return op["op"], op["dtype"], op["k"]

    lines = []
    for (name, dtype, k), group in groupby(sorted(ops, key=key), key):
        ratios = [op["x_best"] for op in group]
        numbers = f"{statistics.geometric_mean(ratios):5.2f} {min(ratios):5.2f} {max(ratios):6.2f}"
        lines.append(f"{name:21} {k:2} {dtype:5} {len(ratios):6}  {numbers}")
    return lines


def _worst(op: Mapping[str, Any]) -> float:
    return min(op["x_best"], op["x_NCHW"], op["x_NHWC"])


def _shape(op: Mapping[str, Any]) -> str:
    return "{op} k{k} [{batch}, {c}, {h}, {w}] {dtype}".format_map(op)


def _layouts(op: Mapping[str, Any]) -> str:
    return ", ".join(
        f"{name} {op[f'ms_fused_{name}']:.2f} against {op[f'ms_plain_{name}']:.2f} ms" for name in ("NCHW", "NHWC")
    )
