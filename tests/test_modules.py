"""Hooks on the modules inside a fused model, and changes of these modules after it was fused."""

import copy
import types
from collections.abc import Callable
from typing import Any

import pytest
import torch
from plain_models import check_against, check_step, timms, trained
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune

from cmx_kernels import ConvMixer, fuse
from cmx_kernels.models.fused import Block

pytestmark = pytest.mark.filterwarnings("ignore:cmx_kernels")
X = torch.randn(2, 3, 28, 35, generator=torch.Generator().manual_seed(2))


def twins() -> tuple[nn.Module, nn.Module]:
    """timm's model, fused, and its equal, plain."""
    plain = trained(timms(32, 3, 5, 7, 10))
    return fuse(copy.deepcopy(plain), strict=True), plain


HOOKED = [
    "",
    "global_pool",
    "global_pool.pool",
    "stem",
    "stem.1",
    "blocks",
    "blocks.1",
    "blocks.1.0",
    "blocks.1.0.fn",
    "blocks.1.0.fn.0",
    "blocks.2.3",
    "head",
]


@pytest.mark.parametrize("path", HOOKED)
@torch.no_grad()
def test_hooks_fire_once_with_what_the_plain_model_gives_them(path: str) -> None:
    seen: dict[nn.Module, list[Tensor]] = {}
    models = twins()
    for model in models:
        model(X)
        seen[model] = []
        model.get_submodule(path).register_forward_hook(lambda m, i, o, model=model: seen[model].append(o))
        model.get_submodule(path).register_forward_pre_hook(lambda m, i, model=model: seen[model].append(i[0]))
    check_against(models[0](X), models[1], X)
    fused, plain = (seen[model][:2] for model in models)
    torch.testing.assert_close(fused, plain)
    assert len(seen[models[0]]) == 2


def test_backward_hooks_and_hooks_for_all_modules() -> None:
    fused, _ = twins()
    seen: list[str] = []
    fused.blocks[1][0].fn[1].register_full_backward_hook(lambda m, gi, go: seen.append("inner"))
    fused.blocks[0].register_full_backward_hook(lambda m, gi, go: seen.append("block"))
    fused(X).sum().backward()
    assert seen == ["inner", "block"]
    names: list[str] = []
    handle = nn.modules.module.register_module_forward_hook(lambda m, i, o: names.append(type(m).__name__))
    with torch.no_grad():
        fused(X)
    handle.remove()
    assert names.count("Conv2d") == 7


REPLACED: dict[str, Callable[[nn.Module], Any]] = {
    "weight_norm": lambda m: parametrizations.weight_norm(m.blocks[1][0].fn[0]).parametrizations.weight.original0.mul_(
        2
    ),
    "old weight_norm": lambda m: nn.utils.weight_norm(m.blocks[1][1]).weight_g.mul_(2),
    "spectral_norm": lambda m: parametrizations.spectral_norm(m.blocks[1][1]),
    "pruning": lambda m: prune.l1_unstructured(m.blocks[0][1], "weight", 0.5),
    "another class": lambda m: setattr(m.blocks[2][1], "__class__", type("Conv2d", (nn.Conv2d,), {"forward": doubled})),
    "another forward": lambda m: setattr(m.blocks[2][1], "forward", types.MethodType(doubled, m.blocks[2][1])),
    "another _conv_forward": lambda m: setattr(
        m.blocks[0][0].fn[0], "_conv_forward", types.MethodType(around, m.blocks[0][0].fn[0])
    ),
    "other features": lambda m: setattr(m, "forward_features", types.MethodType(features, m)),
    "another head": lambda m: setattr(m, "forward_head", types.MethodType(negative, m)),
    "overlapping patches": lambda m: setattr(m.stem[0], "weight", larger(m.stem[0].weight)),
    "another block forward": lambda m: setattr(m.blocks[1], "forward", lambda x: x),
    "another activation": lambda m: m.blocks[0].__setitem__(2, nn.Tanh()),
    "a block less": lambda m: m.blocks.__delitem__(1),
    "a block more": lambda m: m.blocks.append(copy.deepcopy(m.blocks[0])),
    "a norm in training mode": lambda m: m.blocks[1][3].train(),
    "no pool": lambda m: setattr(m, "global_pool", nn.Sequential(nn.AdaptiveMaxPool2d(1), nn.Flatten())),
    "two heads": lambda m: setattr(m, "head", nn.Sequential(nn.Linear(32, 5), nn.Linear(5, 10))),
    "eps": lambda m: setattr(m.blocks[1][3], "eps", 0.5),
    "tanh": lambda m: setattr(m.blocks[1][2], "approximate", "tanh"),
    "a removed bias": lambda m: setattr(m.blocks[1][1], "bias", None),
}


def doubled(self: nn.Conv2d, x: Tensor) -> Tensor:
    return 2 * nn.Conv2d.forward(self, x)


def around(self: nn.Conv2d, x: Tensor, *parameters: Tensor) -> Tensor:
    """As seamless tiling is made: the image goes on at its other end."""
    x = nn.functional.pad(x, (2, 2, 2, 2), mode="circular")
    return nn.functional.conv2d(x, *parameters, groups=self.groups)


def features(self: nn.Module, x: Tensor) -> Tensor:
    return 2 * type(self).forward_features(self, x)


def negative(self: nn.Module, x: Tensor, pre_logits: bool = False) -> Tensor:
    return -type(self).forward_head(self, x)


def larger(weight: Tensor) -> nn.Parameter:
    return nn.Parameter(nn.functional.pad(weight.detach(), (0, 1, 0, 1), value=0.1))


@pytest.mark.parametrize("name", REPLACED)
@torch.no_grad()
def test_changes_of_the_modules_are_followed(name: str) -> None:
    """After a call, so that the packed form of what is changed exists."""
    fused, plain = twins()
    before = fused(X)
    for model in (fused, plain):
        torch.manual_seed(3)
        REPLACED[name](model)
    out = fused(X)
    check_against(out, plain, X)
    assert not torch.allclose(out, before)


def test_training_with_overlapping_patches() -> None:
    fused, plain = twins()
    for model in (fused.train(), plain.train()):
        model.stem[0].weight = larger(model.stem[0].weight)
    check_step(fused, plain, X)


@torch.no_grad()
def test_methods_that_somebody_replaced_in_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    """As programs do that load adapters into any network."""
    fused, plain = twins()
    fused(X)
    real = nn.Conv2d.forward
    monkeypatch.setattr(nn.Conv2d, "forward", lambda self, x: 2 * real(self, x))
    check_against(fused(X), plain, X)
    layer, same = (
        fuse(nn.Sequential(nn.Conv2d(3, 3, 7, padding="same", groups=3))),
        nn.Conv2d(3, 3, 7, padding="same", groups=3),
    )
    same.load_state_dict(layer[0].state_dict())
    assert torch.equal(layer(X), same(X))


class Doubled(nn.Sequential):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


class Derived(ConvMixer):
    """With features of its own."""

    def forward_features(self, x: Tensor) -> Tensor:
        return 2 * super().forward_features(x)


@torch.no_grad()
def test_methods_of_derived_classes_are_called() -> None:
    plain, fused = (trained(Derived(32, 3, 5, 7, 10, fused=fused)) for fused in (False, True))
    fused.load_state_dict(plain.state_dict())
    assert type(fused) is Derived and isinstance(fused.blocks[0], Block)
    check_against(fused(X), plain, X)
    fused, plain = twins()
    for model in (fused, plain):
        model.blocks = Doubled(*model.blocks)
    check_against(fused(X), plain, X)
