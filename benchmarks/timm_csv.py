"""Results as timm publishes them: results/benchmark-*.csv of its repository, one file a dtype and provider.

timm's counter leaves out depthwise convolutions with padding="same"; infer_gmacs and infer_macts here hold them.
"""

import csv
from collections.abc import Iterable, Mapping
from itertools import groupby
from pathlib import Path
from typing import Any

from benchmarks.networks import SPECS

INFER = (
    *("model", "infer_img_size", "infer_samples_per_sec", "infer_step_time", "infer_batch_size", "param_count"),
    *("infer_gmacs", "infer_macts"),
)
TRAIN = ("model", "train_samples_per_sec", "train_step_time", "train_batch_size", "train_img_size", "param_count")


def write(folder: Path, kind: str, rows: Iterable[Mapping[str, Any]]) -> list[Path]:
    """kind: "infer" or "train". Fastest first, as timm sorts."""

    def key(row: Mapping[str, Any]) -> tuple[str, str]:
        return row["dtype"], row["provider"].replace(" ", "-")

    written = []
    timed = [row for row in rows if row["status"] == "timed"]
    for (dtype, provider), group in groupby(sorted(timed, key=key), key):
        folder.mkdir(parents=True, exist_ok=True)
        written.append(folder / f"benchmark-{kind}-{dtype}-{provider}.csv")
        with written[-1].open("w", newline="") as file:
            table = csv.DictWriter(file, INFER if kind == "infer" else TRAIN, lineterminator="\n")
            table.writeheader()
            table.writerows(sorted((_line(kind, r) for r in group), key=lambda r: -r[f"{kind}_samples_per_sec"]))
    return written


def _line(kind: str, row: Mapping[str, Any]) -> dict[str, Any]:
    """Step time in milliseconds of a batch; counts in millions, multiply-adds in billions."""
    spec = SPECS[row["model"]]
    line = {
        "model": row["model"],
        f"{kind}_img_size": spec.image_size,
        f"{kind}_samples_per_sec": round(row["images_per_s"], 2),
        f"{kind}_step_time": round(row["ms"], 3),
        f"{kind}_batch_size": row["batch"],
        "param_count": round(spec.parameters / 1e6, 2),
    }
    if kind == "infer":
        line |= {"infer_gmacs": round(spec.flop / 2e9, 2), "infer_macts": round(spec.activations / 1e6, 2)}
    return line
