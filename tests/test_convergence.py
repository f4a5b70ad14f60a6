"""Fused and plain from one seed: the same curve. The long version, on CIFAR-10: examples/train_cifar10.py --compare."""

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from training_twins import nodes

from cmx_kernels import ConvMixer

CLASSES, BATCH, STEPS = 10, 64, 30
AMP = {"bf16": torch.bfloat16}
LAYOUTS = (torch.contiguous_format, torch.channels_last)  # which sum in another order


def gratings(count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Images [count, 3, 32, 32] of waves in noise; the class is their direction and length, the phase is random."""
    draw = torch.Generator().manual_seed(seed)
    label = torch.arange(count) % CLASSES
    at = torch.linspace(0, 2 * torch.pi, 32)
    angle, cycles = label * torch.pi / CLASSES, 2 + label % 3
    along = at[:, None] * angle.cos()[:, None, None] + at * angle.sin()[:, None, None]
    waves = torch.sin(cycles[:, None, None] * along + 2 * torch.pi * torch.rand(count, 1, 1, generator=draw))
    return waves[:, None] + 1.5 * torch.randn(count, 3, 32, 32, generator=draw), label


def losses(
    fused: bool,
    dtype: torch.dtype = torch.float32,
    amp: str | None = None,
    layout: torch.memory_format = torch.contiguous_format,
) -> Tensor:
    """Of every step of AdamW, [STEPS] float64."""
    images, labels = gratings(20 * BATCH, 1)
    torch.manual_seed(0)
    model = ConvMixer(16, 3, 5, 4, CLASSES, fused=fused).to(dtype=dtype, memory_format=layout).train()
    optimizer = torch.optim.AdamW(model.parameters(), 0.01, weight_decay=0.005)
    found = []
    for step in range(STEPS):
        rows = torch.arange(step * BATCH, (step + 1) * BATCH) % len(labels)
        with torch.autocast("cpu", AMP.get(amp or "", torch.bfloat16), enabled=amp is not None):
            logits = model(images[rows].to(dtype))
        if not step:
            assert any("BlockBackward" in name for name in nodes(logits)) == fused
        loss = cross_entropy(logits.to(torch.promote_types(logits.dtype, torch.float32)), labels[rows])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        found.append(float(loss.detach()))
    return torch.tensor(found, dtype=torch.float64)


@pytest.mark.filterwarnings("ignore:cmx_kernels")
def test_the_same_curve() -> None:
    """At every step off from float64 by no more than twice the most that plain training in that precision is off."""
    torch.set_num_threads(1)
    exact = losses(False, torch.float64)
    assert exact[-5:].mean() < 0.3 * exact[0], "it learns"
    for amp in (None, "bf16"):
        plain = torch.stack([(losses(False, amp=amp, layout=layout) - exact).abs() for layout in LAYOUTS])
        fused = (losses(True, amp=amp) - exact).abs()
        allowed = 2 * plain.max() + 8 * torch.finfo(torch.float32).eps * exact.max()
        assert (fused <= allowed).all(), f"{amp or 'fp32'}: off by {fused.max():.2e}, allowed {allowed:.2e}"
