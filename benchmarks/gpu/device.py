"""The device that is measured. With a dry run that is the CPU, with tiny shapes: to see that everything else works."""

import argparse
import contextlib
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from statistics import median
from typing import Any

import torch

import cmx_kernels
from benchmarks import machine
from cmx_kernels import backends, cost_model, registry

RESULTS = Path(__file__).resolve().parent.parent / "results"
KINDS = {"fp32": torch.float32, "tf32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
OURS = ("fused", "kernel")  # with one of these begins the name of each provider of ours
_ROUNDS = 12
_FLUSH = 256 << 20  # bytes, more than any L2
_AHEAD = 1_000_000  # cycles, 0.5 ms


class Device:
    def __init__(self, options: argparse.Namespace) -> None:
        self.dry, self.type = options.dry_run, options.device
        self.seconds, self.start = options.seconds, time.monotonic()
        self.without, self.only = tuple(options.without), tuple(options.only)
        self.cuda = self.type == "cuda"
        if self.dry:
            torch.set_num_threads(1)  # tiny shapes on a machine that may be busy
        self.name = torch.cuda.get_device_name() if self.cuda else "CPU, dry run"
        self._buffer = torch.empty(_FLUSH if self.cuda else 1, dtype=torch.uint8, device=self.type)

    def backend_of(self, provider: str) -> contextlib.AbstractContextManager[None]:
        """Forces what ``provider`` names, "fused" or "fused triton": not all GPUs choose one by themselves."""
        if not self.cuda or not provider.startswith("fused"):
            return contextlib.nullcontext()
        return backends.use("triton" if provider.startswith("fused triton") else "cuda")

    def wants(self, provider: str) -> bool:
        """Unless --without names the beginning of its name."""
        return not provider.startswith(self.without)

    def takes(self, model: str) -> bool:
        return not self.only or model.startswith(self.only)

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

    def ceilings(self) -> dict[str, float]:
        """GB/s of a copy, bytes read and written; GFLOP/s of a large matrix product, by dtype."""
        a = torch.ones((256 << 20) if self.cuda else (1 << 20), device=self.type, dtype=torch.bfloat16)
        b = torch.empty_like(a)
        found = {"copy": 2 * a.nbytes / median(self.once(lambda: b.copy_(a)) for _ in range(20)) * 1e-3}
        side = 8192 if self.cuda else 64
        for name, kind in KINDS.items():
            with flags(tf32=name == "tf32"):
                m = torch.randn(side, side, device=self.type).to(kind)
                us = [self.once(lambda m=m: m @ m) for _ in range(6)][1:]
            found[name] = 2 * side**3 / median(us) * 1e-3
        return found

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

    def cost(self, name: str, *shape: Any) -> dict[str, Any]:
        """What cmx_kernels.cost_model says of an operator: bytes and FLOP; kernel, time and floor on a GPU it knows."""
        if registry.C is None:
            return {}
        known = cost_model.named(self.name)
        p = getattr(cost_model, name)(known or cost_model.gpus()[0], *shape)
        of_gpu = {"kernel": p.kernel, "predicted_us": p.predicted_us, "floor_us": p.floor_us} if known else {}
        return {"bytes": p.bytes, "flop": p.flop, **of_gpu}

    @property
    def over(self) -> bool:
        return self.left < 0

    @property
    def left(self) -> float:
        """Seconds in which something new may be started."""
        return self.start + self.seconds - time.monotonic()

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
    made.add_argument("--without", action="append", default=[], metavar="NAME", help="no provider that begins so")
    made.add_argument("--only", action="append", default=[], metavar="MODEL", help="only models that begin so")
    made.add_argument("--resume", action="store_true", help="keep what NAME.json has, and measure the rest")
    return made


def opened(options: argparse.Namespace) -> Device | None:
    """The device, or None after a sentence."""
    if options.device == "cuda" and not torch.cuda.is_available():
        print("torch sees no CUDA device here, so there is nothing to time; --device cpu --dry-run tries the rest")
        return None
    return Device(options)


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


def described(provider: str, backend: str) -> dict[str, str]:
    """Layout of the images, and what runs: ``backend`` for ours."""
    ours = "triton" if provider.startswith("fused triton") else backend
    layout = "NHWC" if "channels_last" in provider else "NCHW"
    return {"layout": layout, "backend": ours if provider.startswith(OURS) else "torch"}


def race(
    device: Device,
    calls: dict[str, Callable[[], torch.Tensor]],
    exact: torch.Tensor,
    allowed: float,
    record: dict[str, Any],
    unchecked: str | None = None,
) -> dict[str, float]:
    """Microseconds of each call, in turns, of those that are right: first two images against ``exact``.

    ``record`` gets their errors, and a note of what is wrong. Names that begin with ``unchecked`` compute something
    else.
    """
    errors: dict[str, float] = {}
    record |= {"errors": errors, "allowed": allowed, "match": True}
    for name in [name for name in calls if unchecked is None or not name.startswith(unchecked)]:
        try:
            errors[name] = error = (calls[name]()[:2].double() - exact).abs().max().item()
        except Exception as failure:  # the others are still timed
            if device.broken:
                raise
            record["match"] = record["match"] and not name.startswith(OURS)
            record["note"] += f"{name}: {reason(failure)}. "
            del calls[name]
            continue
        if not error <= allowed:
            record["match"] = record["match"] and not name.startswith(OURS)
            record["note"] += f"{name} is wrong by {error:.3g}, allowed are {allowed:.3g}: not timed. "
            del calls[name]
    times: dict[str, list[float]] = {}
    for _ in range(3 if device.dry else _ROUNDS):
        for name, call in calls.items():
            times.setdefault(name, []).append(device.once(call))
    return {name: median(values[1:]) for name, values in times.items()}


def rated(record: dict[str, Any], us: dict[str, float], cost: Mapping[str, Any], backend: str) -> None:
    """Adds times, what they are against the cost, and what each provider is."""
    about = {name: described(name, backend) for name in us}
    record |= {"us": us, **cost, "error": record["errors"].get("fused")}
    record |= {key: {name: found[key] for name, found in about.items()} for key in ("layout", "backend")}
    if "fused" not in us:
        return
    if cost:
        record |= {"gflops": cost["flop"] / us["fused"] * 1e-3, "gb_per_s": cost["bytes"] / us["fused"] * 1e-3}
    if "floor_us" in cost:
        record["percent_of_floor"] = 100 * cost["floor_us"] / us["fused"]
    torchs = [value for name, value in us.items() if name.startswith(("eager", "inductor"))]
    if torchs:
        record["speedup"] = min(torchs) / us["fused"]


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
