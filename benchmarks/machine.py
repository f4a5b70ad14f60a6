"""What a number depends on: processor, versions, commit, the machine's ceilings. No names of hosts or paths."""

import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime, timezone
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

_PACKAGES = ("torch", "triton", "onnxruntime", "openvino", "timm", "numpy", "pytest-benchmark")


@cache
def about() -> dict[str, Any]:
    from cmx_kernels import registry

    isa = registry.isa_level() if hasattr(registry, "isa_level") else None
    return {
        "cpu": _cpu_model(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "threads": torch.get_num_threads(),
        "isa": isa or f"no compiled kernels (torch: {torch.backends.cpu.get_cpu_capability()})",
        "os": platform.system(),
        "python": platform.python_version(),
        "versions": {name: metadata.version(name) for name in _PACKAGES if _installed(name)},
        "commit": commit(),
        "date": datetime.now(timezone.utc).isoformat(timespec="minutes"),
        "command": " ".join([_program(), *sys.argv[1:]]),
    }


def title(about: Mapping[str, Any]) -> str:
    return about.get("title") or f"{about['cpu']}, {about['cores']} cores, {about['threads']} threads, {about['isa']}"


def header(about: Mapping[str, Any]) -> list[str]:
    versions = ", ".join(f"{name} {version}" for name, version in about["versions"].items())
    return [
        f"{title(about)}; {about['date']}",
        f"{versions}; Python {about['python']}; commit {about['commit']}",
        f"command: {about['command']}",
    ]


@cache
def ceilings(seconds: float = 0.1) -> dict[str, float]:
    """GFLOP/s of all threads on registers alone, by dtype, and GB/s of a copy (read and written); medians of three."""
    from cmx_kernels import registry

    threads = torch.get_num_threads()
    found = {}
    if hasattr(registry.C, "peak"):
        with ThreadPoolExecutor(threads) as pool:
            for name, dtype in (("fp32", "float32"), ("bf16", "bfloat16")):
                rounds = [sum(pool.map(lambda _: registry.C.peak(dtype, seconds), range(threads))) for _ in range(3)]  # noqa: B023
                found[name] = statistics.median(rounds) / 1e9
    source = torch.ones(64 << 20)
    target, times = torch.zeros_like(source), []
    for _ in range(3):
        start = time.perf_counter()
        target.copy_(source)
        times.append(time.perf_counter() - start)
    return {**found, "copy": 2 * source.nbytes / statistics.median(times) / 1e9}


def peaks() -> dict[str, float]:
    """The same in FLOP/s and bytes/s."""
    return {name: 1e9 * value for name, value in ceilings().items()}


def commit() -> str:
    def git(*arguments: str) -> str:
        command = ["git", "-C", str(Path(__file__).parent), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    try:
        changed = git("status", "--porcelain", "--untracked-files=no")
        return git("rev-parse", "--short", "HEAD") + (" with changes" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return os.environ.get("CMX_COMMIT", "unknown")


def _program() -> str:
    main = sys.modules["__main__"].__spec__
    name = main.name.removesuffix(".__main__") if main else Path(sys.argv[0]).name
    return name if name == "pytest" else f"python -m {name}"


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def _installed(name: str) -> bool:
    try:
        metadata.version(name)
    except metadata.PackageNotFoundError:
        return False
    return True
