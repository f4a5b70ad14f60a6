"""The layout in which CUDA kernels run a network whose images are channels_last; the CPU's stand in for them."""

from typing import Any

import pytest
import torch
from plain_models import needs_kernels, trained
from torch import Tensor

from cmx_kernels import ConvMixer, backends, profiling
from cmx_kernels.models import training
from cmx_kernels.ops import block_stack, depth_first

pytestmark = needs_kernels
LAYOUTS = (torch.contiguous_format, torch.channels_last)


def test_in_planes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Images in channels_last on a GPU, where the CUDA kernels take them."""

    class OnGpu(Tensor):
        is_cuda = True  # type: ignore[assignment]

    x = torch.randn(2, 3, 28, 28).to(memory_format=LAYOUTS[1]).as_subclass(OnGpu)
    asked: list[str] = []
    for backend, wanted in (("cuda", LAYOUTS[0]), ("triton", LAYOUTS[1]), ("reference", LAYOUTS[1])):
        monkeypatch.setattr(backends, "select", lambda op, *_, backend=backend, **__: (asked.append(op), backend)[1])
        assert depth_first.in_planes(x, "gelu").is_contiguous(memory_format=wanted)
        assert depth_first.in_planes(x, "gelu", "depthwise_block_train").is_contiguous(memory_format=wanted)
        assert depth_first.in_planes(x.contiguous(), "gelu").is_contiguous()
    assert asked == ["depthwise_block", "depthwise_block_train"] * 3
    here = x.as_subclass(Tensor)
    assert depth_first.in_planes(here, "gelu") is here


def test_results_have_the_layout_of_the_images(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where all between are planes."""

    def planes(x: Tensor, *_: Any) -> Tensor:
        return x.contiguous()

    seen: list[bool] = []
    real = profiling.call
    monkeypatch.setattr(block_stack, "why_not", lambda *_: "not here")  # as on a GPU
    monkeypatch.setattr(depth_first, "in_planes", planes)
    monkeypatch.setattr(training, "in_planes", planes)
    monkeypatch.setattr(profiling, "call", lambda *call: (seen.append(call[3].is_contiguous()), real(*call))[1])
    net, x = trained(ConvMixer(16, 2, 3, 7, 10)), torch.randn(2, 3, 28, 28).contiguous(memory_format=LAYOUTS[1])
    net.micro_batch = 2
    for grad in (False, True):
        with torch.set_grad_enabled(grad):
            y = net.train(grad).forward_features(x)
        assert y.is_contiguous(memory_format=LAYOUTS[1]) and y.requires_grad == grad
        assert seen and all(seen)
        seen.clear()
