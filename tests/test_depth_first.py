"""Blocks depth-first, a few images at a time or all of them: the CPU's kernels stand in for a GPU's."""

import copy
import sys
import weakref
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from compare import check_equal
from plain_models import check_against, fused_and_plain, needs_kernels, paper, trained
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from cmx_kernels import ConvMixer, explain, fuse, micro_batches, profiling, tune, tuned, use
from cmx_kernels.models import training
from cmx_kernels.models.stack import Stack
from cmx_kernels.ops import block_stack, depth_first
from cmx_kernels.ops.batchnorm import float_rows, fold, fold_all

pytestmark = needs_kernels
LAYOUTS = (torch.contiguous_format, torch.channels_last)


@pytest.fixture
def ran(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[tuple[str, int]]]:
    """Operators and their images, in a process where nothing runs a stack in one call."""
    calls: list[tuple[str, int]] = []
    real = profiling.call

    def noted(function: Any, op: str, backend: str, x: Tensor, *rest: Any) -> Any:
        calls.append((op, len(x)))
        return real(function, op, backend, x, *rest)

    monkeypatch.setattr(profiling, "call", noted)
    monkeypatch.setattr(block_stack, "why_not", lambda *_: "not here")
    yield calls
    tuned.forget()


def through(images: int, depth: int, stem: bool = True) -> list[tuple[str, int]]:
    ops = ["patch_embed"] * stem + ["depthwise_block", "pointwise_block"] * depth
    return [(op, images) for op in ops]


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("name", ["ours", "paper"])
@torch.no_grad()
def test_depth_first(name: str, layout: torch.memory_format, ran: list[tuple[str, int]]) -> None:
    """Three images, three, two, each through all blocks; the same bits as all at once, in the same layout."""
    fused, plain = fused_and_plain(name)
    depth = sum(type(m).__name__ == "Residual" for m in plain.modules())
    x = torch.randn(8, 3, 28, 28).contiguous(memory_format=layout)
    fused.micro_batch = 8
    whole = fused(x)
    assert ran == through(8, depth)
    ran.clear()
    fused.micro_batch = 3
    out = fused(x)
    assert ran == [*through(3, depth), *through(3, depth), *through(2, depth)]
    check_equal(out, whole)
    check_against(out, plain, x)
    sliced = torch.randn(16, 3, 28, 28).contiguous(memory_format=layout)[::2]
    check_against(fused(sliced), plain, sliced)
    if name == "ours":
        features = fused.forward_features(x)
        fused.micro_batch = 0
        check_equal(features, fused.forward_features(x))
        assert features.is_contiguous(memory_format=layout)
    fused.micro_batch = 9
    check_equal(fused(x), whole)
    fused.micro_batch, _ = 0, ran.clear()
    check_against(fused(x), plain, x)
    assert {n for _, n in ran} == {8}
    fused.micro_batch = 3
    for n in (0, 1, 3):
        ran.clear()
        assert fused(x[:n]).shape == whole[:n].shape
        assert {n for _, n in ran} == {n}


@torch.no_grad()
def test_two_activations_are_in_flight(ran: list[tuple[str, int]], monkeypatch: pytest.MonkeyPatch) -> None:
    """When an operator begins, nothing of the ones before lives but its input."""
    made: list[weakref.ref[Tensor]] = []
    real = profiling.call

    def followed(function: Any, op: str, backend: str, x: Tensor, *rest: Any) -> Tensor:
        assert [ref() is x for ref in made if ref() is not None] == [True] * (op != "patch_embed")
        y = real(function, op, backend, x, *rest)
        made.append(weakref.ref(y))
        return y

    monkeypatch.setattr(profiling, "call", followed)
    net = trained(ConvMixer(16, 3, 3, 7, 10))
    net.micro_batch = 2
    net(torch.randn(5, 3, 28, 28))
    assert len(made) == 3 * 7


