"""What an H200 is to reach, and what was reached: a line each at the end of a part, and a row each in its JSON.

A goal against peers can be missed before all of them are measured, and is met only then.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

Row = Mapping[str, Any]
Kept = Mapping[str, Sequence[Row]]
BF16 = ("bf16-model", "bf16")  # the model in bfloat16; autocast
COMPILED = ("inductor", "inductor, layout kept", "inductor, max-autotune", "inductor, max-autotune, layout kept")
_EAGER = tuple(f"{name}{end}" for name in ("eager", "eager channels_last") for end in ("", ", cudnn.benchmark"))
PEERS = (*_EAGER, "eager, CUDA graph", "eager channels_last, CUDA graph", *COMPILED)
RIVAL, RIVAL_PEERS = "deit_base_patch16_224", ("eager", "eager channels_last", "inductor")


class Found(NamedTuple):
    value: float
    of: str  # what reached it, and against what
    missing: Sequence[str] = ()  # what may still make it worse


class Goal(NamedTuple):
    what: str
    sign: str  # ">=" or "<="
    wanted: float
    measure: Callable[[Kept], Found | None]


def judged(goals: Iterable[Goal], kept: Kept) -> list[dict[str, Any]]:
    """A row a goal; ``met`` is None where it cannot be said yet."""
    rows = []
    for goal in goals:
        found = goal.measure(kept)
        row: dict[str, Any] = {"goal": goal.what, "wanted": f"{goal.sign} {goal.wanted:g}", "met": None}
        if found is None:
            row["verdict"] = "not measured"
        else:
            good = found.value >= goal.wanted if goal.sign == ">=" else found.value <= goal.wanted
            row |= {"reached": found.value, "of": found.of, "met": None if good and found.missing else good}
            unsure = f"so far; {len(found.missing)} not measured: {'; '.join(found.missing[:4])}"
            row["verdict"] = "missed" if not good else unsure if found.missing else "met"
        rows.append(row)
    return rows


def lines(rows: Iterable[Row]) -> Iterator[str]:
    for row in rows:
        reached = f"{row['reached']:.4g}, {row['of']}" if "reached" in row else ""
        yield f"{row['goal']}: wanted {row['wanted']}, reached {reached or 'nothing'}: {row['verdict']}"


def _ours(row: Row) -> bool:
    return bool(row["provider"].startswith("fused"))


def _timed(kept: Kept, section: str, model: str, batch: int, dtypes: Sequence[str] | None = BF16) -> list[Row]:
    rows = [row for row in kept.get(section, ()) if (row["model"], row["batch"]) == (model, batch)]
    return [row for row in rows if row["status"] == "timed" and (dtypes is None or row["dtype"] in dtypes)]


def _fastest(rows: Iterable[Row]) -> Row | None:
    return min(rows, key=lambda row: row["ms"], default=None)


def _name(row: Row) -> str:
    return f"{row['provider']} {row['dtype']}"


def _rate(section: str, model: str, batch: int, kept: Kept) -> Found | None:
    best = _fastest(filter(_ours, _timed(kept, section, model, batch)))
    return None if best is None else Found(best["images_per_s"], _name(best))


def _ratio(model: str, other: str, batch: int, peers: Sequence[str], kept: Kept) -> Found | None:
    """Against another network, or the same one in PyTorch: whichever dtype is its fastest."""
    section = "models" if other == model else "rival_networks"
    rows = [row for row in _timed(kept, section, other, batch, None) if not _ours(row)]
    ours, theirs = _fastest(filter(_ours, _timed(kept, "models", model, batch))), _fastest(rows)
    if ours is None or theirs is None:
        return None
    there = {row["provider"] for row in kept[section] if (row["model"], row["batch"]) == (other, batch)}
    missing = [name for name in peers if name not in there]
    return Found(ours["images_per_s"] / theirs["images_per_s"], f"{_name(ours)} against {_name(theirs)}", missing)


def _latency(model: str, kept: Kept) -> Found | None:
    best = _fastest(r for r in _timed(kept, "models", model, 1) if _ours(r) and r["provider"].endswith("CUDA graph"))
    return None if best is None else Found(best["ms"] * 1e3, _name(best))


def _memory(model: str, batch: int, kept: Kept) -> Found | None:
    rows = [row for row in _timed(kept, "training", model, batch) if "call" in row["memory"]]
    ours = min(filter(_ours, rows), key=lambda row: row["memory"]["call"], default=None)
    eager = next((row for row in rows if row["provider"] == "eager"), None)
    if ours is None or eager is None:
        return None
    return Found(ours["memory"]["call"] / eager["memory"]["call"], f"{_name(ours)} against {_name(eager)}")


def _least(section: str, column: str, where: Callable[[Row], bool], kept: Kept) -> Found | None:
    """The worst of the rows."""
    rows = [row for row in kept.get(section, ()) if where(row)]
    worst = min((row for row in rows if column in row), key=lambda row: row[column], default=None)
    if worst is None:
        return None
    return Found(worst[column], _case(worst), [_case(row) for row in rows if column not in row])


def _case(row: Row) -> str:
    k = f" k{row['k']}" if "k" in row else ""
    return f"{row['op']}{k} {row['shape']} {row['dtype']}"


STEP = "depthwise_train_layer"  # which no goal but that against PyTorch is about


def _at_64(dtype: str, *kernels: int) -> Callable[[Row], bool]:
    """Rows of 64 images; of all kernel sizes if none is named."""

    def where(row: Row) -> bool:
        here = row["op"] != STEP and row["shape"].startswith("64x") and row["dtype"] == dtype
        return here and (not kernels or row["k"] in kernels)

    return where


WIDE, DEEP, SMALL = "convmixer_1536_20", "convmixer_768_32", "convmixer_1024_20_ks9_p14"


def _of_networks() -> Iterator[Goal]:
    for model, rate in ((WIDE, 5400), (DEEP, 11500), (SMALL, 44000)):
        yield Goal(f"{model}, batch 256, bf16, images/s", ">=", rate, partial(_rate, "models", model, 256))
    for model, times in ((WIDE, 8), (DEEP, 3), (SMALL, 8)):
        measure = partial(_ratio, model, model, 256, PEERS)
        yield Goal(f"{model}, batch 256, bf16, times the best PyTorch", ">=", times, measure)
    yield Goal(f"{DEEP} against {RIVAL}, batch 256, bf16", ">=", 1, partial(_ratio, DEEP, RIVAL, 256, RIVAL_PEERS))
    for model, us in ((WIDE, 260), (DEEP, 200), (SMALL, 100)):
        yield Goal(f"{model}, batch 1, bf16, us in a CUDA graph", "<=", us, partial(_latency, model))


def _of_training() -> Iterator[Goal]:
    for model, rate in ((WIDE, 1400), (DEEP, 2600), (SMALL, 10700)):
        yield Goal(f"training {model}, batch 64, bf16, images/s", ">=", rate, partial(_rate, "training", model, 64))
        yield Goal(f"training {model}, batch 64, bf16, memory of eager", "<=", 0.36, partial(_memory, model, 64))


def _of_ops() -> Iterator[Goal]:
    def least(what: str, column: str, wanted: float, where: Callable[[Row], bool]) -> Goal:
        return Goal(f"depthwise block, {what}", ">=", wanted, partial(_least, "gpu_ops", column, where))

    yield least("batch 64, bf16, k 7 and 9, % of copy", "percent_of_copy", 80, _at_64("bf16", 7, 9))
    yield least("batch 64, bf16, k 9, times the best PyTorch", "speedup", 8, _at_64("bf16", 9))
    yield least("batch 64, bf16, k 7, times the best PyTorch", "speedup", 2, _at_64("bf16", 7))
    yield least("batch 64, fp32, % of its floor", "percent_of_floor", 70, _at_64("fp32"))
    yield least("all shapes, times the best PyTorch", "speedup", 1, lambda row: True)


def _of_products() -> Iterator[Goal]:
    def where(row: Row) -> bool:
        return bool(row["op"] == "pointwise_block") and _at_64("bf16")(row)

    measure = partial(_least, "gpu_product", "percent_of_cublas", where)
    yield Goal("pointwise block, batch 64, bf16, % of cuBLAS", ">=", 90, measure)


NETWORK, TRAINING, OPS, PRODUCT = map(tuple, (_of_networks(), _of_training(), _of_ops(), _of_products()))
