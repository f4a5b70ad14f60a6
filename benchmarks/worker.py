"""The process of one provider in one dtype: builds what it is told to, and answers each request in turn.

Between requests it sleeps in recv(), so that its threads and buffers do not disturb the provider whose turn it is.
"""

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


class Worker:
    def __init__(self, provider: str, dtype: str) -> None:
        self.module, self.dtype = PROVIDERS[provider].load(), dtype
        self.runner: Runner | None = None
        self.feed: Any = None

    def build(self, model: str, weights: Path, photos: Tensor, batch: int) -> dict[str, Any]:
        """Build for this batch size and run over all photographs: the check's outputs, and the warm-up."""
        self.runner = self.feed = None
        _give_memory_back()
        self.runner = runner = self.module.build(SPECS[model], weights, self.dtype, photos[:batch])
        _reset_peak_memory()
        logits, seconds = [], 0.0
        for i in range(0, len(photos), batch):
            self.feed = runner.feed(photos[i : i + batch])
            start = time.perf_counter()
            out = runner.run(self.feed)
            seconds = time.perf_counter() - start
            logits.append(runner.read(out))
        # numpy: a tensor would travel in shared memory, which containers keep small
        return {"logits": torch.cat(logits).numpy(), "seconds": seconds, "settings": runner.settings}

    def turn(self, calls: int, warm: bool) -> list[float]:
        """Seconds of each call; ``warm``: after one that is not counted, as the others emptied the caches."""
        assert self.runner is not None
        run, feed, times = self.runner.run, self.feed, []
        if warm:
            run(feed)
        for _ in range(calls):
            start = time.perf_counter()
            run(feed)
            times.append(time.perf_counter() - start)
        return times

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
    try:
        ctypes.CDLL(None).malloc_trim(0)
    except (AttributeError, OSError):
        pass  # not glibc


def _reset_peak_memory() -> None:
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        pass  # not Linux: the peak is then that of the whole process
