"""Whole networks on photographs: cmx_kernels against plain PyTorch and its peers, checked before they are timed."""

from typing import Any

import pytest

from benchmarks import report
from benchmarks.peers import PROVIDERS
from benchmarks.race import Arena, Row
from benchmarks.recording import CLOCK


@pytest.mark.benchmark(timer=CLOCK)
def bench_model(benchmark: Any, arena: Arena, row: Row) -> None:
    result = arena.result(row)  # the first row of a model and batch size runs the whole race
    if result.status == "absent":
        pytest.skip(result.note)
    if result.status != "timed":
        # a peer's failure is news and stands in the table, but only ours is a failure of the run
        end = pytest.fail if PROVIDERS[row.provider].kind == "fused" else pytest.xfail
        end(f"{row}, not timed: {result.status}, {result.note}")
    benchmark.group = f"{row.model} b{row.batch}"
    benchmark.extra_info.update(report.record(result, arena.results))
    CLOCK.into(benchmark, result.seconds)
