"""Memory of a process, in MiB; where the system does not say (it is not Linux), the entry is missing."""

import contextlib
import ctypes
import gc
import sys
from pathlib import Path
from typing import Any

from torch import nn

_MIB = 2**20


def give_back() -> None:
    """Free what the last model left, so that the next one's memory is its own."""
    gc.collect()
    native = getattr(sys.modules.get("cmx_kernels.registry"), "C", None)
    if hasattr(native, "release_memory"):
        native.release_memory()
    with contextlib.suppress(AttributeError, OSError):  # not glibc
        ctypes.CDLL(None).malloc_trim(0)


def reset_peak() -> None:
    with contextlib.suppress(OSError):  # not Linux: the peak is then that of the whole process
        Path("/proc/self/clear_refs").write_text("5")


def resident() -> float | None:
    return _status("VmRSS")


def peak() -> float | None:
    """The most that was resident since reset_peak()."""
    return _status("VmHWM")


def _status(key: str) -> float | None:
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
        return int(next(line for line in lines if line.startswith(key)).split()[1]) / 1024
    except (OSError, StopIteration):
        return None


def of_model(model: nn.Module) -> dict[str, float]:
    """Parameters and buffers; and the packed copy of the weights that the fused forms of modules keep."""
    from cmx_kernels.models.stack import STATE, Stack

    found = {"weights": sum(t.nbytes for t in (*model.parameters(), *model.buffers())) / _MIB}
    stacks = [m.__dict__[STATE] for m in model.modules() if isinstance(m.__dict__.get(STATE), Stack)]
    packed = [(stack.cache._state or [None])[-1] for stack in stacks]
    found["packed"] = sum(t.nbytes for p in packed if p is not None for t in p.tensors) / _MIB
    return found


def of_steady_call(run: Any) -> dict[str, float]:
    """Of a call that finds no free memory left by the ones before it."""
    give_back()
    return of_call(run)


def of_call(run: Any) -> dict[str, float]:
    """What the process holds at most while it runs, all included; and how much of that the call itself took."""
    reset_peak()
    before = resident()
    run()
    most = peak()
    if before is None or most is None:
        return {}
    return {"process": most, "call": most - before}
