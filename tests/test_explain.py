"""explain, build_info, and the large depthwise layer."""

import copy
import types
from typing import Any

import pytest
import torch
from plain_models import NATIVE, check_against, needs_kernels, paper, short, timms, trained
from torch import nn
from torch.testing._internal.two_tensor import TwoTensor

import cmx_kernels
from cmx_kernels import (
    ConvMixer,
    LargeKernelDepthwiseConv2d,
    backends,
    build_info,
    create_model,
    explain,
    fuse,
    ops,
    profiling,
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


def conv_pair(kernel: Any, **kw: Any) -> tuple[nn.Module, nn.Conv2d]:
    ours = LargeKernelDepthwiseConv2d(12, kernel, **kw)
    plain = nn.Conv2d(12, 12, kernel, groups=12, **{"padding": "same", **kw})
    plain.load_state_dict(ours.state_dict())
    return ours, plain


@pytest.mark.parametrize("kernel", [1, 3, 8, 13, 31, (3, 31), (30, 5)])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_large_depthwise_layer(kernel: Any, bias: bool, dtype: torch.dtype) -> None:
    ours, plain = (m.to(dtype) for m in conv_pair(kernel, bias=bias))
    assert isinstance(ours, nn.Conv2d) and list(ours.state_dict()) == list(plain.state_dict())
    x = torch.randn(2, 12, 17, 21).to(dtype)
    with torch.no_grad():
        check_against(ours(x), plain, x)
    if dtype == torch.float32:
        for m in (ours, plain):
            m(x).square().sum().backward()
        for (name, a), b in zip(ours.named_parameters(), plain.parameters(), strict=True):
            torch.testing.assert_close(a.grad, b.grad, rtol=1e-4, atol=1e-3, msg=name)


@pytest.mark.skipif(not NATIVE, reason="nothing is packed without compiled kernels")
@torch.no_grad()
def test_the_layer_follows_its_parameters() -> None:
    """Every way of changing them is seen by a layer that has packed them, and the operator gives the same bits."""
    ours, _ = conv_pair(7)
    other, x = conv_pair(7)[0], torch.randn(2, 12, 9, 8)
    changes = (
        lambda: None,
        lambda: ours.weight.mul_(2),
        lambda: ours.bias.add_(1),
        lambda: ours.load_state_dict(other.state_dict()),
        lambda: setattr(ours, "weight", nn.Parameter(ours.weight.flip(0))),
        lambda: setattr(ours, "bias", None),
        lambda: ours.weight.data.mul_(3),
        lambda: setattr(ours.weight, "data", ours.weight.transpose(2, 3)),
        lambda: ours.bfloat16(),
    )
    for change in changes:
        change()
        given = x.to(ours.weight.dtype)
        assert torch.equal(ours(given), ops.depthwise_block(given, ours.weight, ours.bias, act="none", residual=False))
    ours.float()
    for _ in range(2):
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(ours(x), ops.depthwise_block(x, ours.weight, act="none", residual=False))
        assert torch.equal(ours(x), ops.depthwise_block(x, ours.weight, act="none", residual=False))
    with pytest.raises(ValueError, match=r"x has 11 channels"):
        ours(x[:, 1:])


@pytest.mark.skipif(not NATIVE, reason="only beside compiled kernels PyTorch's own can be the faster one")
@pytest.mark.parametrize(("dtype", "k"), [(torch.float32, 5), (torch.bfloat16, 3), (torch.bfloat16, 5)])
@torch.no_grad()
def test_pytorch_runs_what_it_is_faster_at(dtype: torch.dtype, k: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Few taps on a large channels_last tensor with nothing behind them; all else stays on the kernels."""
    monkeypatch.setattr(backends, "_PLAIN_ELEMENTS", 2000)
    monkeypatch.setattr(backends, "_LARGER", 2000 if k == 5 else 1 << 21)
    monkeypatch.setattr(backends, "STRICT", True)
    ran: list[str] = []
    monkeypatch.setattr(profiling, "call", lambda f, op, backend, *args: ran.append(backend) or f(*args))
    ours, plain = (m.to(dtype) for m in conv_pair(k))
    x = torch.randn(2, 12, 9, 11).to(dtype).to(memory_format=torch.channels_last)

    def op(x: torch.Tensor, **behind: Any) -> torch.Tensor:
        return ops.depthwise_block(x, ours.weight, ours.bias, **{"act": "none", "residual": False, **behind})

    for run in (ours, op):
        assert torch.equal(run(x), plain(x)) and run(x).stride() == x.stride()
    assert not ran
    kernels = [run(given) for run in (ours, op) for given in (x.contiguous(), x[:1])]
    behind = ({"residual": True}, {"act": "relu"}, {"scale": torch.ones(12)}, {"shift": torch.zeros(12)})
    kernels += [op(x, **what) for what in behind]
    ours.half()
    kernels += [run(x.half()) for run in (ours, op)]  # which PyTorch is slow at
    ours.to(dtype)
    with use("cpu"):
        kernels += [ours(x), op(x)]
        assert not explain(ours, x).refusals
    assert ran == ["cpu"] * len(kernels)
    row = explain(ours, x).rows[0]
    assert row.backend == "torch" and f"{k * k} taps or fewer" in row.refusals["cpu"]


@torch.no_grad()
def test_several_images_of_many_values(monkeypatch: pytest.MonkeyPatch) -> None:
    """25 taps of 128 channels and more in float32: PyTorch's own wins for several images, not for one, or always."""
    monkeypatch.setattr(backends, "_INTEL", False)
    monkeypatch.setattr(backends, "_PLAIN_ELEMENTS", 2000)
    monkeypatch.setattr(backends, "_LARGE", 30000)
    x = torch.randn(3, 128, 9, 11).to(memory_format=torch.channels_last)
    for k, images, faster in ((5, 3, True), (5, 2, False), (3, 2, True), (7, 3, False)):
        assert backends.plain_is_faster(x[:images], torch.empty(128, 1, k, k)) == faster
    one = torch.randn(1, 128, 27, 11).to(memory_format=torch.channels_last)
    assert not backends.plain_is_faster(one, torch.empty(128, 1, 5, 5))
    monkeypatch.setattr(backends, "_INTEL", True)
    for k, dtype, faster in ((5, torch.float32, True), (7, torch.float32, False), (5, torch.bfloat16, False)):
        assert backends.plain_is_faster(one.to(dtype), torch.empty(128, 1, k, k)) == faster


@pytest.mark.parametrize(
    "kw", [{"dilation": 2}, {"stride": 2, "padding": 2}, {"padding": 0}, {"padding_mode": "reflect"}, {"kernel": 33}]
)
@torch.no_grad()
def test_what_the_layer_leaves_to_pytorch(kw: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    ours, plain = conv_pair(kw.pop("kernel", 5), **kw)
    x = torch.randn(2, 12, 40, 36)
    backends._said.clear()
    with pytest.warns(UserWarning, match="LargeKernelDepthwiseConv2d runs in plain PyTorch"):
        assert torch.equal(ours(x), plain(x))
    assert explain(ours, x).refusals
    monkeypatch.setattr(backends, "STRICT", True)
    with pytest.raises(RuntimeError, match="CMX_STRICT"):
        ours(x)


class AtenOnly(TwoTensor):
    """As quantised weights are: a subclass that knows PyTorch's operators and no others."""

    @classmethod
    def __torch_dispatch__(cls, func: Any, *args: Any) -> Any:
        assert func.namespace != "cmx"
        return super().__torch_dispatch__(func, *args)


@torch.no_grad()
def test_the_layer_in_other_hands() -> None:
    ours, plain = conv_pair(7)
    x = torch.randn(2, 12, 9, 9)
    torch.testing.assert_close(ours(x[0]), plain(x[0]))
    for layer in (ours, plain):
        layer._conv_forward = types.MethodType(
            lambda self, x, w, b: nn.functional.conv2d(x, 2 * w, b, groups=12), layer
        )
    torch.testing.assert_close(ours(x), plain(x))
    for layer in (ours, plain):
        del layer._conv_forward
    smaller = copy.deepcopy((ours, plain))
    for layer in smaller:
        layer.weight = nn.Parameter(layer.weight[..., 1:-1])
    torch.testing.assert_close(smaller[0](x), smaller[1](x))
    for other in (torch.jit.script(ours), torch.jit.trace(ours, x), torch.fx.symbolic_trace(nn.Sequential(ours))):
        torch.testing.assert_close(other(x), plain(x))
    compiled = torch.compile(ours, fullgraph=True, backend="eager")
    check_against(compiled(x), plain, x)
    check_against(copy.deepcopy(ours)(x), plain, x)
    tangents = [torch.func.jvp(layer, (x,), (x,))[1] for layer in (ours, plain)]
    torch.testing.assert_close(*tangents)
    torch.testing.assert_close(ours(AtenOnly(x, x.clone())).a, plain(x))
    weight = ours.weight
    ours._parameters["weight"] = nn.Parameter(AtenOnly(weight.detach(), weight.detach().clone()))
    torch.testing.assert_close(ours(x).a, plain(x))
    ours.weight = weight
    nn.utils.parametrizations.weight_norm(ours).parametrizations.weight.original0.mul_(2)
    torch.testing.assert_close(ours(x) - ours.bias[:, None, None], 2 * (plain(x) - plain.bias[:, None, None]))
    if NATIVE:
        assert not explain(nn.Sequential(nn.ReLU(), ours), x).refusals
