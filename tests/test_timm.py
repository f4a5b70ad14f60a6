"""timm's models and tools: every ConvMixer, features, reparameterisation; depthwise convolutions of other networks."""

import copy
import io
from typing import Any

import pytest
import torch
from plain_models import NATIVE, check_against, counted, needs_kernels, trained
from torch import Tensor, nn

from cmx_kernels import LargeKernelDepthwiseConv2d, explain, fuse, unfuse
from cmx_kernels.layers import SwappedDepthwiseConv2d
from cmx_kernels.models.fused import Block, Stem

timm = pytest.importorskip("timm", reason="these tests are about timm: pip install timm")
pytestmark = pytest.mark.filterwarnings("ignore:cmx_kernels", "ignore::DeprecationWarning")
X = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(2))
NAMES = timm.list_models("*convmixer*")


def small(name: str, **kw: Any) -> nn.Module:
    """timm's model of that name with its kernel, patch and activation, 32 wide and 3 deep."""
    full = timm.create_model(name, device="meta")
    conv, act, _ = full.stem
    kernel = full.blocks[0][0].fn[0].kernel_size
    return trained(type(full)(32, 3, kernel, conv.kernel_size[0], act_layer=type(act), num_classes=10, **kw))


def stirred(model: nn.Module) -> nn.Module:
    """As if trained: no scale of a layer is so small that its convolution could be anything."""
    draw = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.uniform_(0.25, 1, generator=draw)
    return trained(model)


