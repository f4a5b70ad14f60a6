"""explain and build_info."""

from pathlib import Path
from typing import Any

import pytest
import torch
from plain_models import NATIVE, needs_kernels, paper, short, timms, trained
from torch import nn

import cmx_kernels
from cmx_kernels import (
    ConvMixer,
    backends,
    build_info,
    create_model,
    explain,
    fuse,
    ops,
    tune,
    tuned,
    use,
)

pytestmark = pytest.mark.filterwarnings("ignore:cmx_kernels")
X = torch.randn(2, 3, 28, 28, generator=torch.Generator().manual_seed(2))
RELEASED = ["convmixer_1536_20", "convmixer_768_32", "convmixer_1024_20_ks9_p14"]


@needs_kernels
@pytest.mark.parametrize("name", RELEASED)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.no_grad()
def test_released_models_have_no_refusal(name: str, dtype: torch.dtype) -> None:
    model = create_model(name, dtype=dtype).eval()
    report = explain(model, torch.randn(1, 3, 224, 224, dtype=dtype))
    assert not report.refusals
    depth = len(model.blocks)
    assert [row.part for row in report][:3] == ["stem", "blocks.0", "blocks.1"]
    assert {row.backend for row in report if row.part != "head"} == {"cpu"}
    text = str(report)
    assert f"blocks.0-{depth - 1} cpu     block_stack" in text
    assert "no refusals" in text and "fuse(" not in text
    assert len(text.splitlines()) == 6


@needs_kernels
def test_a_frozen_layer_behind_a_trained_one() -> None:
    """Gradients pass through it, which decide who is faster."""
    model = fuse(nn.Sequential(nn.Conv2d(3, 32, 3, padding=1), nn.Conv2d(32, 32, 3, padding=1, groups=32)))
    model[1].requires_grad_(False)
    assert [row.backend for row in explain(model, X)] == ["torch"]
    with torch.no_grad():
        assert [row.backend for row in explain(model, X)] == ["cpu"]
    model[0].requires_grad_(False)
    assert [row.backend for row in explain(model, X)] == ["cpu"]


@needs_kernels
def test_a_frozen_block_behind_a_trained_one() -> None:
    model = ConvMixer(32, 2, 5, 7, 10).eval()
    model.blocks[1].requires_grad_(False)
    model.blocks[0][0].fn[1].register_forward_hook(lambda *a: None)  # so that parts are called one by one
    row = next(row for row in explain(model, X) if row.part == "blocks.1")
    assert row.kernel == "training"
    with torch.no_grad():
        row = next(row for row in explain(model, X) if row.part == "blocks.1")
    assert row.kernel != "training"


@needs_kernels
def test_reasons() -> None:
    model = trained(ConvMixer(32, 3, 5, 7, 10))
    with torch.no_grad():
        model.blocks[1][0].fn[1].register_forward_hook(lambda *a: None)
        report = explain(model, X)
        assert report.refusals == {"blocks.1": {"fusion": "a hook is attached to its GELU"}}
        assert [row.backend for row in report] == ["cpu", "cpu", "torch", "cpu", "torch", "torch"]
        assert report.rows[1].note == "a hook is attached to its GELU"  # and so no call for the whole network
        assert "1 of 6 parts refused" in str(report)
    with torch.enable_grad():
        report = explain(trained(ConvMixer(32, 3, 5, 7, 10)), X)
        assert not report.refusals
        assert report.rows[1].kernel == "training"
    assert explain(model.train(), X).rows[0].kernel == "training"
    assert not model.stem[2].num_batches_tracked
    assert "call cmx_kernels.fuse(model)" in str(explain(timms(8, 1, 3, 7, 2), X))


@torch.no_grad()
def test_blocks_that_cannot_be_fused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Said when the model is made, once for all of them, and by explain."""
    says = "blocks.0 and 1 more are not fused: .*SiLU"
    backends._said.clear()
    with pytest.warns(UserWarning, match=says):
        model = ConvMixer(8, 2, 3, 7, 5, act_layer=nn.SiLU)
    refusals = explain(model.eval(), X).refusals
    assert all("SiLU" in refusals[f"blocks.{i}"]["fusion"] for i in range(2))
    monkeypatch.setattr(backends, "STRICT", True)
    with pytest.raises(RuntimeError, match=f"CMX_STRICT.*{says}"):
        ConvMixer(8, 2, 3, 7, 5, act_layer=nn.SiLU)


class Features(nn.Module):
    """As timm's FeatureGetterNet: it calls no forward of the network."""

    def __init__(self, model: nn.Module, method: str) -> None:
        super().__init__()
        self.model, self.method = model, method

    def forward(self, x: torch.Tensor) -> Any:
        return getattr(self.model, self.method)(x)


