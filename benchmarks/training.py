"""Times the training steps of the providers of one network, dtype and batch size, after checking their gradients.

    max |g - ref| / |ref| <= 2 max |plain - ref| / |ref| + eps      over the gradients g of all parameters

ref: the plain model's, in float64. |.| is the Euclidean norm of a parameter's gradient: its largest element out of a
million is a matter of luck. As in a race, each provider is a process of its own.
"""

from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from benchmarks import photos, steps
from benchmarks.lanes import Failed, Lane
from benchmarks.networks import DTYPES, SPECS, Spec, plain
from benchmarks.race import DEFAULT, Budget, Result, Row, take_turns

PROVIDERS = ("eager", "eager channels_last", "inductor", "fused")


def images_and_labels(spec: Spec, count: int, size: int | None = None) -> tuple[Tensor, Tensor]:
    crops = photos.random_crops(size or spec.image_size, min(count, 16))
    return crops[torch.arange(count) % len(crops)].contiguous(), torch.arange(count) % spec.classes


class Trainings:
    """Checks, then times, all providers of a network, dtype and batch size, each in a process of its own."""

    def __init__(self, rows: Sequence[Row], folder: Path, threads: int, say: Callable[..., None], peak: bool) -> None:
        self.rows, self.folder, self.threads, self.say, self.peak = rows, folder, threads, say, peak
        self.results: dict[Row, Result] = {}
        self._truth: dict[str, tuple[tuple[Tensor, Tensor], dict[str, Tensor]]] = {}
        self._errors: dict[tuple[str, str, str], float] = {}  # model, dtype, provider
        self._lanes: dict[tuple[str, str], Lane] = {}

    def result(self, row: Row, budget: Budget = DEFAULT) -> Result:
        if row not in self.results:
            rows = [r for r in self.rows if r[:3] == row[:3]]
            for r in rows:  # all processes at once
                self._lane(r.provider, r.dtype)
            results = [self._prepared(r) for r in rows]
            peaks = {d: self._lane("fused", d) for d in {"fp32", row.dtype}} if self.peak else {}
            take_turns(results, {r: self._lane(r.provider, r.dtype) for r in rows}, peaks, budget)
            for r, result in zip(rows, results, strict=True):
                self.results[r] = result
                done = f"{result.median * 1e3:.0f} ms a step" if result.status == "timed" else result.note[:100]
                self.say(len(self.results) / len(self.rows), f"training {r}: {result.status}, {done}")
        return self.results[row]

    def close(self) -> None:
        for lane in self._lanes.values():
            lane.stop()

    def _lane(self, provider: str, dtype: str) -> Lane:
        if (provider, dtype) not in self._lanes:
            self._lanes[provider, dtype] = Lane(provider, dtype, self.threads)
        return self._lanes[provider, dtype]

    def _prepared(self, row: Row) -> Result:
        result, spec = Result(row), SPECS[row.model]
        try:
            result.error, result.allowed = self._error(row), 2 * self._error(row._replace(provider="eager"))
            result.allowed += 16 * torch.finfo(DTYPES[row.dtype]).eps / 2
            if not result.error <= result.allowed:
                result.status = "wrong"
                result.note = f"gradients are off by {result.error:.2g}, allowed are {result.allowed:.2g}"
                return result
            request = ("build_training", row.model, self._weights(row.model), images_and_labels(spec, row.batch))
            answer = self._lane(row.provider, row.dtype).ask(*request)
            result.settings, result.memory = answer["settings"], answer["memory"]
        except Failed as failure:
            result.status, result.note = "failed", str(failure)
        return result

    def _error(self, row: Row) -> float:
        """The largest over all parameters of |g - ref| / |ref|; infinite if a gradient is missing."""
        key = row.model, row.dtype, row.provider
        if key not in self._errors:
            feed, truth = self._reference(row.model)
            found = self._lane(row.provider, row.dtype).ask("check_training", row.model, self._weights(row.model), feed)
            given = {name: torch.from_numpy(g).double() for name, g in found["gradients"].items()}
            errors = [(given[n] - ref).norm() / ref.norm() for n, ref in truth.items() if n in given]
            self._errors[key] = float(torch.stack(errors).max()) if len(errors) == len(truth) else float("inf")
        return self._errors[key]

    def _weights(self, model: str) -> Path:
        path = self.folder / f"{model}-training.pt"
        if not path.exists():
            torch.manual_seed(0)
            torch.save(plain(SPECS[model]).state_dict(), path)
        return path

    def _reference(self, model: str) -> tuple[tuple[Tensor, Tensor], dict[str, Tensor]]:
        """Two images of at most 112 pixels a side: float64 takes its time."""
        if model not in self._truth:
            spec = SPECS[model]
            feed = images_and_labels(spec, 2, min(spec.image_size, 16 * spec.patch_size))
            exact, call = steps.network(spec, self._weights(model), "eager")
            steps.gradients(exact.double(), call, feed[0].double(), feed[1], False)
            truth = {name: p.grad for name, p in exact.named_parameters() if p.grad is not None}
            self._truth[model] = feed, truth
        return self._truth[model]
