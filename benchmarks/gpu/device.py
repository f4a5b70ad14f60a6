"""The device that is measured. With a dry run that is the CPU, with tiny shapes: to see that everything else works."""

import argparse
import contextlib
import json
import os
import platform
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from statistics import median
from typing import Any

import torch

import cmx_kernels
from benchmarks import machine, report
from cmx_kernels import backends

RESULTS = Path(__file__).resolve().parent.parent / "results"
BROKEN = 75  # exit status: a kernel has ended the CUDA context; another process goes on with --resume
_ROUNDS = 12
_FLUSH = 256 << 20  # bytes, more than any L2
_AHEAD = 200_000  # cycles, 0.1 ms


class Device:
    def __init__(self, options: argparse.Namespace) -> None:
        self.dry, self.type = options.dry_run, options.device
        self.seconds, self.start = options.seconds, time.monotonic()
        self.cuda = self.type == "cuda"
        if self.dry:
            torch.set_num_threads(1)  # tiny shapes on a machine that may be busy
        self.name = torch.cuda.get_device_name() if self.cuda else "CPU, dry run"
        self._buffer = torch.empty(_FLUSH if self.cuda else 1, dtype=torch.uint8, device=self.type)

    def backend_of(self, provider: str) -> contextlib.AbstractContextManager[None]:
        """Forces what ``provider`` names, "fused" or "fused triton": no GPU backend is chosen by itself yet."""
        if not self.cuda or not provider.startswith("fused"):
            return contextlib.nullcontext()
        return backends.use("triton" if provider.startswith("fused triton") else "cuda")

    def once(self, call: Callable[[], Any], flush: bool = True) -> float:
        """Microseconds by events; the L2 cache is overwritten before, unless a caller's network does that itself."""
        if flush:
            self._buffer.zero_()
            if self.cuda:
                torch.cuda._sleep(_AHEAD)  # meanwhile Python enqueues the call: what is timed does not wait for it
        if not self.cuda:
            start = time.perf_counter()
            call()
            return (time.perf_counter() - start) * 1e6
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        call()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) * 1e3

    def copy_bandwidth(self) -> float:
        """TB/s of a copy, bytes read and written."""
        a = torch.ones((256 << 20) if self.cuda else (1 << 20), device=self.type, dtype=torch.bfloat16)
        b = torch.empty_like(a)
        us = median(self.once(lambda: b.copy_(a)) for _ in range(20))
        return 2 * a.nbytes / us * 1e-6

    def memory(self, call: Callable[[], Any]) -> dict[str, float]:
        """MiB that a call takes at most beyond what was there; nothing without a GPU."""
        if not self.cuda:
            call()
            return {}
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        torch.cuda.synchronize()
        most = torch.cuda.max_memory_allocated()
        return {"process": most / 2**20, "call": (most - before) / 2**20}

    def compiled(self, function: Callable[..., Any], **options: Any) -> Callable[..., Any]:
        """torch.compile; a dry run traces only, compiling takes minutes."""
        torch._dynamo.reset()
        return torch.compile(function, **({"backend": "eager"} if self.dry else options))

    @property
    def over(self) -> bool:
        return time.monotonic() - self.start > self.seconds

    @property
    def broken(self) -> bool:
        """Whether every further call fails, as behind an illegal address."""
        try:
            if self.cuda:
                torch.cuda.synchronize()
        except Exception:
            return True
        return False

    def about(self) -> dict[str, Any]:
        found = {**machine.about(), "gpu": self.name, "cmx_kernels": cmx_kernels.__version__, "dry_run": self.dry}
        if self.cuda:
            major, minor = torch.cuda.get_device_capability()
            found |= {"arch": f"sm_{major}{minor}", "cuda": torch.version.cuda, "cudnn": torch.backends.cudnn.version()}
            found["title"] = f"{self.name}, CUDA {torch.version.cuda}, cuDNN {torch.backends.cudnn.version()}"
        return found


