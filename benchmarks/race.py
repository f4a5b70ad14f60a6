"""Times the providers of one network and batch size against each other, after checking what they compute.

Each provider is a process of its own (their thread pools spin and would rob each other), asleep unless it has its turn.
Turns go round, each starting with another provider, so that the machine's drift hits all alike. A turn is some calls.
"""

import multiprocessing
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch

from benchmarks import reference, worker
from benchmarks.networks import SPECS
from benchmarks.peers import PROVIDERS
from benchmarks.reference import Reference

_NAP = 0.15  # seconds between turns: the thread pools of the provider before have stopped spinning
_TURN = 0.4  # seconds a turn should last
_PEAK = 0.1  # seconds a measurement of the arithmetic peak lasts
_COLD = 1.0  # a call longer than this does not notice that the others emptied the caches


class Row(NamedTuple):
    """What is measured: a line of the table."""

    model: str
    batch: int
    dtype: str
    provider: str

    def __str__(self) -> str:
        return f"{self.model} b{self.batch} {self.dtype} {self.provider}"


@dataclass(frozen=True)
class Budget:
    """How long to measure."""

    race: float  # seconds for the turns of one model and batch size
    turns: tuple[int, int]  # at least, at most
    reference: float  # seconds of float64 a model

    def turns_for(self, round_seconds: float) -> int:
        least, most = self.turns
        return max(least, min(most, round(self.race / round_seconds)))


DEFAULT = Budget(race=20, turns=(3, 7), reference=4)
FULL = Budget(race=90, turns=(5, 15), reference=20)


@dataclass
class Result:
    row: Row
    status: str = "timed"  # or "wrong", "failed", "absent"
    note: str = ""
    seconds: list[float] = field(default_factory=list)  # of each call
    error: float = float("nan")
    allowed: float = float("nan")
    top1: tuple[int, int] = (0, 0)
    memory: float | None = None  # MiB
    settings: dict[str, Any] = field(default_factory=dict)
    peaks: dict[str, float] = field(default_factory=dict)  # dtype -> FLOP/s, measured in the same turns

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


class Failed(Exception):
    """What a provider's process answered instead of a result."""


class Lane:
    """The process of one provider in one dtype, seen from here."""

    def __init__(self, provider: str, dtype: str, threads: int) -> None:
        context = multiprocessing.get_context("spawn")
        self.connection, theirs = context.Pipe()
        arguments = (theirs, provider, dtype, threads)
        self.process = context.Process(target=worker.main, args=arguments, daemon=True)
        self.process.start()
        theirs.close()

    def ask(self, *request: Any) -> Any:
        try:
            self.connection.send(request)
            good, answer = self.connection.recv()
        except (EOFError, BrokenPipeError, ConnectionResetError):
            self.process.join(5)
            raise Failed(f"its process ended with exit code {self.process.exitcode}") from None
        if not good:
            raise Failed(answer)
        return answer

    def stop(self) -> None:
        self.process.terminate()
        self.process.join()