@torch.no_grad()
def test_blocks_without_a_stem(ran: list[tuple[str, int]]) -> None:
    """And under autocast, with parameters in float32."""
    blocks = fuse(trained(paper(24, 3, 5, 4)[3:6]))
    plain = copy.deepcopy(trained(paper(24, 3, 5, 4)[3:6]))
    plain.load_state_dict(blocks.state_dict())
    x = torch.randn(5, 24, 9, 7)
    kept, blocks.micro_batch = x.clone(), 2
    check_against(blocks(x), plain, x)
    check_equal(x, kept)
    assert ran == [*through(2, 3, False), *through(2, 3, False), *through(1, 3, False)]
    with torch.autocast("cpu", torch.bfloat16):
        half = blocks(x)
    assert half.dtype == torch.bfloat16
    blocks.micro_batch = 0
    with torch.autocast("cpu", torch.bfloat16):
        check_equal(blocks(x), half)


@torch.no_grad()
def test_parts_have_the_layout_of_the_whole(ran: list[tuple[str, int]], monkeypatch: pytest.MonkeyPatch) -> None:
    """Every second image of a channels_last batch: one of them alone is channels_last, they are not."""
    seen: list[bool] = []
    real = depth_first._through
    monkeypatch.setattr(depth_first, "_through", lambda x, *rest: (seen.append(x.is_contiguous()), real(x, *rest))[1])
    net, x = trained(ConvMixer(16, 2, 3, 7, 10)), torch.randn(6, 3, 28, 28).contiguous(memory_format=LAYOUTS[1])
    net.micro_batch = 1
    for images, layout in ((x[::2], LAYOUTS[0]), (x, LAYOUTS[1])):
        assert net.forward_features(images).is_contiguous(memory_format=layout)
    assert seen == [True] * 3 + [False] * 6


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@torch.no_grad()
def test_two_launches_a_block(dtype: torch.dtype, ran: list[tuple[str, int]]) -> None:
    """Whatever else writes memory does so once a network, not once a block."""
    others = set()
    for depth in (2, 9):
        net, x = trained(ConvMixer(16, depth, 3, 7, 10)).to(dtype), torch.randn(2, 3, 28, 28).to(dtype)
        net.micro_batch = 2
        stack = net.stack()
        with Written() as written:
            assert stack.run(x, stack.tensors(net)) is not None
        others.add(len(written.names))
        assert ran == through(2, depth)
        ran.clear()
    assert len(others) == 1 and max(others) <= 20, others


