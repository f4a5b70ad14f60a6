"""A forced backend gives no fused part away to plain PyTorch; where none is forced that happens, and is said once."""

import types
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from plain_models import FUSED, check_against, fused_and_plain, needs_kernels, trained
from torch import Tensor, nn

from cmx_kernels import ConvMixer, LargeKernelDepthwiseConv2d, backends, explain, use

pytestmark = needs_kernels
X = torch.randn(2, 3, 28, 35, generator=torch.Generator().manual_seed(2))
Call = Callable[[nn.Module], Any]


def stem_of(model: nn.Module) -> nn.Module:
    """Its convolution, which in the paper's form lies beside the blocks, in no fused part of its own."""
    return model.stem[0] if hasattr(model, "stem") else model[0]


def block_of(model: nn.Module) -> nn.Module:
    return model.blocks[1] if hasattr(model, "blocks") else model[4]


def hooked(module: nn.Module) -> None:
    module.register_forward_hook(lambda module, args, y: None)


def replaced(module: nn.Module) -> None:
    module.forward = types.MethodType(lambda self, x: type(self).forward(self, x), module)


def call(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model(X)


def jvp(model: nn.Module) -> Tensor:
    return torch.func.jvp(model, (X,), (torch.ones_like(X),))[1]


def vmap(model: nn.Module) -> Tensor:
    return torch.vmap(model)(X[:, None])


REFUSED: dict[str, tuple[Callable[[nn.Module], Any], Call, str]] = {
    "hook in a block": (lambda m: hooked(block_of(m)[2]), call, "a hook is attached to its GELU"),
    "hook in the stem": (lambda m: hooked(stem_of(m)), call, "a hook is attached to its Conv2d"),
    "forward in a block": (lambda m: replaced(block_of(m)[1]), call, "the forward of its Conv2d was replaced"),
    "forward in the stem": (lambda m: replaced(stem_of(m)), call, "the forward of its Conv2d was replaced"),
    "jvp": (lambda m: m.requires_grad_(False), jvp, "which only PyTorch's operators follow"),
    "vmap": (lambda m: m.requires_grad_(False), vmap, "which only PyTorch's operators follow"),
    "empty batch in training": (lambda m: m.train(), lambda m: m(X[:0]), "the batch is empty"),
}


@pytest.mark.parametrize("model", FUSED)
@pytest.mark.parametrize("name", REFUSED)
def test_networks(name: str, model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """RuntimeError with the reason under use(), or CMX_BACKEND; else one warning, and the plain model's result."""
    change, run, reason = REFUSED[name]
    fused, plain = fused_and_plain(model)
    call(fused)  # what is refused now has run
    for one in (fused, plain):
        change(one)
    with use("cpu"), pytest.raises(RuntimeError, match=f"the forced backend 'cpu' refuses: .*{reason}"):
        run(fused)
    monkeypatch.setattr(backends, "_said", set())
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        outs = run(fused), run(fused)
    assert len(said) == 1 and reason in str(said[0].message)
    for out in outs:
        torch.testing.assert_close(out, run(plain), rtol=1e-4, atol=1e-5)
    with use("reference"):
        torch.testing.assert_close(run(fused), run(plain), rtol=1e-4, atol=1e-5)
    monkeypatch.setattr(backends, "STRICT", True)
    with pytest.raises(RuntimeError, match=f"CMX_STRICT=1.*{reason}"):
        run(fused)
    monkeypatch.setattr(backends, "FUSED", False)
    run(fused)
    with use("cpu"):
        run(fused)


@pytest.mark.parametrize("model", FUSED)
@pytest.mark.parametrize("part", (stem_of, block_of))
def test_a_hook_that_is_gone(part: Callable[[nn.Module], nn.Module], model: str) -> None:
    """What stood against a part stands no more: it is fused again."""
    fused, plain = fused_and_plain(model)
    inner = part(fused) if part is stem_of else part(fused)[2]
    hook = inner.register_forward_hook(lambda module, args, y: None)
    with use("cpu"), pytest.raises(RuntimeError, match="a hook is attached"):
        call(fused)
    hook.remove()
    with use("cpu"):
        torch.testing.assert_close(call(fused), call(plain), rtol=1e-4, atol=1e-5)
    assert not explain(fused, X).refusals


LAYERS: dict[str, tuple[dict[str, Any], Call, str]] = {
    "stride": ({"stride": 2, "padding": 2}, lambda m: m(X), r"stride \(2, 2\)"),
    "padding mode": ({"padding_mode": "reflect"}, lambda m: m(X), "padding_mode is 'reflect'"),
    "one image": ({}, lambda m: m(X[0]), "x has 3 dimensions"),
    "jvp": ({}, jvp, "which only PyTorch's operators follow"),
}


@pytest.mark.parametrize("name", LAYERS)
def test_layers(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    settings, run, reason = LAYERS[name]
    layer = LargeKernelDepthwiseConv2d(3, 5, **settings).requires_grad_(False)
    with use("cpu"), pytest.raises(RuntimeError, match=f"LargeKernelDepthwiseConv2d: the forced.*refuses: .*{reason}"):
        run(layer)
    monkeypatch.setattr(backends, "_said", set())
    with pytest.warns(UserWarning, match=reason):
        run(layer)
    with use("reference"):
        run(layer)
    monkeypatch.setattr(backends, "STRICT", True)
    with pytest.raises(RuntimeError, match="CMX_STRICT"):
        run(layer)


@torch.no_grad()
def test_what_never_was_fused_is_no_refusal() -> None:
    """A head, other modules beside the blocks, hooks around fused parts."""
    net = trained(ConvMixer(16, 2, 3, 7, 10, global_pool="max"))
    plain = trained(ConvMixer(16, 2, 3, 7, 10, global_pool="max", fused=False))
    plain.load_state_dict(net.state_dict())
    for name in ("", "stem", "blocks.1", "global_pool", "head"):
        hooked(net.get_submodule(name))
    with use("cpu"):
        check_against(net(X), plain, X)


@torch.no_grad()
def test_explain_tells_of_a_stem_beside_the_blocks() -> None:
    fused, _ = fused_and_plain("paper")
    assert not explain(fused, X).refusals
    hooked(fused[0])
    assert explain(fused, X).refusals == {f"{i}": {"fusion": "a hook is attached to its Conv2d"} for i in range(3)}
