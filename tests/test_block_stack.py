"""A stem and blocks in one call against the operators one by one in float64; packing and its cache."""

import copy
import pickle
import time

import cases
import pytest
import torch
from cases import LAYOUTS
from compare import Expected, check, check_equal, check_nonfinite
from torch import Tensor

from cmx_kernels import backends, registry
from cmx_kernels.ops import block_stack as stack
from cmx_kernels.ops.block_stack import ConvParams, PackedCache

F32, F64 = torch.float32, torch.float64
# image [N, Cin, H, W], channels, depth, kernel, patch (None: no stem)
STACKS = (
    ((2, 3, 13, 11), 19, 2, (5, 4), (2, 3)),
    ((1, 3, 28, 28), 48, 3, (9, 9), (7, 7)),
    ((2, 3, 14, 14), 32, 1, (3, 3), (1, 1)),
    ((1, 1, 5, 5), 1, 2, (1, 1), (5, 5)),
    ((45, 3, 14, 14), 17, 2, (3, 5), (7, 7)),
    ((3, 33, 9, 6), 33, 2, (7, 7), None),
    ((1, 16, 36, 36), 16, 1, (8, 8), None),
    ((2, 5, 1, 40), 5, 2, (31, 31), None),
    ((2, 3, 12, 12), 21, 0, (), (4, 4)),
    ((0, 3, 14, 14), 16, 1, (3, 3), (2, 2)),
)


def _conv(size: tuple[int, ...], dtype: torch.dtype, vectors: torch.dtype | None) -> ConvParams:
    weight = torch.randn(size) * weight_scale(size)
    given = [None] * 3 if vectors is None else [torch.randn(size[0]).to(vectors) for _ in range(3)]
    return ConvParams(weight.to(dtype), *given)


def weight_scale(size: tuple[int, ...]) -> float:
    fan_in = size[1] * size[2] * size[3]
    return fan_in**-0.5


Case = tuple[tuple[int, ...], int, int, tuple[int, ...], tuple[int, int] | None]
Layers = tuple[ConvParams | None, list[tuple[ConvParams, ConvParams]]]


def _layers(case: Case, dtype: torch.dtype, vectors: torch.dtype | None = F32) -> Layers:
    image, c, depth, kernel, patch = case
    stem = None if patch is None else _conv((c, image[1], *patch), dtype, vectors)
    blocks = [(_conv((c, 1, *kernel), dtype, vectors), _conv((c, c, 1, 1), dtype, vectors)) for _ in range(depth)]
    return stem, blocks


def _one_by_one(x: Tensor, layers: Layers, act: str, pool: bool, compute: torch.dtype, store: torch.dtype) -> Tensor:
    """The formulas in ``compute``, every operator's result rounded to ``store``."""
    stem, blocks = layers
    if stem is not None:
        x = cases.formula(compute, "patch_embed", x, *stem, act).to(store)
    for depthwise, pointwise in blocks:
        x = cases.formula(compute, "depthwise_block", x, *depthwise, act, True).to(store)
        x = cases.formula(compute, "pointwise_block", x, *pointwise, act).to(store)
    return x.to(compute).mean((2, 3)).to(store) if pool else x


def _check(x: Tensor, layers: Layers, act: str = "gelu", pool: bool = False) -> Tensor:
    """Against float64, allowed twice the error of the operators one by one."""
    out = stack.block_stack(x, stack.pack(*layers, act, x.dtype), pool)
    ref = _one_by_one(x, layers, act, pool, F64, F64)
    plain = _one_by_one(x, layers, act, pool, F32, x.dtype).to(F32)
    convs = [layers[0]] * (layers[0] is not None) + [conv for block in layers[1] for conv in block]
    largest = ref.abs().max().expand(ref.shape) if ref.numel() else ref
    check(out, Expected(ref, plain, largest, sum(conv.weight[0].numel() for conv in convs), x.dtype))
    return out


@pytest.mark.parametrize("pool", (False, True), ids=("map", "pool"))
@pytest.mark.parametrize("dtype", cases.DTYPES, ids=cases.name)
@pytest.mark.parametrize("case", STACKS, ids=str)
def test_stacks(isa: str, case: Case, dtype: torch.dtype, pool: bool) -> None:
    x = torch.randn(case[0]).to(dtype)
    _check(x, _layers(case, dtype), pool=pool)


@pytest.mark.parametrize("vectors", (None, F32, torch.bfloat16), ids=str)
@pytest.mark.parametrize("act", cases.ACTS)
def test_activations_and_vectors(isa: str, act: str, vectors: torch.dtype | None) -> None:
    for dtype in (F32, torch.bfloat16):
        _check(torch.randn(STACKS[0][0]).to(dtype), _layers(STACKS[0], dtype, vectors), act)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("case", (STACKS[0], STACKS[5]), ids=("stem", "no stem"))
def test_layouts(isa: str, case: Case, layout: str) -> None:
    """Any strides in; channels_last out for channels_last in; the strides of the fake."""
    x = LAYOUTS[layout](torch.randn(case[0]))
    before = x.clone()
    layers = _layers(case, F32)
    out = _check(x, layers)
    check_equal(x, before, "x after the call")
    packed = stack.pack(*layers, "gelu", F32)
    meta = torch.empty_strided(x.shape, x.stride(), device="meta")
    assert out.stride() == stack.block_stack(meta, packed).stride()