class Arena:
    """Runs races on request and keeps their results."""

    def __init__(
        self, rows: Sequence[Row], budget: Budget, folder: Path, threads: int, say: Callable[..., None], peak: bool
    ) -> None:
        self.rows, self.budget, self.folder, self.threads, self.say, self.peak = (
            rows,
            budget,
            folder,
            threads,
            say,
            peak,
        )
        self.results: dict[Row, Result] = {}
        self._references: dict[str, Reference] = {}
        self._lanes: dict[tuple[str, str], Lane] = {}
        self._total, self._done = sum(map(_work, rows)), 0.0

    def result(self, row: Row) -> Result:
        if row not in self.results:
            self._race([other for other in self.rows if (other.model, other.batch) == (row.model, row.batch)])
        return self.results[row]

    def close(self) -> None:
        for lane in self._lanes.values():
            lane.stop()

    def _race(self, rows: Sequence[Row]) -> None:
        if not self._lanes:
            self._start()
        results = [self._prepare(row) for row in rows]
        self.results.update(zip(rows, results, strict=True))
        entrants = {result.row: self._lane(result.row) for result in results if result.status == "timed"}
        self._take_turns(rows, entrants)
        for result in results:
            if result.status == "timed":
                result.memory = entrants[result.row].ask("peak_memory")
                rate = result.row.batch / result.median
                spread = f"{result.median * 1e3:.1f} ms a call, spread {result.spread:.1%}"
                self.say(
                    self._fraction(0), f"{result.row}: {rate:.2f} images/s ({spread}, {len(result.seconds)} calls)"
                )

    def _start(self) -> None:
        """All processes at once: each imports torch, which takes seconds."""
        pairs = {(row.provider, row.dtype) for row in self.rows if PROVIDERS[row.provider].load().why_absent() is None}
        peaks = {("peak", row.dtype) for row in self.rows} if self.peak and pairs else set()
        for provider, dtype in sorted(pairs | peaks):
            # any provider's process can measure the peak
            self._lanes[provider, dtype] = Lane("fused" if provider == "peak" else provider, dtype, self.threads)

    def _lane(self, row: Row) -> Lane:
        return self._lanes[row.provider, row.dtype]

    def _prepare(self, row: Row) -> Result:
        """Build and check."""
        result = Result(row)
        absent = PROVIDERS[row.provider].load().why_absent()
        if absent is not None:
            result.status, result.note = "absent", absent
            self._done += _work(row)
            return result
        ref = self._reference(row.model)
        try:
            answer = self._lane(row).ask("build", row.model, ref.weights, ref.photos, row.batch)
        except Failed as failure:
            result.status, result.note = "failed", str(failure)
            self.say(self._fraction(_work(row)), f"{row}: failed: {result.note.splitlines()[0]}")
            return result
        logits = torch.from_numpy(answer["logits"])
        if row.provider == "eager":
            ref.plain.setdefault(row.dtype, logits)
        for dtype in {row.dtype, "fp32"} - ref.plain.keys():
            ref.plain[dtype] = reference.plain_logits(ref, dtype)
        result.settings, result.seconds = answer["settings"], [answer["seconds"]]
        result.error, result.allowed, result.top1 = ref.error(logits), ref.allowed(row.dtype), ref.agreement(logits)
        wrong = ref.wrong(logits, row.dtype)
        if wrong is not None:
            result.status, result.note, result.seconds = "wrong", wrong, []
        checked = f"error {result.error:.1e} of {result.allowed:.1e} allowed, class {result.top1[0]}/{result.top1[1]}"
        self.say(self._fraction(_work(row)), f"{row}: WRONG, {wrong}" if wrong else f"{row}: right ({checked})")
        return result

    def _reference(self, model: str) -> Reference:
        if model not in self._references:
            self.say(self._fraction(0), f"{model}: calibrating on photographs; float64 reference")
            self._references[model] = reference.make(model, self.folder, self.budget.reference)
        return self._references[model]

    def _take_turns(self, rows: Sequence[Row], entrants: dict[Row, Lane]) -> None:
        if not entrants:
            return
        one_call = {row: self.results[row].seconds[0] for row in entrants}
        calls = {row: max(1, min(20, round(_TURN / seconds))) for row, seconds in one_call.items()}
        warm = {row: seconds < _COLD for row, seconds in one_call.items()}
        round_seconds = sum((calls[row] + warm[row]) * one_call[row] + _NAP for row in entrants)
        turns = self.budget.turns_for(round_seconds)
        self.say(self._fraction(0), f"{rows[0].model} b{rows[0].batch}: {turns} turns of {round_seconds:.0f} s")
        rates: dict[str, list[float]] = {dtype: [] for provider, dtype in self._lanes if provider == "peak"}
        for row in entrants:
            self.results[row].seconds = []
        order = list(entrants)
        for _ in range(turns):
            for dtype, found in rates.items():
                time.sleep(_NAP)
                found.append(self._lanes["peak", dtype].ask("peak", self.threads, _PEAK))
            for row in order:
                time.sleep(_NAP)
                self.results[row].seconds += entrants[row].ask("turn", calls[row], warm[row])
            order = order[1:] + order[:1]
        for row in entrants:
            self.results[row].peaks = {dtype: statistics.median(found) for dtype, found in rates.items()}

    def _fraction(self, work: float) -> float:
        """Of the whole run's work, after this much more of it."""
        self._done += work
        return self._done / self._total


def _work(row: Row) -> float:
    """A guess at a row's share of the time: arithmetic, and eager PyTorch does it at a third of the rate."""
    slow = 3 if PROVIDERS[row.provider].kind == "eager" else 1
    return SPECS[row.model].flop * (8 + 3 * row.batch) * slow