@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_every_convmixer(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """All of the full model fuses; a small one of its kind gives its logits, in one call."""
    full = fuse(timm.create_model(name, device="meta"), strict=True)
    assert type(full.stem) is Stem and {type(block) for block in full.blocks} == {Block}
    plain = small(name)
    fused = fuse(copy.deepcopy(plain), strict=True)
    with counted(monkeypatch) as calls:
        check_against(fused(X), plain, X)
    assert len(calls) == NATIVE
    features, taken = fused.forward_intermediates(X, indices=[0, 2])
    for mine, theirs in zip(
        (features, *taken), (plain.forward_features(X), *plain.forward_intermediates(X, [0, 2])[1]), strict=True
    ):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_features_only(name: str) -> None:
    getter = timm.create_model(name, features_only=True, out_indices=(0, 2), device="meta")
    assert {type(block) for block in fuse(getter, strict=True).model.blocks} == {Block}
    plain = type(getter)(small(name), out_indices=(0, 2))
    fused = fuse(copy.deepcopy(plain), strict=True)
    for mine, theirs in zip(fused(X), plain(X), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_reparameterize_model() -> None:
    """timm's preparation for inference leaves a fused ConvMixer as it is, before fuse and after."""
    plain = small(NAMES[0])
    for model in (
        timm.utils.reparameterize_model(fuse(copy.deepcopy(plain))),
        fuse(timm.utils.reparameterize_model(plain)),
    ):
        assert type(model.blocks[0]) is Block
        check_against(model(X), plain, X)


class RepLK(nn.Module):
    """As RepLKNet writes a stage: a large and a small depthwise kernel side by side, then a strided transition."""

    def __init__(self, dim: int = 12) -> None:
        super().__init__()
        self.lkb_origin = self._unit(dim, 31)
        self.small_conv = self._unit(dim, 5)
        self.transition = nn.Sequential(
            nn.Conv2d(dim, 2 * dim, 1), nn.Conv2d(2 * dim, 2 * dim, 3, 2, 1, groups=2 * dim), nn.Flatten(2)
        )

    def _unit(self, dim: int, k: int) -> nn.Sequential:
        return nn.Sequential(nn.Conv2d(dim, dim, k, 1, k // 2, groups=dim, bias=False), nn.BatchNorm2d(dim))

    def forward(self, x: Tensor) -> Tensor:
        return self.transition(self.lkb_origin(x) + self.small_conv(x)).mean(2)


def convnext() -> nn.Module:
    return timm.create_model("convnext_atto", depths=(1, 1, 1, 1), num_classes=10)


OTHERS = {
    "convnext": (convnext, X, {}),
    "replknet": (RepLK, torch.randn(2, 12, 33, 35), {"transition.1": "stride (2, 2)"}),
}


@pytest.mark.parametrize("name", OTHERS)
def test_depthwise_convolutions_of_other_networks(name: str) -> None:
    """The class changes and nothing else; explain tells what became of each; unfuse gives back what it was."""
    make, x, kept = OTHERS[name]
    plain = stirred(make())
    fused = fuse(copy.deepcopy(plain), strict=True)
    swapped = [n for n, m in fused.named_modules() if type(m) is SwappedDepthwiseConv2d]
    assert len(swapped) == {"convnext": 4, "replknet": 2}[name]
    assert list(fused.state_dict()) == list(plain.state_dict())
    with torch.no_grad():
        check_against(fused(x), plain, x)
        report = explain(fused, x)
    assert {row.part for row in report} == {*swapped, *kept}
    for part, reason in kept.items():
        assert reason in report.refusals[part]["fusion"]
    assert bool(set(report.refusals) - set(kept)) != NATIVE
    for model in (fused, plain):
        model(x).square().sum().backward()
    for (key, a), b in zip(fused.named_parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-3, atol=1e-3 * float(b.grad.abs().max()), msg=key)
    before = [(n, type(m), set(m.__dict__)) for n, m in plain.named_modules()]
    assert [(n, type(m), set(m.__dict__)) for n, m in unfuse(fused).named_modules()] == before
    assert "call cmx_kernels.fuse(model)" in str(explain(plain, x))


@torch.no_grad()
def test_swapped_layers_in_other_hands() -> None:
    model = fuse(stirred(RepLK()))
    x = torch.randn(1, 12, 9, 9)
    out = model(x)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    for other in (copy.deepcopy(model), torch.load(file, weights_only=False), fuse(model), fuse(unfuse(model))):
        assert type(other.lkb_origin[0]) is SwappedDepthwiseConv2d
        torch.testing.assert_close(other(x), out)
    for other in (
        torch.jit.script(model),
        torch.jit.trace(model, x),
        torch.compile(model, fullgraph=True, backend="eager"),
    ):
        torch.testing.assert_close(other(x), out, rtol=1e-4, atol=1e-4)
    assert "LargeKernelDepthwiseConv2d(12, 12" in repr(model)


def test_what_is_not_swapped() -> None:
    own = LargeKernelDepthwiseConv2d(4, 5)
    derived = type("Conv", (nn.Conv2d,), {})(4, 4, 3, padding=1, groups=4)
    model = nn.Sequential(
        own, derived, nn.Conv2d(4, 8, 3, padding=1, groups=4), nn.Conv2d(8, 8, 3, padding=2, groups=8)
    )
    with pytest.raises(ValueError, match=r"found neither a ConvMixer block.* nor a depthwise nn\.Conv2d"):
        fuse(model[1:], strict=True)
    reasons = explain(fuse(model), torch.randn(1, 4, 9, 9)).refusals
    assert "it is a Conv, not nn.Conv2d" in reasons["1"]["fusion"]
    assert "4 channels become 8" in reasons["2"]["fusion"]
    assert "padding (2, 2)" in reasons["3"]["fusion"]
    assert type(unfuse(model)[0]) is LargeKernelDepthwiseConv2d, "it was one before fuse"


@needs_kernels
@torch.no_grad()
def test_reparameterised_large_kernels_are_swapped() -> None:
    """FastViT's large and small kernels become one convolution; that one runs on our kernel."""
    plain = stirred(timm.create_model("fastvit_t8", num_classes=10))
    one = timm.utils.reparameterize_model(plain)
    fused = fuse(timm.utils.reparameterize_model(fuse(copy.deepcopy(plain))))
    check_against(fused(X), one, X)
    swapped = [m.kernel_size for m in fused.modules() if type(m) is SwappedDepthwiseConv2d]
    assert (7, 7) in swapped and "depthwise_block" in str(explain(fused, X))
