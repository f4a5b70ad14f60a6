"""What is tried on a GPU before its kernels are chosen unasked: here on the CPU's operators, and on wrong ones."""

from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses import FakeTensorMode

from cmx_kernels import cuda, registry, self_check

CPU = torch.device("cpu")
OPERATORS = tuple(dict.fromkeys(problem.op for problem in self_check.problems(CPU)))
pytestmark = pytest.mark.skipif(registry.C is None, reason=str(registry.WHY_NO_C))


def test_every_operator_is_tried() -> None:
    assert set(cuda.OPS) <= set(OPERATORS)


def test_right_kernels_pass_under_whatever_mode_is_on() -> None:
    assert self_check.of_device(CPU, torch.ops.cmx) is None
    with FakeTensorMode(), torch.inference_mode(), torch.autocast("cpu"):
        assert self_check.of_device(CPU, torch.ops.cmx) is None


@pytest.mark.parametrize("op", OPERATORS)
def test_wrong_kernels_are_named(op: str) -> None:
    def off(*args: Any) -> Any:
        found = getattr(torch.ops.cmx, op)(*args)
        first = found if isinstance(found, Tensor) else found[0]
        first.view(-1)[-1:] += first.abs().max() if first.is_contiguous() else 0
        return found

    operators = SimpleNamespace(**{**{name: getattr(torch.ops.cmx, name) for name in OPERATORS}, op: off})
    assert f"({op}: result 0 is off by" in str(self_check.of_device(CPU, operators))


def test_kernels_that_fail_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*args: Any) -> Any:
        raise RuntimeError("CUDA says: no\nmore")

    operators = SimpleNamespace(depthwise_block=fails)
    assert "(depthwise_block: CUDA says: no)" in str(self_check.of_device(CPU, operators))


def test_asked_once_and_not_in_a_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[torch.device] = []
    monkeypatch.setattr(self_check, "of_device", lambda device, operators: asked.append(device))
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(torch.cuda, "device", lambda index: nullcontext())
    monkeypatch.setattr(self_check, "_known", {})
    assert "being captured" in str(cuda.why_not_unasked(1))
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    assert cuda.why_not_unasked(1) is None
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert cuda.why_not_unasked(1) is None
    assert "being captured" in str(cuda.why_not_unasked(0)), "another device is known, this one is not"
    assert asked == [torch.device("cuda", 1)]
    monkeypatch.setattr(self_check, "WANTED", False)
    assert self_check.why_not(2) is None and len(asked) == 1


def test_no_memory_is_no_verdict(monkeypatch: pytest.MonkeyPatch) -> None:
    memory = [False, True]

    def head(*args: Any) -> Any:
        if not memory.pop(0):
            raise torch.OutOfMemoryError
        raise RuntimeError("wrong")

    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(torch.cuda, "device", lambda index: nullcontext())
    monkeypatch.setattr(self_check, "_known", {})
    monkeypatch.setattr(self_check, "wrong", head)
    monkeypatch.setattr(self_check, "problems", lambda device: [self_check.Problem("pool_head", head, ())])
    assert "not enough memory" in str(self_check.why_not(0))
    assert "(pool_head: wrong)" in str(self_check.why_not(0))
