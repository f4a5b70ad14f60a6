"""The large depthwise layer, and what it leaves to PyTorch."""

import copy
import types
from typing import Any

import numpy as np
import pytest
import torch
from called import Called
from conftest import LEVELS
from plain_models import NATIVE, check_against, needs_kernels
from torch import nn
from torch.testing._internal.two_tensor import TwoTensor

from cmx_kernels import LargeKernelDepthwiseConv2d, backends, explain, ops, plain_layers, profiling, registry, use

pytestmark = pytest.mark.filterwarnings("ignore:cmx_kernels")


@pytest.fixture
def pairs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Thresholds of a processor with AVX512-BF16 that multiplies by it."""
    monkeypatch.setattr(plain_layers, "_PLAIN_DTYPES", (torch.float32, torch.bfloat16))
    monkeypatch.setattr(registry, "isa_level", lambda: "avx512bf16")


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


@pytest.mark.usefixtures("pairs")
@pytest.mark.skipif(not NATIVE, reason="only beside compiled kernels PyTorch's own can be the faster one")
@pytest.mark.parametrize(("dtype", "k"), [(torch.float32, 3), (torch.bfloat16, 3), (torch.bfloat16, 5)])
@torch.no_grad()
def test_pytorch_runs_what_it_is_faster_at(dtype: torch.dtype, k: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Few taps on a large channels_last tensor with nothing behind them; all else stays on the kernels."""
    monkeypatch.setattr(plain_layers, "_PLAIN_ELEMENTS", 2000)
    monkeypatch.setattr(plain_layers, "_LARGER", 2000 if k == 5 else 1 << 21)
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
    ours(x)  # which it remembers, and asks nevertheless
    with torch.autocast("cpu", torch.bfloat16):
        kernels.append(ours(x))
    scripted = torch.jit.script(ours)  # which goes through all that a module keeps
    assert torch.equal(scripted(x), ours(x))
    assert not [kept for kept in vars(copy.deepcopy(ours)).values() if getattr(kept, "plain_for", None)]
    with use("cpu"):
        kernels += [ours(x), op(x)]
        assert not explain(ours, x).refusals
    assert ran == ["cpu"] * len(kernels)
    row = explain(ours, x).rows[0]
    assert row.backend == "torch" and f"{k * k} taps or fewer" in row.refusals["cpu"]


