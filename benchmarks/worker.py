"""The process of one provider in one dtype: builds what it is told to, and answers each request in turn.

Between requests it sleeps in recv(), so that its threads and buffers do not disturb the provider whose turn it is.
"""

import time
import traceback
import warnings
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks import memory, reference, steps
from benchmarks.networks import DTYPES, SPECS
from benchmarks.peers import PROVIDERS, Runner, fastest

_COLD = 0.25  # seconds; a longer call reads its weights from memory anyway, and does not notice empty caches
_CALLS = 20  # in a turn at most


class Worker:
    def __init__(self, provider: str, dtype: str, threads: int) -> None:
        self.module, self.provider, self.dtype, self.threads = PROVIDERS[provider].load(), provider, dtype, threads
        self.runner: Runner | None = None
        self.choices: list[Runner] = []
        self.feed: Any = None
        self.last = 0.0  # seconds of the last call
        self.used: dict[str, float] | None = None  # memory of a call that is not the first

    def build(self, model: str, weights: Path, photos: Tensor) -> None:
        """Build for the shape of ``photos``."""
        self.runner = self.feed = self.used = None
        memory.give_back()
        built = self.module.build(SPECS[model], weights, self.dtype, photos)
        self.choices = built if isinstance(built, list) else [built]

    def choose(self, photos: Tensor) -> dict[str, Any]:
        """The fastest of what was built, timed while nothing else runs. Returns its settings."""
        several = len(self.choices) > 1
        self.runner, self.choices = fastest(self.choices, photos) if several else self.choices[0], []
        return self.runner.settings

    def check(self, photos: Tensor, batch: int) -> dict[str, Any]:
        """Run over all photographs: the logits, the warm-up, and the seconds of the last call."""
        assert self.runner is not None
        logits = []
        for i in range(0, len(photos), batch):
            self.feed = self.runner.feed(photos[i : i + batch])
            logits.append(self.runner.read(self._timed()[1]))
        # numpy: a tensor would travel in shared memory, which containers keep small
        model = self.runner.model
        used = {} if model is None else memory.of_model(model)
        return {"logits": torch.cat(logits).numpy(), "seconds": self.last, "memory": used}

    def exact(self, model: str, weights: Path, photos: Tensor) -> Any:
        return reference.exact_logits(model, weights, photos).numpy()

    def check_training(self, model: str, weights: Path, feed: tuple[Tensor, Tensor]) -> dict[str, Any]:
        return steps.check(SPECS[model], weights, self.provider, self.dtype, *feed)

    def build_training(self, model: str, weights: Path, feed: tuple[Tensor, Tensor]) -> dict[str, Any]:
        """Build a training step for this batch, and run it twice: the warm-up, and the memory of a step."""
        self.runner = self.feed = None
        memory.give_back()
        self.runner = steps.runner(SPECS[model], weights, self.provider, self.dtype)
        self.feed = feed
        self.used = steps.measured(self._timed)
        return {"settings": self.runner.settings, "memory": self.used}

    def turn(self, seconds: float) -> list[float]:
        """Seconds of each call, as many as fill the turn.

        The first call after the check shows the memory: in the check itself weights were packed. A call of its own for
        that would make a run a minute longer.
        """
        times: list[float] = []
        if self.last < _COLD:
            self._seconds()  # not counted: the others emptied the caches
        start = time.perf_counter()
        while not times or (time.perf_counter() - start < seconds and len(times) < _CALLS):
            times.append(self._seconds())
        return times

    def memory_of_call(self) -> dict[str, float]:
        """Known once there was a turn."""
        return self.used or {}

    def _seconds(self) -> float:
        if self.used is None:
            self.used = memory.of_steady_call(self._timed)
        else:
            self._timed()
        return self.last

    def _timed(self) -> tuple[float, Any]:
        assert self.runner is not None
        run, feed = self.runner.run, self.feed
        start = time.perf_counter()
        out = run(feed)
        self.last = time.perf_counter() - start
        return self.last, out

    def peak(self, seconds: float) -> float:
        """FLOP/s of all threads together in this dtype, on registers alone."""
        from cmx_kernels import registry

        name = str(DTYPES[self.dtype]).removeprefix("torch.")
        with ThreadPoolExecutor(self.threads) as pool:
            return sum(pool.map(lambda _: registry.C.peak(name, seconds), range(self.threads)))


def main(connection: Connection, provider: str, dtype: str, threads: int) -> None:
    warnings.filterwarnings("ignore")
    torch.set_num_threads(threads)
    torch.set_grad_enabled(False)
    worker = Worker(provider, dtype, threads)
    while True:
        try:
            request, *arguments = connection.recv()
        except (EOFError, KeyboardInterrupt):
            return
        try:
            connection.send((True, getattr(worker, request)(*arguments)))
        except KeyboardInterrupt:
            return
        except Exception as error:
            connection.send((False, f"{type(error).__name__}: {error}\n{traceback.format_exc(limit=-4)}"))
