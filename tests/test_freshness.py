"""Packed weights are made again after every change of what they were made from. A stale cache must fail these tests."""

import copy
from collections.abc import Callable

import pytest
import torch
from plain_models import check_against, counted, needs_kernels, trained
from torch import Tensor, nn

from cmx_kernels import ConvMixer
from cmx_kernels.models import watch
from cmx_kernels.ops.block_stack import PackedCache

pytestmark = [needs_kernels, pytest.mark.filterwarnings("ignore:cmx_kernels")]
X = torch.randn(2, 3, 20, 24, generator=torch.Generator().manual_seed(2))


def other() -> nn.Module:
    torch.manual_seed(7)
    return trained(ConvMixer(24, 2, 5, 4, 6, fused=False), seed=7)


def optimise(make: Callable[..., torch.optim.Optimizer], **kw: object) -> Callable[[nn.Module], None]:
    def step(model: nn.Module) -> None:
        optimizer = make(model.parameters(), lr=0.1, **kw)
        with torch.enable_grad():
            model(X).square().sum().backward()
        optimizer.step()

    return step


def average(model: nn.Module) -> None:
    """As hand-written moving averages do."""
    for a, b in zip(model.parameters(), other().parameters(), strict=True):
        a.data.mul_(0.5).add_(b.data, alpha=0.5)


def swap(model: nn.Module, path: str, tensor: Callable[[Tensor], Tensor]) -> None:
    module, _, name = path.rpartition(".")
    old = getattr(model.get_submodule(module), name)
    setattr(model.get_submodule(module), name, nn.Parameter(tensor(old.detach())))


def vector(model: nn.Module) -> None:
    flat = nn.utils.parameters_to_vector(model.parameters())
    nn.utils.vector_to_parameters(flat * 1.1, model.parameters())


def train_a_step(model: nn.Module) -> None:
    model.train()
    model(X)  # changes nothing but running statistics
    model.eval()


CHANGES: dict[str, Callable[[nn.Module], object]] = {
    "SGD": optimise(torch.optim.SGD),
    "AdamW foreach": optimise(torch.optim.AdamW, foreach=True),
    "AdamW fused": optimise(torch.optim.AdamW, fused=True),
    "load_state_dict": lambda m: m.load_state_dict(other().state_dict()),
    "load_state_dict assign": lambda m: m.load_state_dict(other().state_dict(), assign=True),
    "copy_": lambda m: m.blocks[1][1].weight.copy_(other().blocks[1][1].weight),
    "one element": lambda m: m.blocks[1][1].weight[3, 4, 0, 0].add_(5.0),
    "bias": lambda m: m.blocks[0][0].fn[0].bias.add_(1.0),
    "norm weight": lambda m: m.blocks[0][3].weight.mul_(1.5),
    "norm bias": lambda m: m.stem[2].bias.add_(0.5),
    "running mean": lambda m: m.blocks[0][0].fn[2].running_mean.add_(0.5),
    "running variance": lambda m: m.stem[2].running_var.mul_(2.0),
    "reset_running_stats": lambda m: m.blocks[1][3].reset_running_stats(),
    "reset_parameters": lambda m: m.blocks[1][1].reset_parameters(),
    "a training step": train_a_step,
    "data replaced": lambda m: setattr(m.blocks[0][1].weight, "data", other().blocks[0][1].weight.data.clone()),
    "data transposed": lambda m: setattr(m.blocks[0][1].weight, "data", m.blocks[0][1].weight.data.transpose(0, 1)),
    "data expanded": lambda m: setattr(m.blocks[1][3].bias, "data", m.blocks[1][3].bias.data[:1].expand(24)),
    "data written": lambda m: m.blocks[0][1].weight.data.copy_(other().blocks[0][1].weight),
    "norm data written": lambda m: m.blocks[0][3].weight.data.fill_(0.25),
    "moving average": average,
    "parameter replaced": lambda m: swap(m, "blocks.0.1.weight", lambda w: w * 1.5),
    "buffer replaced": lambda m: setattr(m.stem[2], "running_mean", torch.ones(24)),
    "module replaced": lambda m: m.blocks[1].__setitem__(1, other().blocks[1][1]),
    "norm replaced": lambda m: setattr(m.blocks[1][0].fn, "2", other().blocks[1][0].fn[2]),
    "block replaced": lambda m: m.blocks.__setitem__(0, other().blocks[0]),
    "stem replaced": lambda m: setattr(m, "stem", other().stem),
    "vector_to_parameters": vector,
    "apply": lambda m: m.apply(lambda sub: nn.init.zeros_(sub.bias) if isinstance(sub, nn.Conv2d) else None),
    "pruned by hand": lambda m: m.blocks[0][1].weight.masked_fill_(m.blocks[0][1].weight > 0, 0.0),
}


