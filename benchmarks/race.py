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
from torch import Tensor

from benchmarks import reference, worker
from benchmarks.networks import SPECS
from benchmarks.peers import PROVIDERS
from benchmarks.reference import Reference

_NAP = 0.05  # seconds between turns: the thread pools of the provider before have stopped spinning
_TURN = 0.3  # seconds a turn should last
_PEAK = 0.1  # seconds a measurement of the arithmetic peak lasts


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

    race: float  # seconds for the turns of one model and batch size, the least number of turns aside
    turns: tuple[int, int]  # at least, at most
    reference: float  # seconds of float64 a model
    photos: int  # checked in batches of one
    slow: float  # seconds; a longer call gets two turns


DEFAULT = Budget(race=20, turns=(3, 7), reference=4, photos=4, slow=3)
FULL = Budget(race=90, turns=(5, 15), reference=20, photos=8, slow=30)


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
        self.rows, self.budget, self.folder = rows, budget, folder
        self.threads, self.say, self.peak = threads, say, peak
        self.results: dict[Row, Result] = {}
        self._references: dict[str, Reference] = {}
        self._lanes: dict[tuple[str, str], Lane] = {}
        self._total, self._done = sum(map(self._work, rows)), 0.0  # for the progress

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
        self._take_turns(entrants)
        for result in results:
            self._done += self._turns_work(result.row)
            if result.status == "timed":
                rate, ms = result.row.batch / result.median, result.median * 1e3
                calls = f"{ms:.1f} ms a call, spread {result.spread:.1%}, {len(result.seconds)} calls"
                self._tell(f"{result.row}: {rate:.2f} images/s ({calls})")

    def _start(self) -> None:
        """All processes at once: each imports torch, which takes seconds."""
        pairs = {(row.provider, row.dtype) for row in self.rows if PROVIDERS[row.provider].load().why_absent() is None}
        peaks = {("peak", dtype) for dtype in ("fp32", "bf16")} if self.peak and pairs else set()
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
            return result
        ref = self._reference(row.model)
        try:
            answer = self._lane(row).ask("build", row.model, ref.weights, self._photos(ref, row.batch), row.batch)
        except Failed as failure:
            self._fail(result, failure)
            return result
        finally:
            self._done += self._check_work(row)
        logits = torch.from_numpy(answer["logits"])
        if row.provider == "eager":
            ref.learn_plain(row.dtype, logits)
        for dtype in {row.dtype, "fp32"} - ref.plain.keys():  # eager was not asked for
            ref.learn_plain(dtype, reference.plain_logits(ref, dtype))
        result.settings = answer["settings"]
        result.error, result.allowed, result.top1 = ref.error(logits), ref.allowed(row.dtype), ref.agreement(logits)
        wrong = ref.wrong(logits, row.dtype)
        if wrong is not None:
            result.status, result.note = "wrong", wrong
        checked = f"error {result.error:.1e} of {result.allowed:.1e} allowed, class {result.top1[0]}/{result.top1[1]}"
        self._tell(f"{row}: WRONG, {wrong}" if wrong else f"{row}: right ({checked})")
        return result

    def _photos(self, ref: Reference, batch: int) -> Tensor:
        """For the check; as many as whole batches hold, some twice if the batch is large."""
        count = -(-max(self.budget.photos, batch) // batch) * batch
        return ref.photos[torch.arange(count) % len(ref.photos)]

    def _fail(self, result: Result, failure: Failed) -> None:
        result.status, result.note = "failed", str(failure)
        self._tell(f"{result.row}: failed: {result.note.splitlines()[0]}")

    def _reference(self, model: str) -> Reference:
        if model not in self._references:
            self._tell(f"{model}: calibrating on photographs; float64 reference")
            self._references[model] = reference.make(model, self.folder, self.budget.reference)
        return self._references[model]

    def _take_turns(self, entrants: dict[Row, Lane]) -> None:
        if not entrants:
            return
        peaks: dict[str, list[float]] = {dtype: [] for provider, dtype in self._lanes if provider == "peak"}
        order, (least, most) = list(entrants), self.budget.turns
        start = time.perf_counter()
        for turn in range(most):
            if turn >= least and time.perf_counter() - start > self.budget.race:
                break
            for dtype, found in peaks.items():
                time.sleep(_NAP)
                found.append(self._lanes["peak", dtype].ask("peak", self.threads, _PEAK))
            for row in order:
                slow = turn >= 2 and self.results[row].median > self.budget.slow
                if self.results[row].status == "timed" and not slow:
                    time.sleep(_NAP)
                    self._turn(self.results[row], entrants[row])
            order = order[1:] + order[:1]
        for row in entrants:
            self.results[row].peaks = peaks

    def _turn(self, result: Result, lane: Lane) -> None:
        try:
            result.seconds += lane.ask("turn", _TURN)
            result.memory = lane.ask("peak_memory")
        except Failed as failure:
            self._fail(result, failure)

    def _tell(self, text: str) -> None:
        self.say(self._done / self._total, text)

    def _work(self, row: Row) -> float:
        return self._check_work(row) + self._turns_work(row)

    def _check_work(self, row: Row) -> float:
        """A guess at the seconds it takes; only the proportions matter."""
        return 2 + _seconds(row) * max(1, self.budget.photos / row.batch)

    def _turns_work(self, row: Row) -> float:
        return self.budget.turns[0] * max(_seconds(row), 2 * _TURN)


def _seconds(row: Row) -> float:
    """Of a call, on a small machine; eager PyTorch takes twice what the others take."""
    slow = 2 if PROVIDERS[row.provider].kind == "eager" else 1
    return SPECS[row.model].flop * row.batch * slow / (200e9 if row.dtype == "fp32" else 400e9)
