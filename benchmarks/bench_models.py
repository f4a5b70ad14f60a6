"""Whole networks on photographs: cmx_kernels against plain PyTorch and its peers, checked before they are timed.

A row replays what the race has measured: rounds of several processes must interleave, and pytest-benchmark times one
function at a time. So its timer is a clock that only moves when a recorded round is played (both are public API).
"""

from collections.abc import Iterator
from typing import Any

import pytest

from benchmarks import report
from benchmarks.race import Arena, Result, Row


class Recording:
    """A timer, and a function that takes as long by it as a recorded call took."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now

    def play(self, seconds: float) -> None:
        self.now += seconds

    def into(self, benchmark: Any, seconds: list[float]) -> None:
        remaining: Iterator[float] = iter(seconds)

        def next_round() -> tuple[tuple[float], dict[str, Any]]:
            self.now = 0.0  # so that no digits are lost
            return (next(remaining),), {}

        benchmark.pedantic(self.play, setup=next_round, rounds=len(seconds))


CLOCK = Recording()


@pytest.mark.benchmark(timer=CLOCK)
def bench_model(benchmark: Any, arena: Arena, row: Row) -> None:
    result: Result = arena.result(row)
    if result.status == "absent":
        pytest.skip(result.note)
    if result.status != "timed":
        pytest.fail(f"{row} is {result.status}, and was not timed: {result.note}", pytrace=False)
    benchmark.group = f"{row.model} b{row.batch}"
    benchmark.extra_info.update(report.record(result, arena.results))
    CLOCK.into(benchmark, result.seconds)