def test_memory_is_not_reused(isa: str) -> None:
    """A call full of NaN leaves nothing behind; two results do not share memory."""
    layers = _layers(STACKS[0], F32)
    packed = stack.pack(*layers, "gelu", F32)
    x = torch.randn(STACKS[0][0])
    first = stack.block_stack(x, packed)
    kept = first.clone()
    assert stack.block_stack(torch.full_like(x, torch.nan), packed).isnan().all()
    check_equal(stack.block_stack(x, packed), kept)
    check_equal(first, kept)


def test_times_of_the_halves(isa: str) -> None:
    """Counted only between the two switches, and no more than the workers had."""
    image, c, depth, kernel, patch = (2, 3, 64, 64), 64, 3, (9, 9), (2, 2)
    packed = stack.pack(*_layers((image, c, depth, kernel, patch), F32), "gelu", F32)
    x = torch.randn(image)
    registry.C.time_stages(True)
    start = time.perf_counter()
    timed = stack.block_stack(x, packed)
    passed = time.perf_counter() - start
    found = registry.C.stage_seconds()
    registry.C.time_stages(False)
    assert set(found) == {"stem", "depthwise", "pointwise"}
    assert min(found.values()) > 0
    assert sum(found.values()) <= passed * torch.get_num_threads()
    check_equal(stack.block_stack(x, packed), timed)
    assert registry.C.stage_seconds() == {}


@pytest.mark.parametrize("value", (torch.inf, -torch.inf, torch.nan), ids=str)
@pytest.mark.parametrize("act", ("relu", "none"))
@pytest.mark.parametrize("channels", (16, 19))
def test_nonfinite(isa: str, channels: int, act: str, value: float) -> None:
    """One special pixel through two blocks ends where eager has it, also where channels do not fill a vector.

    All pointwise weights are negative, so that ReLU makes finite numbers of an inf: nothing of it may come back.
    """
    case = ((1, channels, 9, 9), channels, 2, (3, 3), None)
    stem, blocks = _layers(case, F32, None)
    blocks = [(d._replace(weight=d.weight.abs()), p._replace(weight=-p.weight.abs())) for d, p in blocks]
    x = torch.randn(case[0])
    x[0, 0, 4, 4] = value
    eager = _one_by_one(x, (stem, blocks), act, False, F32, F32)
    assert torch.isfinite(eager).all() == (act == "relu" and abs(value) == torch.inf)
    out = stack.block_stack(x, stack.pack(stem, blocks, act, F32))
    check_nonfinite(out, eager)


def test_wrong_channels_are_refused(isa: str) -> None:
    """Other channels than the stem was packed for, even where the packed weight has the same number of bytes."""
    packed = stack.pack(*_layers(STACKS[0], F32), "gelu", F32)
    for channels in (1, 2, 4, 19):
        with pytest.raises((ValueError, RuntimeError), match=r"channels|packed"):
            stack.block_stack(torch.randn(2, channels, 13, 11), packed)


def test_parameters_that_want_a_gradient(isa: str) -> None:
    """Packing detaches; a gradient of x is a reason against the stack."""
    layers = _layers(STACKS[0], F32)
    layers[0].weight.requires_grad_()
    x = torch.randn(STACKS[0][0])
    assert not stack.block_stack(x, stack.pack(*layers, "gelu", F32)).requires_grad
    assert stack.why_not(x, "gelu") is None
    x.requires_grad_()
    assert "gradient" in stack.why_not(x, "gelu")
    with torch.no_grad():
        assert stack.why_not(x, "gelu") is None


def test_why_not() -> None:
    assert "float64" in stack.why_not(torch.zeros(1, 1, 1, 1, dtype=F64), "gelu")
    for name in ("reference", "cuda"):  # a forced backend that has the operators is not refused for want of a stack
        with backends.use(name):
            assert "one by one" in stack.why_not(torch.zeros(1, 1, 1, 1), "gelu")


class _Counter:
    """Something to build: how often, and from what."""

    def __init__(self) -> None:
        self.count = 0

    def __call__(self) -> int:
        self.count += 1
        return self.count


def test_cache_sees_changes() -> None:
    """Rebuilt after a counted write, another tensor, another key; not otherwise."""
    a, b = torch.randn(300), torch.randn(3)
    cache, build = PackedCache(), _Counter()
    for _ in range(3):
        assert cache.get([a, b], "key", build) == 1
    a.add_(1)
    assert cache.get([a, b], "key", build) == 2
    with torch.no_grad():
        b[1] = 7
    assert cache.get([a, b], "key", build) == 3
    assert cache.get([a, b], "other key", build) == 4
    assert cache.get([a, b.clone()], "other key", build) == 5
    cache.clear()
    assert cache.get([a, b], "other key", build) == 6


def test_cache_sees_the_instruction_set(isa: str) -> None:
    cache, build, a = PackedCache(), _Counter(), torch.randn(3)
    cache.get([a], "key", build)
    other = next((level for level in registry.C.isa_levels() if level != isa), None)
    if other is None:
        pytest.skip("only one instruction set was compiled and runs on this machine")
    registry.C.set_isa_level(other)
    assert cache.get([a], "key", build) == 2


def test_cache_holds_its_tensors() -> None:
    """An address that is free again could be given to another tensor of version 0."""
    cache, build = PackedCache(), _Counter()
    for i in range(1, 20):
        assert cache.get([torch.zeros(1000)], "key", build) == i


@pytest.mark.parametrize(
    "duplicate", (copy.deepcopy, lambda c: pickle.loads(pickle.dumps(c))), ids=("deepcopy", "pickle")
)
def test_cache_is_not_copied(duplicate: object) -> None:
    cache, build, a = PackedCache(), _Counter(), torch.randn(3)
    cache.get([a], "key", build)
    assert duplicate(cache).get([a], "key", build) == 2