@pytest.mark.parametrize("method", ["forward_features", "forward_intermediates"])
@needs_kernels
@torch.no_grad()
def test_a_network_that_is_entered_by_another_method(
    method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    model = trained(Features(ConvMixer(32, 2, 5, 7, 10), method))
    report = explain(model, X)
    assert not report.refusals
    assert [row.backend for row in report][:3] == ["cpu"] * 3
    assert len(tune(model, X))
    tuned.forget()


@needs_kernels
@torch.no_grad()
def test_blocks_beside_the_longest_run() -> None:
    """Each is a call of its own, and on our kernels."""
    first, second = list(paper(32, 3, 5, 7, 10))[:6], list(paper(32, 2, 5))[3:5]
    model = trained(fuse(nn.Sequential(*first, nn.Dropout(), *second)))
    report = explain(model, X)
    assert [row.kernel for row in report] == ["block_stack"] * 6 + ["Dropout"] + ["block_stack"] * 2
    assert {row.backend for row in report} == {"cpu", "torch"}


@torch.no_grad()
def test_what_no_kernel_takes() -> None:
    model = trained(ConvMixer(32, 2, 5, 7, 10)).double()
    report = explain(model, X.double())
    assert set(report.refusals) == {"stem", "blocks.0", "blocks.1"}
    assert any("cuda" in who for who in report.refusals["blocks.0"])
    if NATIVE:
        with use("cuda"), pytest.raises(RuntimeError, match="wants a CUDA tensor"):
            explain(model, X)
    report = explain(trained(ConvMixer(32, 2, 5, 7, 10, act_layer=nn.Identity)), X)
    assert bool(report.refusals) != NATIVE
    with pytest.raises(TypeError, match="x: got int"):
        explain(model, 3)
    with pytest.raises(ValueError, match="act: got 'swish'"):
        explain("depthwise_block", X, "swish")


@pytest.mark.parametrize("make", [paper, short, timms])
@torch.no_grad()
def test_models_inside_others_are_found_without_running_them(make: Any) -> None:
    norm = nn.BatchNorm2d(3)
    model = nn.ModuleDict({"net": nn.Sequential(norm, fuse(trained(make(32, 2, 5, 7, 10))))})
    model.forward = lambda x: model["net"](x)
    report = explain(model["net"], X)
    assert all(row.part.startswith("1.") for row in report)
    assert bool(report.refusals) != NATIVE
    assert not norm.num_batches_tracked, "explain() has run the model"
    assert {row.backend for row in report} == ({"cpu"} if NATIVE else {"reference", "torch"})


def test_operators() -> None:
    x = torch.randn(1, 8, 6, 6)
    for op in (ops.depthwise_block, "pointwise_block", ops.pool_head, "patch_embed"):
        (row,) = explain(op, x).rows
        assert row.backend == ("cpu" if NATIVE else "reference")
        assert bool(row.refusals) != NATIVE
    assert explain(ops.depthwise_block, x.double()).refusals
    for wrong in ("conv2d", torch.relu, 3):
        with pytest.raises(TypeError, match=r"ops\.depthwise_block"):
            explain(wrong, x)


def test_build_info() -> None:
    info = build_info()
    assert info["torch_now"] == torch.__version__
    assert info["version"] == cmx_kernels.__version__
    assert set(info["backends"]) == {"cuda", "triton", "cpu", "reference"}
    assert info["backends"]["reference"] is None
    assert (info["backends"]["cpu"] is None) == NATIVE
    if NATIVE:
        assert info["isa_level"] in info["isa_levels"]
        assert "float32" in info["dtypes"]
    else:
        assert info["missing"]


def test_a_tree_that_was_never_installed_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    from cmx_kernels import info

    monkeypatch.setattr(backends.registry, "C", None)
    monkeypatch.setattr(info._build_info, "read", lambda: {"missing": {"compiled kernels": "never installed"}})
    found = build_info()
    assert found["missing"] == {"compiled kernels": "never installed"}
    assert (found["torch_at_build"], found["isa_level"], found["isa_levels"]) == (None, None, [])
