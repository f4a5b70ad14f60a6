"""Times the providers of one network and batch size against each other, after checking what they compute.

Each provider is a process of its own (their thread pools spin and would rob each other), asleep unless it has its turn.
Turns go round, each starting with another provider, so that the machine's drift hits all alike. A turn is some calls.
"""

import statistics
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from benchmarks import reference
from benchmarks.lanes import Failed, Lane
from benchmarks.networks import SPECS
from benchmarks.peers import PROVIDERS
from benchmarks.reference import Reference

_NAP = 0.05  # seconds between turns: the thread pools of the provider before have stopped spinning
_TURN = 0.3  # seconds a turn should last
_PEAK = 0.1  # seconds a measurement of the arithmetic peak lasts
_SETTLED = 0.04  # a spread below this needs no further turns


class Row(NamedTuple):
    """What is measured: a line of the table."""

    model: str
    batch: int
    dtype: str
    provider: str

    def __str__(self) -> str:
        return f"{self.model} b{self.batch} {self.dtype} {self.provider}"


def crawls(row: Row) -> bool:
    """Plain PyTorch in float16 takes minutes for an image: one call is all it gets, its check is its time."""
    return row.dtype == "fp16" and PROVIDERS[row.provider].kind == "eager"


@dataclass(frozen=True)
class Budget:
    """How long to measure."""

    race: float  # seconds after which a race gets no further turns, the least number of turns aside
    turns: tuple[int, int]  # at least; at most, while a spread is large
    photos: int  # checked in batches of one
    exact: int  # of these in float64
    slow: float  # seconds; a longer call gets two turns
    once: float  # seconds; a longer call of plain PyTorch gets one, after the warm-up that is also its check

    def wants(self, turn: int, result: "Result") -> bool:
        """Whether this row takes part in this turn."""
        if crawls(result.row):
            return False
        if turn == 0 or result.status != "timed":
            return result.status == "timed"
        once = PROVIDERS[result.row.provider].kind == "eager" and result.median > self.once
        return not once and (turn < 2 or result.median < self.slow)


DEFAULT = Budget(race=15, turns=(3, 7), photos=2, exact=1, slow=1.5, once=2.5)
FULL = Budget(race=90, turns=(5, 15), photos=8, exact=8, slow=30, once=30)


@dataclass
class Result:
    row: Row
    status: str = "timed"  # or "wrong", "failed", "absent"
    note: str = ""
    seconds: list[float] = field(default_factory=list)  # of each call
    error: float = float("nan")
    allowed: float = float("nan")
    top1: tuple[int, int] = (0, 0)
    memory: dict[str, float] = field(default_factory=dict)  # MiB, see benchmarks/memory.py
    settings: dict[str, Any] = field(default_factory=dict)
    peaks: dict[str, list[float]] = field(default_factory=dict)  # dtype -> FLOP/s of the machine in the same turns

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)

    @property
    def spread(self) -> float:
        """Half the distance between the quartiles, as a part of the median."""
        if len(self.seconds) < 2:
            return 0.0
        low, _, high = statistics.quantiles(self.seconds, n=4, method="inclusive")
        return (high - low) / 2 / self.median


def take_turns(results: Sequence[Result], lanes: dict[Row, Lane], peaks: dict[str, Lane], budget: Budget) -> None:
    """Time what is right; a failure in a turn ends that row. ``peaks``: who measures the arithmetic peak of a dtype."""
    order = [result for result in results if result.status == "timed"]
    found: dict[str, list[float]] = {dtype: [] for dtype in peaks}
    start, (least, most) = time.perf_counter(), budget.turns
    for turn in range(most if order else 0):
        running = [result for result in order if budget.wants(turn, result)]
        over = time.perf_counter() - start > budget.race or all(result.spread < _SETTLED for result in running)
        if not running or (turn >= least and over):
            break
        for dtype, lane in peaks.items():
            time.sleep(_NAP)
            found[dtype].append(lane.ask("peak", _PEAK))
        for result in running:
            time.sleep(_NAP)
            try:
                result.seconds += lanes[result.row].ask("turn", _TURN)
            except Failed as failure:
                result.status, result.note = "failed", str(failure)
        order = order[1:] + order[:1]
    for result in order:
        result.peaks = found