class Written(TorchDispatchMode):
    """Names of PyTorch's operators whose results are no views."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        known = [a.untyped_storage().data_ptr() for a in args if isinstance(a, Tensor)]
        news = [
            t for t in (out if isinstance(out, (list, tuple)) else [out]) if t.untyped_storage().data_ptr() not in known
        ]
        self.names += [str(func)] * (bool(news) and not str(func).startswith("cmx"))
        return out


def test_folds_of_many() -> None:
    """The bits of one by one, whether they are alike or not."""
    alike = [module for module in trained(ConvMixer(16, 2, 3, 7, 10)).modules() if type(module) is nn.BatchNorm2d]
    other = trained(nn.BatchNorm2d(16, eps=0.1), 3)
    for norms in (
        alike,
        alike[:1],
        [*alike, other],
        [*alike, nn.BatchNorm2d(16, affine=False)],
        [copy.deepcopy(n).double() for n in alike],
    ):
        found = fold_all([(n.running_mean, n.running_var, n.weight, n.bias) for n in norms], [n.eps for n in norms])
        for norm, folded in zip(norms, found, strict=True):
            for out, wanted in zip(folded, fold(norm), strict=True):
                check_equal(out, wanted)
                assert out.is_contiguous()
    some = [torch.randn(4).bfloat16() for _ in range(3)]
    for rows in (some, [*some, None], [*some, torch.randn(5)], [t.float() for t in some]):
        for out, given in zip(float_rows(rows), rows, strict=True):
            assert out is None if given is None else torch.equal(out, given.float())


def test_what_is_left_alone(ran: list[tuple[str, int]], monkeypatch: pytest.MonkeyPatch) -> None:
    """Gradients, whether or not our operators of training take them, a hook within, one block."""
    x = torch.randn(4, 3, 28, 28)
    net = trained(ConvMixer(16, 2, 3, 7, 10))
    net.micro_batch = 1
    net(x).sum().backward()
    with monkeypatch.context() as patch:
        patch.setattr(training, "why_not", lambda *_: "not here")
        net(x.requires_grad_()).sum().backward()
    assert x.grad is not None
    with torch.no_grad():
        single = trained(ConvMixer(16, 1, 3, 7, 10))
        single.micro_batch = 1
        single(x)
        net.blocks[1].register_forward_hook(lambda *_: None)
        net(x)
    assert {images for _, images in ran} == {4}


@torch.no_grad()
def test_what_is_refused(ran: list[tuple[str, int]]) -> None:
    """PyTorch's modules where they are asked for, and the operators' errors."""
    net, x = trained(ConvMixer(16, 2, 3, 7, 10)), torch.randn(4, 3, 28, 28)
    net.micro_batch = 3
    with use("reference"):
        net(x)
    assert not ran
    with pytest.raises(ValueError, match=r"x has 2 channels"):
        net(x[:, :2])
    net.blocks[1][1].bfloat16()
    with pytest.raises(TypeError, match=r"weight: got dtype torch.bfloat16"):
        net(x)
    assert {images for _, images in ran} == {4}


def test_a_wrong_setting() -> None:
    net = trained(ConvMixer(16, 2, 3, 7, 10))
    for wrong in (-1, 1.5, "3"):
        net.micro_batch = wrong
        with pytest.raises(ValueError, match=r"micro_batch: got .*, wanted a number of images, 0 for all, or None"):
            net(torch.randn(2, 3, 28, 28))


@torch.no_grad()
def test_explain(ran: list[tuple[str, int]]) -> None:
    net, x = trained(ConvMixer(16, 2, 3, 7, 10)), torch.randn(4, 3, 28, 28)
    assert "at a time" not in str(explain(net, x))
    net.micro_batch = 3
    notes = [row.note for row in explain(net, x)]
    assert [("3 images at a time through all blocks" in note) for note in notes] == [True] * 3 + [False] * 2
    with torch.enable_grad():
        assert "at a time" not in str(explain(net, x))
    loose = fuse(trained(paper(16, 2, 3, 7, 10)))
    assert [row.backend for row in explain(loose, x)] == ["cpu"] * 5 + ["torch"] * 3
    assert "at a time" not in str(explain(loose, x))
    loose.micro_batch = 3
    assert [row.backend for row in explain(loose, x)] == ["cpu"] * 5 + ["torch"] * 3


@pytest.mark.parametrize("faster", [depth_first.WHOLE, depth_first.PARTS])
@torch.no_grad()
def test_tune(faster: str, ran: list[tuple[str, int]], monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    """Both are timed where the cost model wants parts, and what was faster is what runs."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    stopwatch = lambda one, name, calls: 1.0 if name in (faster, "cpu") else 2.0  # noqa: E731
    monkeypatch.setattr(sys.modules["cmx_kernels.tune"], "_seconds", stopwatch)
    monkeypatch.setattr(depth_first, "_gpu", lambda device: "L40S")
    pays = micro_batches.MicroBatch(2, 1.0, 2.0)
    monkeypatch.setattr(micro_batches, "predict", lambda *_: pays)
    real = Stack.micro_batch_of

    def on_a_gpu(stack: Stack, x: Tensor) -> Any:
        """As if x were on one."""
        if stack.micro_batch is None and len(stack.blocks) > 1:
            y = torch.empty(len(x), 16, 4, 4)
            return depth_first.images(y, 2, (3, 3), "gelu"), y
        return real(stack, x)

    monkeypatch.setattr(Stack, "micro_batch_of", on_a_gpu)
    net, x = trained(ConvMixer(16, 2, 3, 7, 10)), torch.randn(5, 3, 28, 28)
    rows = [row for row in tune(net, x) if row.kernel == depth_first.OP]
    assert [row.backend for row in rows] == [faster]
    assert net.micro_batch is None
    for again in range(2):
        ran.clear()
        net(x)
        assert {n for _, n in ran} == ({5} if faster == depth_first.WHOLE else {2, 1})
        if not again:
            tuned.forget()
            tuned.load()
    rows = [row for row in tune(net, x) if row.kernel == depth_first.OP]
    assert [row.backend for row in rows] == [faster], "measured again"
