"""Large results live in memory that is kept for the next one of their size (csrc/bind_memory.h)."""

import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from cmx_kernels import registry
from cmx_kernels.ops import differentiable
from cmx_kernels.ops.differentiable import Pooled

STATUS = Path("/proc/self/status")
pytestmark = pytest.mark.skipif(not STATUS.exists(), reason="memory is kept on Linux")


def result(megabytes: int, trains: bool = False) -> Tensor:
    """Activations, or pre-activations, of so many MiB; all values are those of the bias, ``megabytes``."""
    x = torch.zeros(1, 1, 64, 64 * megabytes).contiguous(memory_format=torch.channels_last)
    weight, bias = torch.zeros(64, 1, 1, 1), torch.full((64,), float(megabytes))
    if trains:
        return torch.ops.cmx.pointwise_block_train(x, None, None, None, weight, bias, "relu")[0]
    return torch.ops.cmx.pointwise_block(x, weight, bias, None, None, "relu")


@pytest.fixture(params=[False, True], ids=["inference", "training"])
def forward(request: pytest.FixtureRequest) -> Callable[[int], Tensor]:
    return partial(result, trains=request.param)


def resident() -> float:
    """Memory of the process in MiB"""
    line = next(line for line in STATUS.read_text().splitlines() if line.startswith("VmRSS"))
    return int(line.split()[1]) / 1024


def test_memory_of_a_freed_result_is_used_again(forward: Callable[[int], Tensor]) -> None:
    first = forward(5).data_ptr()
    assert abs(forward(5).data_ptr() - first) < 2**17  # not at the same place of a page


def test_results_that_live_share_no_memory(forward: Callable[[int], Tensor]) -> None:
    held = [forward(size) for _ in range(3) for size in (2, 3)]
    del held[1::2]
    held += [forward(size) for size in (3, 4, 3)]
    assert [float(a.min()) for a in held] == [float(a.max()) for a in held] == [2, 2, 2, 3, 4, 3]


def test_free_memory_is_released_when_asked_for(forward: Callable[[int], Tensor]) -> None:
    forward(40)
    before = resident()
    registry.C.release_memory()
    assert before - resident() > 30
    assert float(forward(40).max()) == 40


def test_pooling_never_holds_all_of_an_activation_in_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    a, rows = torch.randn(7, 3, 8, 8).bfloat16(), torch.rand(3, 3)
    sizes: list[int] = []

    class Sizes(TorchDispatchMode):
        def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            out = op(*args, **(kwargs or {}))
            sizes.extend([out.numel()] if isinstance(out, Tensor) and out.dtype == torch.float32 else [])
            return out

    whole = Pooled.apply(a, rows, torch.zeros(2, 3), "gelu")
    monkeypatch.setattr(differentiable, "_PIECE", 2 * a[0].numel())
    with Sizes():
        assert torch.equal(Pooled.apply(a, rows, torch.zeros(2, 3), "gelu"), whole)
    assert max(sizes) == 2 * a[0].numel()


def growth() -> float:
    """Memory in MiB that results of all sizes take beyond the largest"""
    sizes = range(20, 100, 10)
    result(max(sizes))
    before = resident()
    for size in sizes:
        result(size)
    return resident() - before


def test_memory_of_other_sizes_is_given_back() -> None:
    fresh = [sys.executable, __file__]  # a process where nothing larger was in use
    found = subprocess.run(fresh, capture_output=True, text=True, check=True).stdout
    assert float(found) < 100  # if all sizes were kept, more than 300


if __name__ == "__main__":
    print(growth())