def follows(change: Callable[[nn.Module], object]) -> None:
    """The fused model after the change equals the plain one after the change, and not itself before."""
    torch.manual_seed(0)
    model = trained(ConvMixer(24, 2, 5, 4, 6))
    plain = ConvMixer(24, 2, 5, 4, 6, fused=False).eval()
    plain.load_state_dict(model.state_dict())
    before = model(X)
    assert torch.equal(model(X), before)
    for m in (model, plain):
        torch.manual_seed(3)
        change(m)
    out = model(X)
    check_against(out, plain, X)
    assert not torch.allclose(out, before, atol=1e-5)


@pytest.mark.parametrize("name", CHANGES)
@torch.no_grad()
def test_change_is_followed(name: str) -> None:
    follows(CHANGES[name])


@pytest.mark.parametrize(
    "name", sorted(set(CHANGES) - {"module replaced", "norm replaced", "block replaced", "stem replaced"})
)
@torch.no_grad()
def test_a_stale_cache_is_noticed(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The test of the test: with a cache that never looks, each of the changes above must fail."""

    def stale(self: PackedCache, tensors: object, key: object, build: Callable[[], object]) -> object:
        self._state = self._state or (build(),)
        return self._state[0]

    monkeypatch.setattr(PackedCache, "get", stale)
    with pytest.raises(AssertionError):
        follows(CHANGES[name])


@pytest.mark.parametrize("name", CHANGES)
@torch.no_grad()
def test_change_is_followed_without_native_library(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watch, "_form", watch._InPython)
    follows(CHANGES[name])


@pytest.mark.parametrize("form", [watch._InPython, watch._form])
def test_settings_may_be_set_again(form: type, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watch, "_form", form)
    conv = nn.Conv2d(3, 4, 2)
    found = watch.Watch([conv])
    conv.stride = tuple(map(int, conv.stride))
    assert found.unchanged()


@pytest.mark.parametrize("form", [watch._InPython, watch._form])
@pytest.mark.parametrize(
    "change",
    [
        lambda m: setattr(m[0], "stride", (2, 1)),
        lambda m: setattr(m[0], "stride", [1, 1]),
        lambda m: m[0].register_forward_hook(print),
        lambda m: m[1].register_forward_pre_hook(print),
        lambda m: setattr(m[0], "_conv_forward", print),
        lambda m: setattr(m[1], "__class__", nn.Flatten),
        lambda m: m.append(nn.ReLU()),
        lambda m: m.__setitem__(1, nn.ReLU()),
    ],
)
def test_what_is_watched(form: type, change: Callable[[nn.Module], object], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watch, "_form", form)
    model = nn.Sequential(nn.Conv2d(3, 4, 2), nn.ReLU())
    found = watch.Watch([model, *model])
    assert found.unchanged()
    change(model)
    assert not found.unchanged()


@torch.no_grad()
def test_equal_weights_are_packed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    model = trained(ConvMixer(24, 2, 5, 4, 6))
    packed = []
    real = torch.ops.cmx.pack_depthwise
    monkeypatch.setattr("cmx_kernels.ops.block_stack.pack_depthwise", lambda w: packed.append(1) or real(w))
    with counted(monkeypatch) as calls:
        for n in (1, 2, 5):
            model(torch.randn(n, 3, 20, 24))
        model.train(), model.eval()
        model(X)
    assert (len(packed), len(calls)) == (2, 4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@torch.no_grad()
def test_conversions_there_and_back(dtype: torch.dtype) -> None:
    """.half().float() may give a parameter its old address, version and shape back, with other values."""
    model = trained(ConvMixer(24, 2, 5, 4, 6))
    plain = ConvMixer(24, 2, 5, 4, 6, fused=False).eval()
    plain.load_state_dict(model.state_dict())
    for autocast in (dtype, torch.bfloat16, torch.float16, dtype):
        with torch.autocast("cpu", autocast):
            assert model(X).dtype == autocast
            torch.testing.assert_close(model(X), plain(X), rtol=0.05, atol=0.05)
    for convert in (lambda m: m.to(dtype), lambda m: m.float(), lambda m: m.to(memory_format=torch.channels_last)):
        model, plain = convert(model), convert(plain)
        x = X.to(next(plain.parameters()).dtype)
        check_against(model(x), plain, x)
        x = x.contiguous(memory_format=torch.channels_last)
        check_against(model(x), plain, x)
        check_against(model.forward_features(x), nn.Sequential(plain.stem, plain.blocks), x)
    assert not any("_cmx" in m.__dict__ for m in model.bfloat16().modules()), "packed weights outlive their parameters"


@torch.no_grad()
def test_copies_do_not_share_packed_weights() -> None:
    model = trained(ConvMixer(24, 2, 5, 4, 6))
    out = model(X)
    twin = copy.deepcopy(model)
    twin.blocks[0][1].weight.zero_()
    assert not torch.allclose(twin(X), out)
    assert torch.equal(model(X), out)
    shallow = copy.copy(model)
    shallow._modules = {**model._modules, "blocks": twin.blocks}
    assert torch.equal(shallow(X), twin(X))
    assert torch.equal(model(X), out)


@pytest.mark.parametrize(
    "path", ["blocks.0.1.weight", "stem.0.bias", "blocks.1.3.weight", "blocks.0.0.fn.2.running_mean"]
)
@pytest.mark.parametrize("kind", [Tensor, nn.Parameter])
@torch.no_grad()
def test_a_weight_that_is_something_else_now(path: str, kind: Callable[[Tensor], Tensor]) -> None:
    """As some wrappers leave it; then it changes in place."""
    model = trained(ConvMixer(24, 2, 5, 4, 6))
    plain = ConvMixer(24, 2, 5, 4, 6, fused=False).eval()
    plain.load_state_dict(model.state_dict())
    model(X)
    place, _, name = path.rpartition(".")
    layer, same = (m.get_submodule(place) for m in (model, plain))
    weight = getattr(layer, name).detach().clone()
    delattr(layer, name)
    setattr(layer, name, kind(weight))
    for factor in (1, 3):
        weight.mul_(factor)
        getattr(same, name).mul_(factor)
        torch.testing.assert_close(model(X), plain(X))


@torch.no_grad()
def test_moving_averages_of_timm() -> None:
    utils = pytest.importorskip("timm.utils")
    model = trained(ConvMixer(24, 2, 5, 4, 6))
    average = utils.ModelEmaV3(model, decay=0.5)
    first = average.module(X)
    model.load_state_dict(other().state_dict())
    average.update(model)
    plain = ConvMixer(24, 2, 5, 4, 6, fused=False).eval()
    plain.load_state_dict(average.module.state_dict())
    check_against(average.module(X), plain, X)
    assert not torch.allclose(average.module(X), first)


def test_parameters_made_in_inference_mode() -> None:
    with torch.inference_mode():
        model = trained(ConvMixer(24, 2, 5, 4, 6))
        plain = ConvMixer(24, 2, 5, 4, 6, fused=False).eval()
        plain.load_state_dict(model.state_dict())
        check_against(model(X), plain, X)
        for m in (model, plain):
            m.blocks[0][1].weight.mul_(2)
        check_against(model(X), plain, X)


@torch.no_grad()
def test_another_instruction_set() -> None:
    from cmx_kernels import registry

    model = trained(ConvMixer(24, 2, 5, 4, 6))
    plain = ConvMixer(24, 2, 5, 4, 6, fused=False).eval()
    plain.load_state_dict(model.state_dict())
    now = registry.C.isa_level()
    try:
        for level in [*registry.C.isa_levels(), now]:
            registry.C.set_isa_level(level)
            check_against(model(X), plain, X, level)
    finally:
        registry.C.set_isa_level(now)
