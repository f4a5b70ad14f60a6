"""Training steps: cmx_kernels against plain PyTorch, gradients checked first. Every run has the smallest rows;
all of them: --full, or by name: pytest benchmarks/bench_training.py --benchmark-only
"""

from typing import Any

import pytest

from benchmarks import report
from benchmarks.race import Row
from benchmarks.recording import CLOCK
from benchmarks.training import PROVIDERS, Trainings

SIZES = {"convmixer_256_8_ks5_p2": (16, 64, 128), "convmixer_768_32": (2, 4), "tiny": (2,)}
QUICK = ("convmixer_256_8_ks5_p2", (16,), "fp32")  # inductor compiles for minutes
ROWS = [
    Row(model, batch, dtype, provider)
    for model, batches in SIZES.items()
    for dtype in ("fp32", "bf16")
    for batch in batches
    for provider in PROVIDERS
]


def quick(row: Row) -> bool:
    model, batches, dtype = QUICK
    return row.model == model and row.batch in batches and row.dtype == dtype and row.provider != "inductor"


@pytest.mark.benchmark(timer=CLOCK)
@pytest.mark.parametrize("row", ROWS, ids=lambda row: f"training-{row}".replace(" ", "-"))
def bench_step(benchmark: Any, trainings: Trainings, row: Row, keep: Any) -> None:
    result = trainings.result(row)
    record = report.record(result, trainings.results, times=3)
    keep("training", record)
    if result.status != "timed":
        end = pytest.fail if row.provider == "fused" else pytest.xfail
        end(f"training {row}, not timed: {result.status}, {result.note}")
    benchmark.group = f"training {row.model} b{row.batch} {row.dtype}"
    benchmark.extra_info.update(record)
    CLOCK.into(benchmark, result.seconds)