def parser(description: str, name: str) -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(description=description)
    made.add_argument("--seconds", type=float, default=480, help="start nothing new after this time")
    made.add_argument("--name", default=name, help="benchmarks/results/NAME.json, .md")
    made.add_argument("--results", type=Path, default=RESULTS, help="another folder for them")
    made.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    made.add_argument("--dry-run", action="store_true", help="tiny shapes, one call each: with --device cpu, no GPU")
    made.add_argument("--resume", action="store_true", help="keep what NAME.json has, and measure the rest")
    return made


def opened(options: argparse.Namespace) -> Device | None:
    """The device, or None after a sentence."""
    if options.device == "cuda" and not torch.cuda.is_available():
        print("torch sees no CUDA device here, so there is nothing to time; --device cpu --dry-run tries the rest")
        return None
    return Device(options)


class Store:
    """Writes after every record: whatever ends the process, what was measured is there."""

    def __init__(self, device: Device, options: argparse.Namespace) -> None:
        self.about, self.folder, self.name = device.about(), options.results, options.name
        self.kept: dict[str, list[dict[str, Any]]] = {}
        self._device, file = device, self.folder / f"{self.name}.json"
        if options.resume and file.is_file():
            self.kept = {key: rows for key, rows in json.loads(file.read_text()).items() if key != "machine"}

    def has(self, section: str, key: Mapping[str, Any]) -> bool:
        return any(key.items() <= row.items() for row in self.rows(section))

    def rows(self, section: str) -> list[dict[str, Any]]:
        return self.kept.get(section, [])

    def failed(self, section: str, record: dict[str, Any], error: BaseException) -> None:
        """Adds what failed. Where nothing else can run in this process, ends it: the rest is for another one."""
        record["note"] += reason(error)
        self.add(section, record)
        if self._device.broken:
            say(f"the CUDA context is broken: {record['note']}")
            os._exit(BROKEN)  # nothing is torn down: that would fail, too

    def add(self, section: str, record: Mapping[str, Any]) -> None:
        self.kept.setdefault(section, []).append(dict(record))
        self.folder.mkdir(parents=True, exist_ok=True)
        report.write(self.folder, self.name, self.about, self.kept)


def reason(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:200]}" if lines else type(error).__name__


@contextlib.contextmanager
def flags(tf32: bool = False, benchmark: bool = False) -> Iterator[None]:
    """TF32 in products and convolutions, and cuDNN's search, for what runs inside. cudnn.flags turns off what it is not
    told to leave on, cuDNN itself too."""
    products = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = tf32
    try:
        with torch.backends.cudnn.flags(enabled=True, allow_tf32=tf32, benchmark=benchmark):
            yield
    finally:
        torch.backends.cuda.matmul.allow_tf32 = products


def race(
    device: Device,
    calls: dict[str, Callable[[], torch.Tensor]],
    exact: torch.Tensor,
    allowed: float,
    record: dict[str, Any],
    unchecked: str | None = None,
) -> dict[str, float]:
    """Microseconds of each call, in turns, of those that are right: first two images against ``exact``.

    What is wrong goes into the note of ``record``. Names that begin with ``unchecked`` compute something else.
    """
    for name in [name for name in calls if unchecked is None or not name.startswith(unchecked)]:
        try:
            error = (calls[name]()[:2].double() - exact).abs().max().item()
        except Exception as failure:  # the others are still timed
            if device.broken:
                raise
            record["note"] += f"{name}: {reason(failure)}. "
            del calls[name]
            continue
        if name == "fused":
            record |= {"error": error, "allowed": allowed}
        if not error <= allowed:
            record["note"] += f"{name} is wrong by {error:.3g}, allowed are {allowed:.3g}: not timed. "
            del calls[name]
    times: dict[str, list[float]] = {}
    for _ in range(3 if device.dry else _ROUNDS):
        for name, call in calls.items():
            times.setdefault(name, []).append(device.once(call))
    return {name: median(values[1:]) for name, values in times.items()}


def graphed(device: Device, call: Callable[[], Any]) -> Callable[[], Any]:
    """The call as a CUDA graph; in a dry run itself."""
    if not device.cuda:
        return call
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = call()

    def replay() -> Any:
        graph.replay()
        return out

    return replay


def say(text: str) -> None:
    print(text, flush=True)


def save(path: Path, record: Mapping[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({**record, "python": platform.python_version()}, indent=1) + "\n")
