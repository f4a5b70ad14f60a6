"""A stem and blocks of CUDA kernels in one call of the binding, over emulated kernels: the bits of its operators."""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import cases
import emulated
import emulated_binding
import pytest
import torch
from compare import check_equal
from plain_models import trained
from test_freshness import CHANGES
from torch import Tensor, nn

from cmx_kernels import ConvMixer, backends, cuda, profiling, use
from cmx_kernels.models.stack import Stack
from cmx_kernels.ops import batchnorm, depth_first, kept_weights

pytestmark = [emulated.needs(emulated_binding.build), pytest.mark.filterwarnings("ignore:cmx_kernels")]
F32, F16, BF16 = torch.float32, torch.float16, torch.bfloat16
OURS = torch.ops.cmx_emulated
X = torch.randn(3, 3, 20, 24, generator=torch.Generator().manual_seed(2))


@pytest.fixture(autouse=True)
def nothing_asked_before() -> None:
    emulated_binding.library().cmx_refuse(None)
    emulated_binding.asked()


def arguments(stem: bool, dtype: torch.dtype, depth: int = 2, c: int = 16) -> list[Any]:
    """x, weights, constants"""
    torch.manual_seed(0)
    x = torch.randn(5, 3 if stem else c, 12, 24) if stem else torch.randn(5, c, 4, 8)
    weights = [torch.randn(c, 3, 3, 3) / 5] * stem
    for _ in range(depth):
        weights += [torch.randn(c, 1, 5, 3) / 4, torch.randn(c, c, 1, 1) / 4]
    return [x.to(dtype), [w.to(dtype) for w in weights], torch.randn(len(weights), 3, c)]


def one_by_one(x: Tensor, weights: list[Tensor], constants: Tensor, act: str, stem: bool) -> Tensor:
    for i, (weight, rows) in enumerate(zip(weights, constants, strict=True)):
        if stem and not i:
            x = OURS.patch_embed(x, weight, *rows, act)
        elif (i - stem) % 2 == 0:
            x = OURS.depthwise_block(x, weight, *rows, act, True)
        else:
            x = OURS.pointwise_block(x, weight, *rows, act)
    return x


@pytest.mark.parametrize("layout", ("contiguous", "channels_last", "misaligned", "batch_slice", "column_slice"))
@pytest.mark.parametrize("dtype", (F32, F16, BF16), ids=cases.name)
@pytest.mark.parametrize("stem", (True, False), ids=("stem", "blocks"))
def test_values(stem: bool, dtype: torch.dtype, layout: str) -> None:
    """Whatever the number of images: the same bits, and the strides that the fake promises."""
    x, *rest = arguments(stem, dtype)
    x = cases.LAYOUTS[layout](x)
    before, wanted = x.clone(), one_by_one(x, *rest, "gelu", stem)
    for images in (1, 2, 5, 9):
        y = OURS.run_blocks(x, *rest, images, "gelu", stem)
        parts = [one_by_one(part, *rest, "gelu", stem) for part in x.split(images)]
        check_equal(y, wanted if images >= 5 else torch.cat(parts), f"{images} images")
        check_equal(x, before, "x after the call")
        meta = [t.to("meta") for t in rest[0]], rest[1].to("meta")
        promised = torch.ops.cmx.run_blocks(x.to("meta"), *meta, images, "gelu", stem)
        assert (y.shape, y.stride()) == (promised.shape, promised.stride())
    for empty in (x[:0], x[..., :0]) if not stem else (x[:0],):
        assert OURS.run_blocks(empty, *rest, 2, "gelu", stem).shape[0] == len(empty)


def test_refusals() -> None:
    x, weights, rows = arguments(True, BF16)
    wider = torch.randn(24, 16, 1, 1).to(BF16)
    for message, given in (
        ("weights: got 4, wanted two of every block and one of a stem", (x, weights[1:], rows[1:], 2, "gelu", True)),
        ("weights: got 5, wanted two of every block", (x, weights, rows, 2, "gelu", False)),
        ("weights: got 1, wanted two", (x, weights[:1], rows[:1], 2, "gelu", True)),
        ("images: got 0", (x, weights, rows, 0, "gelu", True)),
        ("x: got shape", (x[0], weights, rows, 2, "gelu", True)),
        ("weight: got shape .* with x of", (x[:, 1:], weights, rows, 2, "gelu", True)),
        ("weight: wanted a tensor", (x, [*weights[:4], weights[4].float()], rows, 2, "gelu", True)),
        (r"wanted \[C, 1, kh, kw\]", (x, [weights[0], *weights[:0:-1]], rows, 2, "gelu", True)),
        ("wanted 16 channels, as before it", (x, [*weights[:4], wider], rows, 2, "gelu", True)),
        ("wanted at least one patch", (x[:, :, :2], weights, rows, 2, "gelu", True)),
        (r"constants: got shape \[4, 3, 16\], wanted float32 \[5, 3, 16\]", (x, weights, rows[1:], 2, "gelu", True)),
        ("constants: got shape", (x, weights, rows.half(), 2, "gelu", True)),
        ("act: got 'silu'", (x, weights, rows, 2, "silu", True)),
    ):
        with pytest.raises(RuntimeError, match=message):
            OURS.run_blocks(*given)
        assert not any(line.startswith("stream") for line in emulated_binding.asked()), message


