"""Speed here: a first look (fused against plain PyTorch, checked, in turns), and the way to the whole suite."""

import random
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from cmx_kernels.models import ConvMixer, create_model

Key = TypeVar("Key")


def in_turns(calls: Mapping[Key, Callable[[], Any]], seconds: float, rounds: tuple[int, int]) -> dict[Key, list[float]]:
    """Seconds of every call, after one each that does not count; every turn in another order.

    A call finds the caches and the free memory that the one before it left, so none may always follow the same one.

    seconds: for each of them, roughly. rounds: at least, at most.
    """
    order, times = list(calls), {key: list[float]() for key in calls}
    for call in calls.values():
        call()
    start, (least, most), orders = time.perf_counter(), rounds, random.Random(0)
    for turn in range(most):
        if turn >= least and time.perf_counter() - start > seconds * len(calls):
            break
        for key in orders.sample(order, len(order)):
            before = time.perf_counter()
            calls[key]()
            times[key].append(time.perf_counter() - before)
    return times


def suite(arguments: Sequence[str]) -> int:
    """The suite of the repository, as `make bench` runs it; its exit status."""
    root = Path(__file__).resolve().parent.parent
    if not (root / "benchmarks" / "conftest.py").is_file():
        raise ValueError(
            "the suite is part of the repository, and this package is installed without it: "
            "name models to compare, as in `bench 768/32`, or run `make bench` in a clone"
        )
    command = [sys.executable, "-m", "pytest", "benchmarks", "--benchmark-only", *arguments]
    return subprocess.run(command, cwd=root).returncode


def compare(name: str, batch: int, size: int, dtype: torch.dtype, rounds: int) -> str:
    """One line: images per second of both, their ratio, and how far the logits are apart.

    Raises:
        RuntimeError: the logits disagree; no figure is given then.
    """
    torch.manual_seed(0)
    fused = create_model(name, dtype=dtype).eval()
    plain = create_model(name, fused=False, dtype=dtype).eval()
    plain.load_state_dict(fused.state_dict())
    x = torch.randn(batch, 3, size, size, dtype=dtype)
    with torch.inference_mode():
        difference = _difference(fused, plain, x)
        calls: dict[str, Callable[[], Any]] = {"fused": lambda: fused(x), "plain": lambda: plain(x)}
        seconds = in_turns(calls, 0, (rounds, rounds))
    fast, slow = (batch / statistics.median(times) for times in seconds.values())
    return (
        f"{name}  batch {batch}  {str(dtype).removeprefix('torch.')}  fused {fast:.2f}  plain {slow:.2f} images/s  "
        f"{fast / slow:.2f}x  median of {rounds} turns  logits differ by {difference:.1e}"
    )


def _difference(fused: ConvMixer, plain: ConvMixer, x: Tensor) -> float:
    """Half precision may differ in the last digits of every layer."""
    a, b = fused(x).float(), plain(x).float()
    allowed = 1e-4 if x.dtype == torch.float32 else 5e-2
    difference = float((a - b).abs().max() / b.abs().max())
    if not difference <= allowed:
        raise RuntimeError(f"fused and plain logits differ by {difference:.1e} of the largest, more than {allowed}")
    return difference
