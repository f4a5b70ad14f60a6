"""Whole networks on photographs: cmx_kernels against plain PyTorch and its peers, checked before they are timed."""

from typing import Any

import pytest

from benchmarks import report
from benchmarks.race import Arena, Row
from benchmarks.recording import CLOCK


@pytest.mark.benchmark(timer=CLOCK)
def bench_model(benchmark: Any, arena: Arena, row: Row) -> None:
    result = arena.result(row)  # the first row of a model and batch size runs the whole race
    if result.status == "absent":
        pytest.skip(result.note)
    if result.status != "timed":
        pytest.fail(f"{row} is {result.status}, and was not timed: {result.note}", pytrace=False)
    benchmark.group = f"{row.model} b{row.batch}"
    benchmark.extra_info.update(report.record(result, arena.results))
    CLOCK.into(benchmark, result.seconds)
