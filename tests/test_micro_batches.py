"""Micro-batches: what the cost model says of them, and what runs. The CPU's kernels stand in for a GPU's."""

import copy
import sys
import weakref
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from compare import check_equal
from plain_models import NATIVE, check_against, fused_and_plain, paper, trained
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from cmx_kernels import ConvMixer, explain, fuse, micro_batches, profiling, registry, tune, tuned
from cmx_kernels.models import training
from cmx_kernels.models.stack import Stack
from cmx_kernels.ops import block_stack, depth_first

pytestmark = pytest.mark.skipif(not NATIVE, reason=str(registry.WHY_NO_C))
NETS = ((1536, 20, 9, 32), (768, 32, 7, 32), (1024, 20, 9, 16), (512, 16, 8, 32))  # channels, depth, kernel, side
LAYOUTS = (torch.contiguous_format, torch.channels_last)


def predict(gpu: str, n: int, net: tuple[int, ...] = NETS[1], dtype: str = "bfloat16") -> micro_batches.MicroBatch:
    c, depth, k, side = net
    return micro_batches.predict(gpu, (n, c, side, side), depth, (k, k), dtype)


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("net", NETS, ids=str)
def test_where_they_pay(net: tuple[int, ...], dtype: str) -> None:
    """Nowhere where the memory is nearly as fast as L2; where it is much slower, and the products do not hide it."""
    for n in (0, 1, 8, 64, 256):
        for gpu in ("H200", "H100", "A100"):
            assert not predict(gpu, n, net, dtype).pays
    assert predict("L40S", 64, net, dtype).pays
    assert predict("RTX 4090", 64, net, dtype).pays == (dtype == "float32" or net[0] != 1536)


@pytest.mark.parametrize("gpu", micro_batches.L2)
def test_two_activations_and_the_weights_fit(gpu: str) -> None:
    for c, depth, k, side in NETS:
        best = predict(gpu, 64, (c, depth, k, side))
        taken = 2 * (2 * best.images * c * side * side + c * c + c * k * k)
        assert best.images == 64 or taken <= micro_batches.SHARE * micro_batches.L2[gpu].mib * 2**20
        assert (
            best.us >= depth * 4 * 2 * 64 * c * side * side / micro_batches.L2[gpu].tb_per_s * 1e-6 or best.images == 64
        )
    assert predict(gpu, 1).images == 1, "an image is not divided"
    assert predict(gpu, 0) == (0, 0, 0)
    assert predict(gpu, 64, (4096, 2, 3, 64)).images == 64, "not even one image fits"


def test_the_host_counts() -> None:
    """Kernels that are over before the next one is launched gain nothing from L2."""
    call = "L40S", (64, 512, 32, 32), 8, (5, 5), "float32"
    assert micro_batches.predict(*call).pays
    best = micro_batches.predict(*call, host_us=1000)
    assert not best.pays
    assert best.whole_us == 2 * 8 * 1000


def test_what_is_asked_of_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Shape, dtype and device decide, without memory; a GPU, dtype or activation that is not known: all."""
    names = iter(("RTX 4090", None, "RTX 4090", "RTX 4090", "H200"))
    monkeypatch.setattr(depth_first, "_gpu", lambda device: next(names))
    with FakeTensorMode():
        y = torch.empty(64, 768, 32, 32, dtype=torch.bfloat16, device="meta")
        wanted = predict("RTX 4090", 64).images
        assert 1 < wanted < 64
        assert depth_first.images(y, 32, (7, 7), "gelu") == wanted
        assert depth_first.images(y, 32, (7, 7), "gelu") == 64
        assert depth_first.images(y.double(), 32, (7, 7), "gelu") == 64
        assert depth_first.images(y, 32, (7, 7), "silu") == 64
        assert depth_first.images(y, 32, (7, 7), "gelu") == 64


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
    whole = fused(x)
    assert {images for _, images in ran} == {8}
    ran.clear()
    fused.micro_batch = 3
    out = fused(x)
    assert ran == [*through(3, depth), *through(3, depth), *through(2, depth)]
    check_against(out, plain, x)
    if name == "ours":  # at once, the other one's stem is PyTorch's
        check_equal(out, whole)
    sliced = torch.randn(16, 3, 28, 28).contiguous(memory_format=layout)[::2]
    check_against(fused(sliced), plain, sliced)
    if name == "ours":
        features = fused.forward_features(x)
        fused.micro_batch = 0
        check_equal(features, fused.forward_features(x))
        assert features.is_contiguous(memory_format=layout)
    for images in (0, 8, 9):
        fused.micro_batch = images
        ran.clear()
        check_equal(fused(x), whole)
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


def test_what_is_left_alone(ran: list[tuple[str, int]], monkeypatch: pytest.MonkeyPatch) -> None:
    """Gradients, whether or not our operators of training take them, a hook within, one block."""
    x = torch.randn(4, 3, 28, 28)
    net = trained(ConvMixer(16, 2, 3, 7, 10))
    net.micro_batch = 1
    net(x).sum().backward()
    with monkeypatch.context() as patch:
        patch.setattr(training, "why_not", lambda *_: "not here")
        net(x.requires_grad_()).sum().backward()
    assert x.grad is not None and {images for _, images in ran} == {4}
    with torch.no_grad():
        single = trained(ConvMixer(16, 1, 3, 7, 10))
        single.micro_batch = 1
        single(x)
        net.blocks[1].register_forward_hook(lambda *_: None)
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
    assert [row.backend for row in explain(loose, x)] == ["torch"] * 3 + ["cpu"] * 2 + ["torch"] * 3
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
            m = depth_first.images(y, 2, (3, 3), "gelu")
            return (m, y) if m < len(x) else None
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
