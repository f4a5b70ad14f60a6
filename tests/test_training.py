"""Training a fused model: every setting of eager PyTorch, one step against the plain twin and float64."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from plain_models import FAMILY, check_against, check_step, one_step, timms
from torch import Tensor, nn
from training_twins import DEPTH, X, fused_step, norms, twins

pytestmark = pytest.mark.filterwarnings("ignore:cmx_kernels")


# ---- settings of BatchNorm


def replaced(**settings: Any) -> Callable[[nn.Module], None]:
    def change(model: nn.Module) -> None:
        for name, module in list(model.named_modules()):
            if isinstance(module, nn.BatchNorm2d):
                model.set_submodule(name, nn.BatchNorm2d(module.num_features, **settings))

    return change


@pytest.mark.parametrize("family", ["timm", "paper"])
@pytest.mark.parametrize(
    "settings",
    [{"momentum": None}, {"momentum": 0.0}, {"affine": False}, {"track_running_stats": False}, {"eps": 0.5}],
    ids=str,
)
def test_settings_of_batchnorm(family: str, settings: dict[str, Any]) -> None:
    fused, plain = twins(family, replaced(**settings))
    for _ in range(3):  # momentum=None averages over all batches so far
        check_step(fused, plain, X, run=fused_step)
    assert [n.num_batches_tracked for n in norms(fused)] == [n.num_batches_tracked for n in norms(plain)]
    for model in (fused, plain):
        model.eval()
    check_step(fused, plain, X)


@pytest.mark.parametrize(
    "frozen", [[0], [1], [2], [3, 4], [0, 1, 2, 3, 4]], ids=["stem", "depthwise", "pointwise", "block", "all"]
)
def test_frozen_batchnorm(frozen: list[int]) -> None:
    """In eval mode inside a model that trains: normalises with its running statistics, and keeps them."""
    fused, plain = twins()
    for model in (fused, plain):
        for i in frozen:
            norms(model)[i].running_mean.uniform_(-0.1, 0.1, generator=torch.Generator().manual_seed(i))
            norms(model)[i].eval()
    check_step(fused, plain, X, run=fused_step)
    assert [int(n.num_batches_tracked) for n in norms(fused)] == [i not in frozen for i in range(2 * DEPTH + 1)]


def test_statistics_of_large_means() -> None:
    """Mean 1e4, standard deviation 1: the mean of squares less the square of the mean would lose everything."""
    fused, plain = twins()
    for model in (fused, plain):
        with torch.no_grad():
            for i, block in enumerate((model.stem, model.blocks[0][0].fn, model.blocks[1][1:])):
                block[0].bias.add_(1e4)
                (block[2] if i < 2 else block[-1]).momentum = 1.0
    for model in (fused, plain):
        model.stem[0].weight.data.mul_(2)
    check_step(fused, plain, X, run=fused_step)
    norm = fused.stem[2]
    exact = nn.functional.conv2d(X.double(), fused.stem[0].weight.double(), fused.stem[0].bias.double(), stride=7)
    assert norm.running_mean.min() > 9e3
    torch.testing.assert_close(norm.running_var.double(), exact.var((0, 2, 3)), rtol=2e-3, atol=0)  # ulp(1e4) = 1e-3


def test_one_value_per_channel() -> None:
    fused, plain = twins()
    said = []
    for model in (plain, fused):
        with pytest.raises(ValueError, match="more than 1 value per channel") as error:
            model(X[:1, :, :7, :7])
        said.append(str(error.value))
    assert said[0] == said[1]
    for model in (plain, fused):
        model.eval()(X[:1, :, :7, :7])


# ---- modules in more than one place


def sharing(model: nn.Module) -> None:
    """Two blocks with one 1x1 convolution and one BatchNorm, which counts twice a step."""
    model[4][1], model[4][3] = model[3][1], model[3][3]


def same_block(model: nn.Module) -> None:
    model[4] = model[3]


@pytest.mark.parametrize("how", [sharing, same_block])
@pytest.mark.parametrize("momentum", [0.1, None])
def test_shared_modules(how: Callable[[nn.Module], None], momentum: float | None) -> None:
    def change(model: nn.Module) -> None:
        how(model)
        for norm in norms(model):
            norm.momentum = momentum

    fused, plain = twins("paper", change)
    assert fused[4][1] is fused[3][1] and fused[4][3] is fused[3][3]
    for _ in range(2):
        check_step(fused, plain, X, run=fused_step)
    assert int(fused[3][3].num_batches_tracked) == int(plain[3][3].num_batches_tracked) == 4


# ---- dtypes


@pytest.mark.parametrize("family", FAMILY)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(family: str, dtype: torch.dtype) -> None:
    fused, plain = twins(family)
    check_step(fused, plain, X, dtype, fused_step)


def scaled(model: nn.Module, image: Tensor) -> Tensor:
    """one_step with gradients 2^10 times as large inside of the network, as float16 wants them."""
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    y = model(image)
    torch.manual_seed(5)
    scaler.scale(y).backward(torch.randn(y.shape, dtype=torch.float64).to(y))
    scaler.unscale_(torch.optim.SGD([image, *model.parameters()]))
    return y


def test_autocast_with_scaled_gradients() -> None:
    fused, plain = twins()
    check_step(fused, plain, X, torch.float16, scaled)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision(dtype: torch.dtype) -> None:
    fused, plain = twins()
    check_step(fused.to(dtype), plain.to(dtype), X.to(dtype), run=fused_step)


# ---- gradients that arrive, are kept, or are not wanted


def accumulated(model: nn.Module, image: Tensor) -> Tensor:
    """Two backwards, of the two halves of a batch, then a step with parameter groups."""
    decayed = [p for p in model.parameters() if p.dim() > 1]
    others = [p for p in model.parameters() if p.dim() <= 1]
    optimizer = torch.optim.SGD(
        [{"params": decayed, "weight_decay": 0.1}, {"params": others, "lr": 0.05}], lr=0.01, momentum=0.9
    )
    for _ in range(2):
        for half in image.chunk(2):
            y = fused_step(model, half)
        optimizer.step()
        optimizer.zero_grad(set_to_none=False)
    fused_step(model, image)
    return y


def test_accumulation_and_parameter_groups() -> None:
    fused, plain = twins()
    check_step(fused, plain, X, run=accumulated)


GRADS: dict[str, Callable[[Tensor], Tensor]] = {
    "expanded": lambda g: g[:1, :1, :1, :1].expand(g.shape),
    "transposed": lambda g: g.transpose(0, 1).contiguous().transpose(0, 1),
    "sliced": lambda g: torch.stack((g, -g), -1)[..., 0],
    "channels_last": lambda g: g.contiguous(memory_format=torch.channels_last),
    "shifted": lambda g: torch.cat((g.new_zeros(1), g.flatten()))[1:].view(g.shape),
}


@pytest.mark.parametrize("layout", GRADS)
def test_layouts_of_the_gradient(layout: str) -> None:
    def run(model: nn.Module, image: Tensor) -> Tensor:
        features = model.forward_features(image)
        torch.manual_seed(5)
        grad = torch.randn(features.shape, dtype=torch.float64).to(features.dtype)
        features.backward(GRADS[layout](grad))
        return features

    check_step(*twins(), X, run=run)


def test_sum_as_loss() -> None:
    def run(model: nn.Module, image: Tensor) -> Tensor:
        y = model(image)
        (y * y).sum().backward()
        return y

    check_step(*twins("paper"), X, run=run)


@pytest.mark.parametrize("family", ["timm", "paper"])
def test_channels_last(family: str) -> None:
    fused, plain = (model.to(memory_format=torch.channels_last) for model in twins(family))
    x = X.contiguous(memory_format=torch.channels_last)
    check_step(fused, plain, x, run=fused_step)
    if family == "timm":
        for image in (x, X):
            features = [model.forward_features(image) for model in (fused.eval().train(), plain)]
            assert features[0].is_contiguous(memory_format=torch.channels_last) or image is X


PARAMETERS = [name for name, _ in timms(4, DEPTH, 3, 7, 3).named_parameters()]
SUBSETS: dict[str, Callable[[str], bool]] = {
    "nothing but the head": lambda name: name.startswith("head"),
    "no convolution": lambda name: not name.endswith((".0.weight", ".1.weight")),
    "no bias": lambda name: not name.endswith("bias"),
    "the last block": lambda name: name.startswith("blocks.1"),
    "the stem": lambda name: name.startswith("stem"),
    "depthwise": lambda name: ".fn." in name,
    **{f"all but {one}": lambda name, one=one: name != one for one in PARAMETERS[:-2]},
    **{f"only {one}": lambda name, one=one: name == one for one in PARAMETERS[4:12]},
}


@pytest.mark.parametrize("subset", SUBSETS)
@pytest.mark.parametrize("image_too", [False, True])
def test_frozen_parameters(subset: str, image_too: bool) -> None:
    """Gradients are there for exactly what wants one, and the same."""
    fused, plain = twins()
    for model in (fused, plain):
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(SUBSETS[subset](name))
    check_step(fused, plain, X, run=lambda model, image: one_step(model, image if image_too else image.detach()))
    for name, parameter in fused.named_parameters():
        assert (parameter.grad is not None) == SUBSETS[subset](name)


def test_no_grad_still_counts() -> None:
    """BatchNorm in training mode without gradients, as when statistics are calibrated."""
    fused, plain = twins()
    exact = copy.deepcopy(plain).double()
    with torch.no_grad():
        outs = [model(X.to(next(model.parameters()).dtype)) for model in (fused, plain, exact)]
    assert (outs[0] - outs[2]).abs().max() <= 2 * (outs[1] - outs[2]).abs().max() + 1e-6
    assert [int(n.num_batches_tracked) for n in norms(fused)] == [1] * (2 * DEPTH + 1)
    for model in (fused, plain):
        model.eval()
    check_against(fused(X), plain, X)


def test_double_backward_is_refused() -> None:
    """Also where the incoming gradient needs none, so that a penalty on gradients is not lost in silence."""
    fused, _ = twins()
    image = X.clone().requires_grad_()
    for loss in (fused(image).square().sum(), fused.forward_features(image).sum()):
        (grad,) = torch.autograd.grad(loss, image, create_graph=True)
        with pytest.raises(RuntimeError, match=r"second derivative.*unfuse"):
            grad.square().sum().backward()
    (first,) = torch.autograd.grad(fused(image).square().sum(), image, create_graph=True)
    assert torch.isfinite(first).all()
