"""The layout in which CUDA kernels run a network whose images are channels_last; the CPU's stand in for them."""

import pytest
import torch
from plain_models import needs_kernels, trained
from torch import Tensor

from cmx_kernels import ConvMixer, backends, profiling
from cmx_kernels.ops import block_stack, depth_first

pytestmark = needs_kernels
LAYOUTS = (torch.contiguous_format, torch.channels_last)


def test_layout(monkeypatch: pytest.MonkeyPatch) -> None:
    """NCHW for images in channels_last on a GPU, where the CUDA kernels take several blocks."""

    class OnGpu(Tensor):
        is_cuda = True  # type: ignore[assignment]

    first, last = LAYOUTS
    x = torch.randn(2, 3, 28, 28).to(memory_format=last).as_subclass(OnGpu)
    asked: list[str] = []
    for backend, wanted in (("cuda", first), ("triton", last), ("reference", last)):
        monkeypatch.setattr(backends, "select", lambda op, *_, backend=backend, **__: (asked.append(op), backend)[1])
        assert depth_first.layout(x, "gelu", 2) == wanted
        assert depth_first.layout(x, "gelu", 2, "depthwise_block_train") == wanted
        assert depth_first.layout(x.contiguous(), "gelu", 2) == first
        assert depth_first.layout(x, "gelu", 1) == last
    assert asked == ["depthwise_block", "depthwise_block_train"] * 3
    assert depth_first.layout(x.as_subclass(Tensor), "gelu", 2) == last
    assert depth_first.laid_out(x, first).is_contiguous() and depth_first.laid_out(x, last) is x
    sliced = torch.randn(4, 3, 8, 8)[::2]
    assert depth_first.laid_out(sliced, first) is sliced


def test_results_have_the_layout_of_the_images(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where all between are planes."""
    seen: list[bool] = []
    real = profiling.call
    monkeypatch.setattr(block_stack, "why_not", lambda *_: "not here")  # as on a GPU
    monkeypatch.setattr(depth_first, "layout", lambda *_: LAYOUTS[0])
    monkeypatch.setattr(profiling, "call", lambda *call: (seen.append(call[3].is_contiguous()), real(*call))[1])
    net, x = trained(ConvMixer(16, 2, 3, 7, 10)), torch.randn(2, 3, 28, 28).contiguous(memory_format=LAYOUTS[1])
    net.micro_batch = 2
    for grad in (False, True):
        with torch.set_grad_enabled(grad):
            y = net.train(grad).forward_features(x)
        assert y.is_contiguous(memory_format=LAYOUTS[1]) and y.requires_grad == grad
        assert seen and all(seen)
        seen.clear()
