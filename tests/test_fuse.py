"""fuse and unfuse: what fuses, what is refused and why, and what stays exactly as it was."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from plain_models import FAMILY, NATIVE, Residual, check_against, check_step, counted, paper, timms, trained
from torch import Tensor, nn

from cmx_kernels import backends, explain, fuse, unfuse
from cmx_kernels.models.fused import Block, Fused

pytestmark = pytest.mark.filterwarnings("ignore:cmx_kernels")
SIZES = (32, 3, 5, 7, 10)
X = torch.randn(2, 3, 28, 35, generator=torch.Generator().manual_seed(2))


def twins(family: str = "timm") -> tuple[nn.Module, nn.Module]:
    """One model fused, its equal plain."""
    plain = trained(FAMILY[family](*SIZES))
    return fuse(copy.deepcopy(plain), strict=True), plain


def wrapped(model: nn.Module) -> nn.Module:
    class Classifier(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.tensor(2.0))
            self.net = model

        def forward(self, x: Tensor) -> Tensor:
            return self.net(x * self.scale)

    return Classifier()


@pytest.mark.parametrize("family", FAMILY)
@torch.no_grad()
def test_logits_and_one_call_for_the_network(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    fused, plain = twins(family)
    with counted(monkeypatch) as calls:
        out = fused(X)
    check_against(out, plain, X)
    assert calls == ([True] if NATIVE else [])
    assert list(fused.state_dict()) == list(plain.state_dict())
    assert isinstance(fused, type(plain))
    assert type(fused).__name__ == type(plain).__name__


@pytest.mark.parametrize("family", FAMILY)
@torch.no_grad()
def test_unfuse_gives_back_the_module_it_was(family: str) -> None:
    plain = trained(FAMILY[family](*SIZES))
    before = [(name, type(m), set(m.__dict__)) for name, m in plain.named_modules()]
    tensors = {name: id(t) for name, t in plain.state_dict(keep_vars=True).items()}
    out = plain(X)
    assert fuse(plain) is plain
    plain(X)
    assert unfuse(fuse(plain)) is plain
    assert [(name, type(m), set(m.__dict__)) for name, m in plain.named_modules()] == before
    assert {name: id(t) for name, t in plain.state_dict(keep_vars=True).items()} == tensors
    assert torch.equal(plain(X), out)


@torch.no_grad()
def test_models_inside_others(monkeypatch: pytest.MonkeyPatch) -> None:
    plain = trained(nn.ModuleList([wrapped(paper(*SIZES)), nn.Sequential(nn.BatchNorm2d(3), timms(*SIZES))]))
    fused = fuse(copy.deepcopy(plain), strict=True)
    with counted(monkeypatch) as calls:
        for a, b in zip(fused, plain, strict=True):
            check_against(a(X), b, X)
    assert len(calls) == (2 if NATIVE else 0)
    assert not any(isinstance(m, Fused) for m in unfuse(fused).modules())


@torch.no_grad()
def test_a_run_of_blocks_among_other_modules(monkeypatch: pytest.MonkeyPatch) -> None:
    blocks = list(paper(*SIZES))[3:6]
    plain = trained(
        nn.Sequential(nn.Conv2d(3, 32, 3), *blocks, nn.ReLU(), nn.Conv2d(32, 4, 1), *list(paper(4, 1, 3))[3:4])
    )
    fused = fuse(copy.deepcopy(plain), strict=True)
    with counted(monkeypatch) as calls:
        check_against(fused(X), plain, X)
    assert calls == ([False, False] if NATIVE else [])


def block(dim: int, out: int, kernel: int, padding: Any = "same") -> nn.Sequential:
    depthwise = nn.Conv2d(dim, dim, kernel, groups=dim, padding=padding)
    inner = nn.Sequential(depthwise, nn.GELU(), nn.BatchNorm2d(dim))
    return nn.Sequential(Residual(inner), nn.Conv2d(dim, out, 1), nn.GELU(), nn.BatchNorm2d(out))


@pytest.mark.parametrize(
    "make",
    [
        lambda: nn.Sequential(block(16, 16, 3), block(16, 16, 5)),
        lambda: nn.Sequential(block(16, 24, 3), block(24, 24, 3)),
        lambda: nn.Sequential(block(16, 16, 3), block(16, 24, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten()),
        lambda: nn.Sequential(block(16, 16, 3), block(16, 16, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(2)),
        lambda: nn.Sequential(block(16, 16, 3), block(16, 16, 3), nn.AdaptiveAvgPool2d(2), nn.Flatten()),
        lambda: nn.Sequential(block(16, 16, 3), block(16, 16, 3), nn.AdaptiveMaxPool2d(1), nn.Flatten()),
    ],
)
@torch.no_grad()
def test_networks_that_are_not_uniform(make: Callable[[], nn.Module]) -> None:
    plain = trained(make())
    fused, x = fuse(copy.deepcopy(plain), strict=True), torch.randn(2, 16, 9, 7)
    for _ in range(2):
        check_against(fused(x), plain, x)


@pytest.mark.parametrize("family", FAMILY)
def test_gradients_in_eval_mode(family: str) -> None:
    fused, plain = twins(family)
    x = X.clone().requires_grad_()
    for model in (fused, plain):
        model(x).square().sum().backward()
    for (name, a), b in zip(fused.named_parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-4, atol=1e-5, msg=lambda m, name=name: f"{name}: {m}")


@pytest.mark.parametrize("family", FAMILY)
def test_training_is_that_of_the_plain_model(family: str) -> None:
    fused, plain = twins(family)
    check_step(fused.train(), plain.train(), X)
    with torch.no_grad():
        check_against(fused.eval()(X), plain.eval(), X)


class Gated(nn.Module):
    """Looks like a residual, and is none."""

    def __init__(self, fn: nn.Module) -> None:
        super().__init__()
        self.fn = fn

    def forward(self, x: Tensor) -> Tensor:
        return self.fn(x) + 0.5 * x


class Scaled(nn.Module):
    """A residual only while scale is 1."""

    def __init__(self, fn: nn.Module) -> None:
        super().__init__()
        self.fn, self.scale = fn, 1.0

    def forward(self, x: Tensor) -> Tensor:
        return self.fn(x) * self.scale + x


class Dropping(nn.Module):
    """A residual in evaluation, and in training most of the time."""

    def __init__(self, fn: nn.Module) -> None:
        super().__init__()
        self.fn = fn

    def forward(self, x: Tensor) -> Tensor:
        return x if self.training and torch.rand(()) < 1e-9 else self.fn(x) + x


def set_in(path: str, make: Callable[[nn.Module], nn.Module]) -> Callable[[nn.Module], None]:
    def change(model: nn.Module) -> None:
        model.set_submodule(path, make(model.get_submodule(path)))

    return change


REFUSED: dict[str, tuple[Callable[[nn.Module], None], str]] = {
    "not a residual": (set_in("blocks.1.0", lambda m: Gated(m.fn)), "something else than"),
    "a residual with a state": (set_in("blocks.1.0", lambda m: Scaled(m.fn)), "attributes of its own"),
    "a random residual": (set_in("blocks.1.0", lambda m: Dropping(m.fn)), "random numbers"),
    "another activation": (set_in("blocks.1.2", lambda m: nn.SiLU()), "SiLU"),
    "another norm": (set_in("blocks.1.3", lambda m: nn.GroupNorm(1, 32)), "GroupNorm"),
    "dilation": (
        set_in("blocks.1.0.fn.0", lambda m: nn.Conv2d(32, 32, 3, padding=2, dilation=2, groups=32)),
        "dilation",
    ),
    "padding": (
        set_in("blocks.1.0.fn.0", lambda m: nn.Conv2d(32, 32, 3, padding=1, groups=32, padding_mode="reflect")),
        "ref",
    ),
    "two groups": (set_in("blocks.1.1", lambda m: nn.Conv2d(32, 32, 1, groups=2)), "1x1"),
    "more modules": (lambda m: m.blocks[1].append(nn.Identity()) and None, "4 modules"),
    "overlapping patches": (set_in("stem.0", lambda m: nn.Conv2d(3, 32, 7, stride=5)), "overlap"),
}


@pytest.mark.parametrize("name", REFUSED)
@torch.no_grad()
def test_what_is_refused_runs_as_before(name: str) -> None:
    change, says = REFUSED[name]
    plain = timms(*SIZES)
    change(plain)
    trained(plain)
    with pytest.raises(ValueError, match=says):
        fuse(copy.deepcopy(plain), strict=True)
    with pytest.warns(UserWarning, match=says):
        backends._said.clear()
        fused = fuse(copy.deepcopy(plain))
    assert isinstance(fused.blocks[0], Block)
    check_against(fused(X), plain, X)
    assert list(unfuse(fused).state_dict()) == list(plain.state_dict())


def test_nothing_to_fuse() -> None:
    with pytest.raises(ValueError, match="found neither a ConvMixer block"):
        fuse(nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU()), strict=True)
    with pytest.raises(ValueError, match='not "same"'):  # one pixel too many: the plain model cannot add its input
        fuse(paper(8, 1, 4, padding=2), strict=True)
    with pytest.raises(TypeError, match=r"wanted an nn\.Module"):
        fuse("model")
    with pytest.raises(TypeError, match=r"wanted an nn\.Module"):
        unfuse(None)


@pytest.mark.filterwarnings("ignore:.*jit.script:DeprecationWarning")
@torch.no_grad()
def test_scripted_parts_stay_what_they_are() -> None:
    plain = trained(timms(*SIZES))
    for scripted in (torch.jit.script(plain), nn.Sequential(torch.jit.script(nn.ReLU()), plain)):
        out = scripted(X)
        torch.testing.assert_close(fuse(scripted)(X), out)


def test_a_derived_layer_cannot_be_unfused() -> None:
    model = fuse(nn.Sequential(nn.Conv2d(8, 8, 5, padding=2, groups=8)))
    nn.utils.parametrizations.weight_norm(model[0])
    explain(model, torch.randn(1, 8, 6, 6))
    with pytest.raises(TypeError, match="ParametrizedSwappedDepthwiseConv2d, derived from a fused class; remove"):
        unfuse(model)
    nn.utils.parametrize.remove_parametrizations(model[0], "weight")
    assert type(unfuse(model)[0]) is nn.Conv2d
