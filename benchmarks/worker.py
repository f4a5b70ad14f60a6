"""The process of one provider in one dtype: builds what it is told to, and answers each request in turn.

Between requests it sleeps in recv(), so that its threads and buffers do not disturb the provider whose turn it is.
"""

import contextlib
import ctypes
import gc
import time
import traceback
import warnings
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.networks import DTYPES, SPECS
from benchmarks.peers import PROVIDERS, Runner

_COLD = 1.0  # seconds; a longer call does not notice that the others emptied the caches
_CALLS = 20  # in a turn at most


class Worker:
    def __init__(self, provider: str, dtype: str) -> None:
        self.module, self.dtype = PROVIDERS[provider].load(), dtype
        self.runner: Runner | None = None
        self.feed: Any = None
        self.last = 0.0  # seconds of the last call

    def build(self, model: str, weights: Path, photos: Tensor, batch: int) -> dict[str, Any]:
        """Build for this batch size and run over all photographs: the check's outputs, and the warm-up."""
        self.runner = self.feed = None
        _give_memory_back()
        self.runner = runner = self.module.build(SPECS[model], weights, self.dtype, photos[:batch])
        _reset_peak_memory()
        logits = []
        for i in range(0, len(photos), batch):
            self.feed = runner.feed(photos[i : i + batch])
            logits.append(runner.read(self._timed()[1]))
        # numpy: a tensor would travel in shared memory, which containers keep small
        return {"logits": torch.cat(logits).numpy(), "settings": runner.settings}

    def turn(self, seconds: float) -> list[float]:
        """Seconds of each call, as many as fill the turn."""
        times: list[float] = []
        if self.last < _COLD:
            self._timed()  # not counted: the others emptied the caches
        start = time.perf_counter()
        while not times or (time.perf_counter() - start < seconds and len(times) < _CALLS):
            times.append(self._timed()[0])
        return times

    def _timed(self) -> tuple[float, Any]:
        assert self.runner is not None
        run, feed = self.runner.run, self.feed
        start = time.perf_counter()
        out = run(feed)
        self.last = time.perf_counter() - start
        return self.last, out

    def peak_memory(self) -> float | None:
        """The most memory this process had since the model was built, in MiB (Linux)."""
        try:
            line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
        except (OSError, StopIteration):
            return None
        return int(line.split()[1]) / 1024

    def peak(self, threads: int, seconds: float) -> float:
        """FLOP/s of all threads together in this dtype, on registers alone."""
        from cmx_kernels import registry

        name = str(DTYPES[self.dtype]).removeprefix("torch.")
        with ThreadPoolExecutor(threads) as pool:
            return sum(pool.map(lambda _: registry.C.peak(name, seconds), range(threads)))


def main(connection: Connection, provider: str, dtype: str, threads: int) -> None:
    warnings.filterwarnings("ignore")
    torch.set_num_threads(threads)
    torch.set_grad_enabled(False)
    worker = Worker(provider, dtype)
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


def _give_memory_back() -> None:
    """Free what the last model left, so that this one's memory is its own."""
    gc.collect()
    with contextlib.suppress(AttributeError, OSError):  # not glibc
        ctypes.CDLL(None).malloc_trim(0)


def _reset_peak_memory() -> None:
    with contextlib.suppress(OSError):  # not Linux: the peak is then that of the whole process
        Path("/proc/self/clear_refs").write_text("5")
