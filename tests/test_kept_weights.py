"""Under autocast on a GPU weights are converted once: the emulated CUDA kernel keeps the copies, on CPU tensors."""

import gc
from collections.abc import Callable, Iterator
from typing import Any

import emulated
import emulated_binding
import pytest
import torch
from compare import check_equal
from plain_models import trained
from test_freshness import CHANGES
from torch import Tensor, nn
from torch.profiler import profile

from cmx_kernels import ConvMixer, LargeKernelDepthwiseConv2d
from cmx_kernels.ops import batchnorm, block_stack, kept_weights

pytestmark = [emulated.needs(emulated_binding.build), pytest.mark.filterwarnings("ignore:cmx_kernels")]
X = torch.randn(2, 3, 20, 24, generator=torch.Generator().manual_seed(2))
NARROW = (torch.bfloat16, torch.float16)


@pytest.fixture(autouse=True)
def emulated_gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Parameters count as on a GPU, and nothing runs a stack in one call, as on one."""
    emulated_binding.library()
    monkeypatch.setattr(kept_weights, "recast", torch.ops.cmx_emulated.recast.default)
    monkeypatch.setattr(batchnorm, "_fold_rows", torch.ops.cmx_emulated.fold_rows.default)
    for module in (kept_weights, batchnorm):
        monkeypatch.setattr(module, "_on_gpu", lambda weight: True)
    monkeypatch.setattr(block_stack, "why_not", lambda *_: "not here")
    emulated_binding.asked()
    yield
    kept_weights._copies.clear()


def model(micro_batch: int | None = 2) -> ConvMixer:
    torch.manual_seed(0)
    net = trained(ConvMixer(24, 2, 5, 4, 6))
    net.micro_batch = micro_batch
    return net


def conversions(call: Callable[[], Any]) -> list[tuple[int, ...]]:
    """Shapes of the weights that a call converts by PyTorch's operators."""
    with profile(record_shapes=True) as found:
        call()
    shapes = [tuple(e.input_shapes[0]) for e in found.events() if e.name == "aten::_to_copy" and e.input_shapes]
    return [s for s in shapes if len(s) == 4 and s[0] != len(X)]


def autocast(net: nn.Module, dtype: torch.dtype = torch.bfloat16, x: Tensor = X) -> Tensor:
    with torch.no_grad(), torch.autocast("cpu", dtype):
        return net(x)


@pytest.mark.parametrize("micro_batch", [2, 0, None], ids=["depth-first", "whole", "one by one"])
def test_a_second_call_converts_nothing(micro_batch: int | None) -> None:
    net = model(micro_batch)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        first = net(X)
        assert conversions(lambda: net(X)) == []
        check_equal(net(X), first)
    assert len(kept_weights._copies) == sum(type(m) is nn.Conv2d for m in net.modules()) == 5


def test_without_copies_each_call_converts(monkeypatch: pytest.MonkeyPatch) -> None:
    """The test of the test, and the values: the same bits."""
    net = model()
    kept = autocast(net)
    monkeypatch.setattr(kept_weights, "_on_gpu", lambda weight: False)
    assert len(conversions(lambda: autocast(net))) == 5
    check_equal(autocast(net), kept)


@pytest.mark.parametrize("name", CHANGES)
@torch.no_grad()
def test_change_is_followed(name: str) -> None:
    """By both copies, each in its type; those that another part may be reading stay where they are."""
    net, same = model(), model()
    before = [autocast(net, dtype) for dtype in NARROW]
    for m in (net, same):
        torch.manual_seed(3)
        CHANGES[name](m)
    for dtype, old in zip(NARROW, before, strict=True):
        new = autocast(net, dtype)
        check_equal(new, autocast(same, dtype))
        assert not torch.equal(new, old)


@torch.no_grad()
def test_a_stale_copy_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """The test of the test: what is hidden from PyTorch is found by the samples alone."""
    net = model()
    before = autocast(net)
    monkeypatch.setattr(kept_weights, "recast", lambda *_: None)
    net.blocks[0][1].weight.data.mul_(2)
    check_equal(autocast(net), before)


@torch.no_grad()
def test_copies_stay_in_their_memory() -> None:
    """A captured graph reads them: conversions, and other settings of the model, leave them where they are."""
    net = model()
    autocast(net)
    weight = net.blocks[1][1].weight
    copy = kept_weights._copies[weight][torch.bfloat16].tensor
    at = copy.data_ptr()
    for change in (
        lambda: weight.mul_(1.5),
        lambda: weight.data.add_(1.0),
        lambda: net.load_state_dict(model().state_dict()),
        lambda: setattr(weight, "data", torch.randn_like(weight)),
        lambda: (net.train(), net.eval()),
        lambda: net.cpu(),
        lambda: setattr(net, "micro_batch", 1),
    ):
        change()
        autocast(net)
        check_equal(copy, weight.detach().bfloat16())
        assert kept_weights._copies[weight][torch.bfloat16].tensor.data_ptr() == at


@torch.no_grad()
def test_copies_go_with_their_parameters() -> None:
    net = model()
    autocast(net), autocast(net, torch.float16)
    assert len(kept_weights._copies) == 5
    net.to(torch.bfloat16)
    assert not kept_weights._copies
    net.float()
    autocast(net)
    del net
    gc.collect()
    assert not kept_weights._copies


