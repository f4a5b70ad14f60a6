"""What every record holds, whatever was timed: networks, training steps, parts of a network, single operators."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from benchmarks.machine import about


@dataclass(frozen=True)
class Work:
    """Of one call. Depthwise convolutions run at the peak of float32, products at that of the dtype."""

    images: int
    depthwise_flop: float
    matrix_flop: float
    bytes: float | None = None  # each operator's input, output and weight once; None: not counted

    @property
    def flop(self) -> float:
        return self.depthwise_flop + self.matrix_flop

    def limit(self, dtype: str, peaks: Mapping[str, float]) -> float | None:
        """Seconds, by the machine's arithmetic (FLOP/s by dtype) and, if ``peaks`` has it, its "copy" (bytes/s)."""
        if not {"fp32", dtype} <= peaks.keys():
            return None
        moving = self.bytes / peaks["copy"] if self.bytes and "copy" in peaks else 0.0
        return max(self.depthwise_flop / peaks["fp32"] + self.matrix_flop / peaks[dtype], moving)


def record(
    provider: str,
    dtype: str,
    layout: str,
    backends: Mapping[str, str],
    error: float,
    allowed: float,
    memory: Mapping[str, float],
    work: Work,
    seconds: float | None,
    peaks: Mapping[str, float],
) -> dict[str, Any]:
    """The fields that all records have.

    Args:
        backends: operator -> who ran it.
        error, allowed: by the rule of reference.py; nan if nothing was checked. What is not finite is stored as None.
        memory: MiB, see memory.py.
        seconds: of a call; None if it was not timed, and there are no rates then.
        peaks: FLOP/s by dtype, and perhaps bytes/s as "copy".
    """
    found = {"provider": provider, "dtype": dtype, "layout": layout, "backends": dict(backends)}
    found |= {"versions": about()["versions"], "commit": about()["commit"]}
    found |= {"match": None if math.isnan(error) else error <= allowed}
    found |= {"error": _finite(error), "allowed": _finite(allowed)}
    if seconds is None:
        return found
    limit = work.limit(dtype, peaks)
    found |= {
        "images_per_s": work.images / seconds,
        "gflops": work.flop / seconds / 1e9,
        "gb_per_s": None if work.bytes is None else work.bytes / seconds / 1e9,
        "memory": dict(memory),
    }
    if limit is not None:
        found |= {"limit_images_per_s": work.images / limit, "percent_of_limit": 100 * limit / seconds}
    return found


def backends_of(model_or_op: nn.Module | str, x: Tensor) -> dict[str, str]:
    """operator -> backend, as ``cmx_kernels.explain`` names them; "torch" is plain PyTorch."""
    from cmx_kernels import explain

    found: dict[str, set[str]] = {}
    for row in explain(model_or_op, x):
        found.setdefault(row.kernel, set()).add(row.backend)
    return {kernel: " + ".join(sorted(backends)) for kernel, backends in found.items()}


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
