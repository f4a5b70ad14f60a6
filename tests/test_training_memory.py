"""Large results of training live in memory that is kept for the next one of their size (csrc/bind_memory.h)."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

STATUS = Path("/proc/self/status")
pytestmark = pytest.mark.skipif(not STATUS.exists(), reason="memory is kept on Linux")


def forward(megabytes: int) -> Tensor:
    """A pre-activation of so many MiB; all its values are those of its bias, ``megabytes``."""
    x = torch.zeros(1, 64, 64, 64 * megabytes).contiguous(memory_format=torch.channels_last)
    bias = torch.full((64,), float(megabytes))
    a, _ = torch.ops.cmx.pointwise_block_train(x, None, None, None, torch.zeros(64, 64, 1, 1), bias, "relu")
    return a


def mapped() -> float:
    """Address space of the process in MiB"""
    line = next(line for line in STATUS.read_text().splitlines() if line.startswith("VmSize"))
    return int(line.split()[1]) / 1024


def test_memory_of_a_freed_result_is_used_again() -> None:
    first = forward(5).data_ptr()
    assert abs(forward(5).data_ptr() - first) < 2**17  # not at the same place of a page


def test_results_that_live_share_no_memory() -> None:
    held = [forward(size) for _ in range(3) for size in (2, 3)]
    del held[1::2]
    held += [forward(size) for size in (3, 4, 3)]
    assert [float(a.min()) for a in held] == [float(a.max()) for a in held] == [2, 2, 2, 3, 4, 3]


def test_memory_of_other_sizes_is_given_back() -> None:
    sizes = range(4, 20, 2)
    forward(max(sizes))
    before = mapped()
    for size in sizes:
        forward(size)
    assert mapped() - before < 2 * max(sizes)  # together they are 88 MiB
