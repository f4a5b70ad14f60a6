"""The launchers choose the kernel that the cost model predicts, for every activation: what `explain` says runs."""

import ctypes
import itertools
from collections.abc import Iterator
from typing import Any

import ahead
import cases
import emulated
import pytest

from cmx_kernels import cost_model, registry

SOURCES = ("csrc/cuda/depthwise_fwd.cu", "csrc/cuda/product.cu", "tests/emulator/choice.cpp")
GPUS = ("H200", "A100", "L40S", "RTX 4090")
SIZES = ((1, 32), (8, 14), (64, 32), (256, 16))  # n, h = w
DEPTHWISE = [(n, 768, size, size, k, k) for (n, size), k in itertools.product(SIZES, (3, 5, 7, 9, 13))]
PRODUCTS = [(n, 768, 768, size, size, 1, 1) for n, size in SIZES] + [(64, 3, 768, 32, 32, 7, 7)]


@ahead.once
def library() -> ctypes.CDLL:
    return ctypes.CDLL(str(emulated.build("library", *SOURCES)))


pytestmark = [
    emulated.needs(library),
    pytest.mark.skipif(registry.C is None, reason=str(registry.WHY_NO_C)),
]


def calls(shapes: list[tuple[int, ...]]) -> Iterator[tuple]:
    """gpu, shape, dtype, act, channels_last"""
    return itertools.product(GPUS, shapes, cost_model.DTYPES, cost_model.ACTS, (False, True))


def chosen(
    function: str, gpu: str, shape: tuple[int, ...], dtype: str, act: str, last: bool, *flags: Any
) -> tuple[int, int]:
    """The kernel's number, and its blocks."""
    numbers = (*shape, cost_model.DTYPES.index(dtype), cost_model.ACTS.index(act))
    found = (ctypes.c_int * 2)()
    place = cost_model.gpus().index(gpu)
    how = (ctypes.c_bool(last), *flags[:1], found, *flags[1:])
    getattr(library(), function)(place, (ctypes.c_int * len(numbers))(*numbers), *how)
    return found[0], found[1]


def product(
    gpu: str, shape: tuple[int, ...], dtype: str, act: str, last: bool, use: int
) -> tuple[tuple[int, int], tuple[int, int]]:
    """The tile's number and blocks; of its statistics the parts, and where the last launch begins to write its own."""
    parts = (ctypes.c_int64 * 2)()
    found = chosen("cmx_chosen_product", gpu, shape, dtype, act, last, ctypes.c_int(use), parts)
    return found, (parts[0], parts[1])


@pytest.mark.parametrize("backward", (False, True), ids=("forward", "backward"))
def test_depthwise(backward: bool) -> None:
    predict = cost_model.depthwise_backward if backward else cost_model.depthwise
    kernels: dict[tuple, set[str]] = {}
    for gpu, shape, dtype, act, last in calls(DEPTHWISE):
        p = predict(gpu, shape[:4], shape[4:], dtype, act, last)
        found = chosen("cmx_chosen_depthwise", gpu, shape, dtype, act, last, ctypes.c_bool(backward))
        assert found == (cost_model.KERNELS.index(p.kernel), p.blocks), f"{gpu} {cases.name(shape)} {dtype} {act}"
        kernels.setdefault((gpu, shape, dtype, last), set()).add(p.kernel)
    assert any(len(k) > 1 for k in kernels.values()), "the activation decides nowhere: other shapes are wanted"


def test_one_product() -> None:
    """Whatever is predicted; afterwards, the best again."""
    shape, layouts = (8, 768, 768, 32, 32, 1, 1), (False, True)

    def kernels() -> list[tuple[int, int]]:
        return [product("H200", shape, "bfloat16", "gelu", last, 0)[0] for last in layouts]

    best = kernels()
    for kernel in range(len(cost_model.TILES)):
        before = library().cmx_cuda_only_product(kernel)
        found = kernels()
        assert library().cmx_cuda_only_product(before) == kernel
        assert [number for number, _ in found] == [kernel] * 2
    assert best == kernels()


def test_product() -> None:
    for gpu, shape, dtype, act, last in calls(PRODUCTS):
        if dtype == "float32":
            continue  # torch's own convolution
        n, c_in, c_out, h, w, ph, pw = shape
        for number, use in enumerate(cost_model.USES):
            p = cost_model.product(gpu, (n, c_in, h * ph, w * pw), c_out, (ph, pw), dtype, act, last, use)
            found, _ = product(gpu, shape, dtype, act, last, number)
            assert found == (cost_model.TILES.index(p.kernel), p.blocks), f"{gpu} {cases.name(shape)} {dtype} {act}"
            assert use == "inference" or p.kernel != "64x32"  # whose panels are too narrow for statistics


def test_training_multiplies_by_wgmma() -> None:
    """In both layouts, NCHW as [C, N, H, W] in memory: mma.sync would take twice the time."""
    for size, last, use in itertools.product(((1536, 32), (768, 32), (1024, 16)), (False, True), (0, 1, 2)):
        c, plane = size
        found, _ = product("H200", (64, c, c, plane, plane, 1, 1), "bfloat16", "gelu", last, use)
        assert cost_model.TILES[found[0]] == "wgmma", f"{size}, channels_last {last}, {cost_model.USES[use]}"


@pytest.mark.parametrize("last", (False, True))
@pytest.mark.parametrize("gpu", GPUS)
def test_statistics_of_several_launches(gpu: str, last: bool) -> None:
    """Pixels are counted in 32 bits: of these images a launch takes two, and its parts follow those before them."""
    for use, numbers in ((1, 3), (2, 2)):
        parts = {}
        for n in (1, 2, 5):
            _, (parts[n], begin) = product(gpu, (n, 8, 24, 2**15, 2**14, 1, 1), "bfloat16", "gelu", last, use)
        assert parts[5] == 2 * parts[2] + parts[1] == 5 * parts[1]
        assert begin == 2 * parts[2] * 24 * numbers