def test_what_keeps_none() -> None:
    """Gradients, other types, parameters of inference mode, weights with gaps."""
    net = model()
    with torch.autocast("cpu", torch.bfloat16):
        net(X).sum().backward()
    assert not kept_weights._copies
    with torch.no_grad():
        net(X), net.half()(X.half())
        with torch.autocast("cpu", torch.bfloat16):
            net(X)
    assert not kept_weights._copies
    gaps = nn.Parameter(torch.randn(4, 4, 3, 6)[..., ::2])
    with torch.no_grad():
        check_equal(kept_weights.converted([gaps], torch.bfloat16)[0], gaps.detach().bfloat16())
    with torch.inference_mode():
        made = nn.Parameter(torch.randn(4, 4, 1, 1))
        check_equal(kept_weights.converted([made], torch.bfloat16)[0], made.bfloat16())
    assert not kept_weights._copies


@torch.no_grad()
def test_inference_mode_and_back() -> None:
    net = model()
    with torch.inference_mode():
        first = autocast(net)
    net.stem[0].weight.mul_(1.5)
    assert not torch.equal(autocast(net), first)


@torch.no_grad()
def test_a_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = LargeKernelDepthwiseConv2d(24, 7).eval()
    x = torch.randn(2, 24, 9, 7)
    wanted = autocast(layer, x=x)
    monkeypatch.setattr(LargeKernelDepthwiseConv2d, "_packed", lambda *_: None)
    for _ in range(2):
        check_equal(autocast(layer, x=x), wanted)
    assert len(kept_weights._copies) == 1
    layer.weight.data.mul_(2)
    assert not torch.equal(autocast(layer, x=x), wanted)


def test_the_kernel() -> None:
    """More weights than a launch takes, runs and samples that end early, each layout; NaN is equal to itself."""
    sizes = [1, 127, 129, kept_weights.RUN, kept_weights.RUN + 1, 3 * kept_weights.RUN - 5] * 12
    weights = [torch.randn(n) for n in sizes]
    weights[3][0] = torch.nan
    kept = [torch.empty(n, dtype=torch.float16) for n in sizes]
    samples = [torch.empty(-(-n // kept_weights.RUN) * kept_weights.SAMPLES, dtype=torch.int32) for n in sizes]
    kept_weights.recast(weights, kept, samples, True)
    assert emulated_binding.asked().count("stream -1") == 2
    for weight, copy in zip(weights, kept, strict=True):
        check_equal(copy, weight.half())
    weights[5][kept_weights.RUN + 7] = 9.0  # sampled, of the second run
    weights[5][:7000].mul_(1.0)
    weights[5][5000] = 9.0  # of the first run, and not sampled
    old = kept[5].clone()
    kept_weights.recast(weights, kept, samples, False)
    check_equal(kept[5][kept_weights.RUN :], weights[5][kept_weights.RUN :].half())
    check_equal(kept[5][: kept_weights.RUN], old[: kept_weights.RUN])
    check_equal(kept[3], weights[3].half())


@pytest.mark.parametrize("wrong", ["count", "dtype", "shape", "samples"])
def test_refusals(wrong: str) -> None:
    weights, kept = [torch.randn(4, 5)], [torch.empty(4, 5, dtype=torch.float16)]
    samples = [torch.empty(kept_weights.SAMPLES, dtype=torch.int32)]
    if wrong == "count":
        weights *= 2
    elif wrong == "dtype":
        kept = [kept[0].float()]
    elif wrong == "shape":
        kept = [kept[0].mT]
    else:
        samples = [samples[0][1:]]
    with pytest.raises(RuntimeError, match=r"wanted one of each|wanted float16|wanted float32, a copy of its strides"):
        kept_weights.recast(weights, kept, samples, True)


@pytest.mark.parametrize("dtype", [torch.float32, *NARROW], ids=str)
@torch.no_grad()
def test_constants_in_one_launch(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """As BatchNorm one by one, but for the order of two operations; of more units than a launch takes two launches."""
    norms = [trained(nn.BatchNorm2d(300), seed).to(dtype) for seed in range(70)]
    vectors = [(n.running_mean, n.running_var, n.weight, n.bias) for n in norms]
    biases, eps = [torch.randn(300).to(dtype) for _ in norms], [n.eps for n in norms]
    found = batchnorm.constants(biases, vectors, eps)
    assert emulated_binding.asked().count("stream -1") == 2
    monkeypatch.setattr(batchnorm, "_on_gpu", lambda weight: False)
    for out, wanted in zip(found, batchnorm.constants(biases, vectors, eps), strict=True):
        check_equal(out[0], wanted[0])
        torch.testing.assert_close(out[1:], wanted[1:], rtol=3e-7, atol=1e-6)
    with monkeypatch.context() as patch:
        patch.setattr(batchnorm, "_on_gpu", lambda weight: True)
        for other in ([None, *biases[1:]], [biases[0].double(), *biases[1:]]):  # no kernel for these
            assert emulated_binding.asked() == []
            batchnorm.constants(other, vectors, eps)