class Arena:
    """Runs races on request and keeps their results."""

    def __init__(
        self, rows: Sequence[Row], budget: Budget, folder: Path, threads: int, say: Callable[..., None], peak: bool
    ) -> None:
        self.rows, self.budget, self.folder = rows, budget, folder
        self.threads, self.say, self.peak = threads, say, peak
        self.results: dict[Row, Result] = {}
        self._references: dict[str, Reference] = {}
        self._lanes: dict[tuple[str, str], Lane] = {}
        self._peaks: dict[str, Lane] = {}
        self._exact: list[Lane] = []  # one, which computes in float64 beside what is built
        self._total, self._done = sum(map(self._work, rows)), 0.0  # for the progress

    def result(self, row: Row) -> Result:
        if row not in self.results:
            self._race([other for other in self.rows if (other.model, other.batch) == (row.model, row.batch)])
        return self.results[row]

    def close(self) -> None:
        for lane in {*self._lanes.values(), *self._peaks.values(), *self._exact}:
            lane.stop()

    def _race(self, rows: Sequence[Row]) -> None:
        if not self._lanes:
            self._start()
        results = [Result(row) for row in rows]
        self._build(results, self._reference(rows[0].model))
        for result in results:
            self._check(result)
        self.results.update(zip(rows, results, strict=True))
        lanes = {row: self._lanes[row.provider, row.dtype] for row in self._present(rows)}
        take_turns(results, lanes, self._peaks, self.budget)
        for result in results:
            self._done += self._turns_work(result.row)
            if result.status == "timed":
                result.memory |= lanes[result.row].ask("memory_of_call")
                rate, ms = result.row.batch / result.median, result.median * 1e3
                calls = f"{ms:.1f} ms a call, spread {result.spread:.1%}, {len(result.seconds)} calls"
                self._tell(f"{result.row}: {rate:.2f} images/s ({calls})")
            elif result.status == "failed":
                self._tell(f"{result.row}: failed: {result.note.splitlines()[0]}")

    def _present(self, rows: Sequence[Row]) -> list[Row]:
        return [row for row in rows if PROVIDERS[row.provider].load().why_absent() is None]

    def _start(self) -> None:
        """All processes at once: each imports torch, which takes seconds."""
        for provider, dtype in sorted({(row.provider, row.dtype) for row in self._present(self.rows)}):
            self._lanes[provider, dtype] = Lane(provider, dtype, self.threads)
        self._exact = [Lane("eager", "fp32", 1)]
        if self.peak and self._lanes:
            for dtype in {"fp32", "bf16"} | {row.dtype for row in self.rows}:  # any process can measure it
                self._peaks[dtype] = self._lanes.get(("fused", dtype)) or Lane("fused", dtype, self.threads)

    def _build(self, results: Sequence[Result], ref: Reference) -> None:
        """Converting a model keeps one core busy, so providers build side by side, and nothing is timed meanwhile.
        So does the float64 reference, if it is not known yet. Where several forms were built, one is chosen alone.

        The dtypes of one provider build one after the other, if they share the file it converted the model to.
        """
        for result in results:
            absent = PROVIDERS[result.row.provider].load().why_absent()
            if absent is not None:
                result.status, result.note = "absent", absent

        def ask(result: Result, *request: Any) -> Any:
            try:
                return self._lanes[result.row.provider, result.row.dtype].ask(*request)
            except Failed as failure:
                result.status, result.note = "failed", str(failure)

        def build(group: Sequence[Result]) -> None:
            for result in group:
                ask(result, "build", ref.model, ref.weights, photos)

        def files(result: Result) -> tuple[str, str]:
            return result.row.provider, "" if PROVIDERS[result.row.provider].files else result.row.dtype

        photos = ref.photos[torch.arange(results[0].row.batch) % len(ref.photos)]
        # openvino, onnxruntime and inductor first, which take the longest
        there = sorted((r for r in results if r.status != "absent"), key=files, reverse=True)
        groups = [list(group) for _, group in groupby(there, key=files)]
        with ThreadPoolExecutor(max(1, self.threads) + 1) as pool:
            request = ("exact", ref.model, ref.weights, ref.photos[: self.budget.exact])
            exact = None if len(ref.ref) else pool.submit(self._exact[0].ask, *request)
            list(pool.map(build, groups))
        if exact is not None:
            ref.ref = torch.from_numpy(exact.result())
        for result in there:
            if result.status == "timed":
                result.settings = ask(result, "choose", photos) or {}

    def _check(self, result: Result) -> None:
        row, ref = result.row, self._references[result.row.model]
        try:
            if result.status != "timed":
                return
            answer = self._lanes[row.provider, row.dtype].ask("check", self._photos(ref, row), row.batch)
        except Failed as failure:
            result.status, result.note = "failed", str(failure)
            self._tell(f"{row}: failed: {result.note.splitlines()[0]}")
            return
        finally:
            self._done += self._check_work(row)
        logits = torch.from_numpy(answer["logits"])
        if row.provider == "eager":
            ref.learn_plain(row.dtype, logits)
        for dtype in {row.dtype, "fp32"} - ref.plain.keys():  # eager was not asked for
            ref.learn_plain(dtype, reference.plain_logits(ref, dtype))
        if crawls(row):
            result.seconds = [answer["seconds"]]
        result.memory = answer["memory"]
        result.error, result.allowed = ref.error(logits, row.dtype), ref.allowed(row.dtype)
        result.top1 = ref.agreement(logits)
        wrong = ref.wrong(logits, row.dtype)
        if wrong is not None:
            result.status, result.note = "wrong", wrong
        checked = f"error {result.error:.1e} of {result.allowed:.1e} allowed, class {result.top1[0]}/{result.top1[1]}"
        self._tell(f"{row}: WRONG, {wrong}" if wrong else f"{row}: right ({checked})")

    def _photos(self, ref: Reference, row: Row) -> Tensor:
        """For the check; as many as whole batches hold, some twice if the batch is large."""
        count = row.batch if crawls(row) else -(-max(self.budget.photos, row.batch) // row.batch) * row.batch
        return ref.photos[torch.arange(count) % len(ref.photos)]

    def _reference(self, model: str) -> Reference:
        if model not in self._references:
            self._tell(f"{model}: calibrating on photographs; float64 reference")
            self._references[model] = reference.make(model, self.folder)
        return self._references[model]

    def _tell(self, text: str) -> None:
        self.say(self._done / self._total, text)

    def _work(self, row: Row) -> float:
        return self._check_work(row) + self._turns_work(row)

    def _check_work(self, row: Row) -> float:
        """A guess at the seconds it takes; only the proportions matter."""
        return 2 + _seconds(row) * max(1, self.budget.photos / row.batch)

    def _turns_work(self, row: Row) -> float:
        seconds, eager = _seconds(row), PROVIDERS[row.provider].kind == "eager"
        turns = 1 if eager and seconds > self.budget.once else 2 if seconds > self.budget.slow else self.budget.turns[0]
        return turns * max(seconds, 2 * _TURN)


def _seconds(row: Row) -> float:
    """Of a call, on a small machine; eager PyTorch takes twice what the others take."""
    slow = 2 if PROVIDERS[row.provider].kind == "eager" else 1
    return SPECS[row.model].flop * row.batch * slow / (200e9 if row.dtype == "fp32" else 400e9)