@needs_kernels
@pytest.mark.parametrize(
    ("k", "images", "pixels", "kernels"), [(3, 2, 50, True), (3, 1, 50, False), (3, 2, 640, False), (5, 1, 640, True)]
)
def test_pytorch_trains_what_it_is_faster_at(
    k: int, images: int, pixels: int, kernels: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """9 taps on small planes, or on few values; the kernels take all else, forward and backward."""
    ours, plain = conv_pair(k)
    x = torch.randn(images, 12, 9, 11, requires_grad=True)

    def op(x: torch.Tensor) -> torch.Tensor:
        return ops.depthwise_block(x, ours.weight, ours.bias, act="none", residual=False)

    monkeypatch.setattr(plain_layers, "_TRAINED_PIXELS", pixels)
    monkeypatch.setattr(plain_layers, "_TRAINED_ELEMENTS", 2000)
    for run in (ours, op):
        y = run(x)
        with Called() as called:
            found = torch.autograd.grad(y.sum(), (x, ours.weight))
        assert ("cmx.depthwise_block_backward.default" in called.names) == kernels
        torch.testing.assert_close(found, torch.autograd.grad(plain(x).sum(), (x, plain.weight)))
    assert bool(explain(ours, x).refusals) != kernels
    for layer in (ours, conv_pair(k, bias=False)[0]):
        with torch.autocast("cpu", torch.bfloat16):
            assert bool(explain(layer, x).refusals) != kernels
            y = layer(x)
        with Called() as called:
            y.sum().backward()
        assert ("cmx.depthwise_block_backward.default" in called.names) == kernels
    with use("cpu"):
        assert not explain(ours, x).refusals
    with torch.no_grad():
        assert not explain(ours, x).refusals


@pytest.mark.usefixtures("pairs")
def test_channels_last_of_bfloat16_has_few_values_longer(monkeypatch: pytest.MonkeyPatch) -> None:
    x, weight = torch.randn(2, 12, 30, 30), torch.empty(12, 1, 3, 3)
    last = x.to(memory_format=torch.channels_last)
    for elements, faster in ((x.numel(), [False, False, False, True]), (x.numel() // 2, [False] * 4)):
        monkeypatch.setattr(plain_layers, "_TRAINED_ELEMENTS", elements)
        given = (x, last, x.bfloat16(), last.bfloat16())
        assert [plain_layers.is_faster(each, weight, trains=True) for each in given] == faster


@torch.no_grad()
def test_bfloat16_without_its_instructions(monkeypatch: pytest.MonkeyPatch) -> None:
    """PyTorch's takes 66 times as long as ours without AVX-512, twice with it (9 taps, [8, 256, 32, 32])."""
    assert ("avx512bf16" in LEVELS) == (torch.bfloat16 in plain_layers._PLAIN_DTYPES)
    monkeypatch.setattr(plain_layers, "_PLAIN_DTYPES", (torch.float32,))
    x = torch.empty(2, 512, 16, 17).to(memory_format=torch.channels_last)
    for dtype, faster in ((torch.float32, True), (torch.bfloat16, False)):
        for trains in (False, True):
            assert plain_layers.is_faster(x.to(dtype), torch.empty(512, 1, 3, 3), trains) == faster


@pytest.mark.usefixtures("pairs")
@torch.no_grad()
def test_taps_of_many_values(monkeypatch: pytest.MonkeyPatch) -> None:
    """25 taps are PyTorch's own only in bfloat16 where ours are pairs, of many values, and sooner on small planes."""
    monkeypatch.setattr(plain_layers, "_PLAIN_ELEMENTS", 2000)
    x = torch.randn(3, 128, 9, 11).to(memory_format=torch.channels_last)
    for k, faster in ((3, True), (5, False), (7, False)):
        assert plain_layers.is_faster(x, torch.empty(128, 1, k, k)) == faster
    n = x.numel()
    for small, large, larger, faster in (
        (9 * 11, n - 1, n, False),
        (9 * 11, n, n - 1, True),
        (9 * 11 + 1, n - 1, n, True),
        (9 * 11 + 1, n, n - 1, False),
    ):
        for name, value in (("_SMALL", small), ("_LARGE", large), ("_LARGER", larger)):
            monkeypatch.setattr(plain_layers, name, value)
        assert plain_layers.is_faster(x.bfloat16(), torch.empty(128, 1, 5, 5)) == faster
        assert not plain_layers.is_faster(x, torch.empty(128, 1, 5, 5))
        assert not plain_layers.is_faster(x.bfloat16(), torch.empty(128, 1, 7, 7))
    monkeypatch.setattr(plain_layers, "_LARGE", n - 1)
    for level, taps in (("avx512bf16", 25), ("avx512", 9), ("amx", 9)):
        monkeypatch.setattr(registry, "isa_level", lambda level=level: level)
        assert plain_layers.is_faster(x.bfloat16(), torch.empty(128, 1, 5, 5)) == (taps == 25)
        assert f"with {taps} taps or fewer" in plain_layers.why_faster(x.bfloat16(), torch.empty(128, 1, 5, 5), False)


@torch.no_grad()
def test_results_that_glibc_maps_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plain_layers, "_PLAIN_ELEMENTS", 2000)
    x, weight = torch.randn(3, 16, 9, 11).to(memory_format=torch.channels_last), torch.empty(16, 1, 3, 3)
    for most, faster in ((x.nbytes + 1, True), (x.nbytes, False)):
        monkeypatch.setattr(plain_layers, "_MAPPED", most)
        assert plain_layers.is_faster(x, weight) == faster


@pytest.mark.parametrize(
    ("channels", "kernel", "error"),
    [
        (-1, 3, ValueError),
        (8, 0, ValueError),
        (8, (3, 3, 3), TypeError),
        (8, ("3", 3), TypeError),
        (8, 3.0, TypeError),
        (0, 3, ValueError),
    ],
)
def test_wrong_arguments_of_the_layer(channels: int, kernel: Any, error: type[Exception]) -> None:
    with pytest.raises(error, match=r"(channels|kernel_size): got .*wanted"):
        LargeKernelDepthwiseConv2d(channels, kernel)


def test_odd_arguments_of_the_layer() -> None:
    """NumPy's integers; planes without pixels, which PyTorch's convolution refuses."""
    layer = LargeKernelDepthwiseConv2d(np.int64(8), np.int64(3))
    assert layer.weight.shape == (8, 1, 3, 3)
    x = torch.randn(2, 8, 0, 4, requires_grad=True)
    assert ops.depthwise_block(x, layer.weight, layer.bias, act="none", residual=False).shape == x.shape


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