# ---- networks, on CPU tensors that count as a GPU's


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """Operators that Python calls under use("cuda")."""
    emulated_binding.library()
    found: list[str] = []
    real = profiling.call

    def why_not(op: str, x: Tensor, act: str) -> str | None:
        return None if op in cuda.OPS else "no kernel"

    def noted(function: Any, op: str, backend: str, *args: Any) -> Any:
        found.append(op)
        return real(function, op, backend, *args)

    monkeypatch.setattr(profiling, "call", noted)
    monkeypatch.setattr(backends, "BACKENDS", (replace(backends.BACKENDS[0], why_not=why_not), *backends.BACKENDS[1:]))
    real_function = backends.function
    ours = lambda name, op, *rest: getattr(OURS, op) if name == "cuda" else real_function(name, op, *rest)  # noqa: E731
    monkeypatch.setattr(backends, "function", ours)
    monkeypatch.setattr(depth_first, "_run_blocks", OURS.run_blocks.default)
    monkeypatch.setattr(batchnorm, "_fold_rows", OURS.fold_rows.default)
    monkeypatch.setattr(kept_weights, "recast", OURS.recast.default)
    for module in (kept_weights, batchnorm):
        monkeypatch.setattr(module, "_on_gpu", lambda weight: True)
    with use("cuda"):
        yield found
    kept_weights._copies.clear()


def model(images: int = 2) -> ConvMixer:
    torch.manual_seed(0)
    net = trained(ConvMixer(24, 2, 5, 4, 6))
    net.micro_batch = images
    return net


def run(net: nn.Module, half: bool = False) -> Tensor:
    with torch.no_grad(), torch.autocast("cpu", BF16, enabled=half):
        return net(X)


@pytest.mark.parametrize("half", (False, True), ids=("float32", "autocast"))
@pytest.mark.parametrize("images", (1, 2, 3))
def test_network(images: int, half: bool, calls: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    net = model(images)
    out = run(net, half)
    assert calls == ["run_blocks"]
    monkeypatch.setattr(depth_first, "in_one_call", lambda chosen: False)
    check_equal(run(net, half), out)
    assert len(calls) == 1 + 5 * -(-3 // images)


@pytest.mark.parametrize("half", (False, True), ids=("float32", "autocast"))
@pytest.mark.parametrize("name", CHANGES)
@torch.no_grad()
def test_change_is_followed(name: str, half: bool, calls: list[str]) -> None:
    """The same bits as a model that was never called before the change."""
    net, other = model(), model()
    before = run(net, half)
    for m in (net, other):
        torch.manual_seed(3)
        with use("cpu"):  # some of them train
            CHANGES[name](m)
    new = run(net, half)
    check_equal(new, run(other, half))
    assert not torch.equal(new, before)


@torch.no_grad()
def test_another_parameter_in_the_same_place(calls: list[str]) -> None:
    """It has a count of changes of its own, and the samples do not see this one."""
    net, other = model(), model()
    before = run(net, True)
    for m in (net, other):
        conv = m.blocks[0][1]
        conv.weight = nn.Parameter(conv.weight.data)
        conv.weight[20, 20] += 5.0
    new = run(net, True)
    check_equal(new, run(other, True))
    assert not torch.equal(new, before)


@torch.no_grad()
def test_a_stale_place_is_noticed(calls: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """The test of the test: where nobody looks, a parameter that moved is missed."""
    net = model()
    before = run(net)
    monkeypatch.setattr(Stack, "_parameters", lambda self, x, tensors: self.found[1])
    CHANGES["data replaced"](net)
    check_equal(run(net), before)


@pytest.mark.parametrize("half", (False, True), ids=("float32", "autocast"))
def test_parameters_of_inference_mode(half: bool, calls: list[str]) -> None:
    """PyTorch counts no changes of these."""
    with torch.inference_mode():
        net = model()
        net.load_state_dict(model().state_dict())
    wanted = run(model(), half)
    check_equal(run(net, half), wanted)
    with torch.inference_mode():
        net.blocks[0][1].weight.mul_(2.0)
    assert not torch.equal(run(net, half), wanted)
    assert calls == ["run_blocks"] * 3


@torch.no_grad()
def test_what_runs_one_by_one(calls: list[str]) -> None:
    """BatchNorms that are not alike are not folded in one launch; a hook wants its module called."""
    net = model()
    net.blocks[1][3].eps = 1e-3
    run(net)
    assert "run_blocks" not in calls
    calls.clear()
    net = model()
    net.blocks[0][1].register_forward_hook(lambda *_: None)
    with pytest.raises(RuntimeError, match="a hook is attached"):
        run(net)
    assert "run_blocks" not in calls
