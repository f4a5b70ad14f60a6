"""Every instantiation of every CUDA kernel, emulated: right against float64, the same bits in every order of threads.

The kernels are those that the compiled libraries hold: one that is not run here in all orders fails.
"""

import itertools
import re
from collections.abc import Callable, Iterable

import cases
import cuda_facts
import emulated
import emulated_product
import emulated_training
import pytest
import torch
import training_cases as problems
from compare import Expected, check, check_equal
from product_checks import check_passes
from test_cuda_training_products import EMULATED
from torch import Tensor

from cmx_kernels.ops import training_products as products
from cmx_kernels.ops.batchnorm import fold_all

pytestmark = [emulated.needs(emulated.library), emulated.needs(emulated_product.library)]
F32, F16, BF16 = torch.float32, torch.float16, torch.bfloat16
HALVES = (F16, BF16)
VECTORS = (F32, F32, F32)

LIBRARIES = {"depthwise": emulated.library, "product": emulated_product.library}


def every_order(run: Callable[[int], Iterable[Tensor]], *expected: Expected) -> None:
    first = None
    for order in emulated.ORDERS:
        outs = tuple(run(order))
        for out, wanted, same in zip(outs, expected, first or outs, strict=True):
            check(out, wanted, f"order {order}")
            check_equal(out, same, f"order {order}")
        first = first or outs


def check_library(name: str) -> None:
    """All of its kernels have run in all orders since the last question; they are those that are compiled for GPUs."""

    def mine(kernel: str) -> bool:  # both libraries have second stages
        return kernel.startswith(("depthwise", "training", "batchnorm")) == (name == "depthwise")

    found = {kernel: orders for kernel, orders in emulated.launched(LIBRARIES[name]()).items() if mine(kernel)}
    assert not {kernel for kernel, orders in found.items() if orders != 0b111}, "not run in all orders"
    gpu = set(re.findall(r"^sm_80\s+(?!activation)(\w+<.*?>)", cuda_facts.TABLE.read_text(), re.M))
    assert set(found) == set(filter(mine, gpu))


def depthwise(kernel: str, dtype: torch.dtype, *shape: int, act: str = "gelu") -> None:
    args = cases.inputs("depthwise_block", shape, dtype, act, VECTORS)
    every_order(lambda order: [emulated.depthwise(kernel, *args, order=order)], cases.expect("depthwise_block", args))


def gradients(kernel: str, dtype: torch.dtype, *shape: int) -> None:
    args = problems.depthwise_inputs(shape, dtype)
    back = problems.backward_inputs(args, problems.expect_pre_activation(args).ref.to(dtype))
    expected = problems.expect_gradients(back, rounded=kernel == "mma")
    every_order(
        lambda order: emulated_training.depthwise_backward(*back, kernel=kernel, order=order)[:3],
        *expected,
    )


def test_depthwise(monkeypatch: pytest.MonkeyPatch) -> None:
    emulated.launched(emulated.library())  # so that only what follows counts
    for dtype, k in itertools.product(cases.DTYPES, (3, 4, 5, 7, 9)):  # 4: as every width that is not unrolled
        depthwise("ffma", dtype, 1, 2, 9, 13, k, k)
        gradients("ffma", dtype, 1, 2, 9, 13, k, k)
    for dtype, width, k in itertools.product(HALVES, (14, 35), (5, 13, 20, 28)):  # both tiles, all windows
        depthwise("mma", dtype, 3, 1, 11, width, 4, k)
        depthwise("mma_last", dtype, 1, 8, 11, width, 4, k)
    for dtype, size, k, act in itertools.product(HALVES, (16, 32), (7, 9), ("gelu", "relu")):  # common, and not
        depthwise("mma_plane", dtype, 3, 1, size, size, k, k, act=act)
    for dtype, width in itertools.product(HALVES, (14, 35)):
        gradients("mma", dtype, 3, 1, 11, width, 5, 5)
        for kh, kw in ((10, 4), (3, 13), (12, 20), (5, 28)):  # all windows
            gradients("mma", dtype, 3, 1, 11, width, kh, kw)
    passes = itertools.product(cases.DTYPES, range(3), ((2, 6, 3, 5), (2, 8, 4, 4)), ("contiguous", "channels_last"))
    for dtype, order, shape, layout in passes:  # ragged, and whole units of 16 bytes
        monkeypatch.setattr(emulated_training, "ORDER", order)
        check_passes(EMULATED, shape, dtype, "gelu", layout)
    moments, sums, gamma, beta = torch.rand(2, 300), torch.randn(2, 300), *torch.randn(2, 300)
    rows, rstd, _ = torch.ops.cmx.batchnorm_rows(moments, gamma, beta, 1e-5, 40)
    for order in range(3):
        monkeypatch.setattr(emulated_training, "ORDER", order)
        check_equal(emulated_training.batchnorm_rows(moments, gamma, beta, 1e-5, 40)[0], rows)
        found = emulated_training.batchnorm_gradients(sums, rows, rstd, 40, False)
        check_equal(found[0], torch.ops.cmx.batchnorm_gradients(sums, rows, rstd, 40, False)[0])
    check_library("depthwise")


def product(op: str, shape: tuple[int, ...], dtype: torch.dtype, layout: str, tile: int) -> None:
    x, *rest = args = cases.inputs(op, shape, dtype, "gelu", VECTORS)
    expected = cases.expect(op, args)
    y = torch.full_like(expected.ref, torch.nan, dtype=dtype)
    if layout == "channels_last":
        x, y = (t.contiguous(memory_format=torch.channels_last) for t in (x, y))

    def run(order: int) -> list[Tensor]:
        out, found = emulated_product.product(x, *rest, tile=tile, order=order, out=y.clone(), multiprocessors=2)
        assert found == layout
        return [out]

    every_order(run, expected)


def test_product() -> None:
    emulated.launched(emulated_product.library())
    for dtype, layout in itertools.product(HALVES, ("pixels", "channels_last")):
        for tile in emulated_product.TILES:
            product("pointwise_block", (2, 72, 40, 5, 8), dtype, layout, tile)
        product("pointwise_block", (3, 72, 136, 6, 8), dtype, layout, emulated_product.WGMMA)
    for dtype in HALVES:
        product("patch_embed", (2, 3, 40, 15, 11, 4, 3), dtype, "gather", 1)
    for dtype, last in itertools.product(cases.DTYPES, (False, True)):
        x, weight, bias = args = cases.inputs("pool_head", (2, 35, 11, 3, 5), dtype, vectors=VECTORS)
        x = x.contiguous(memory_format=torch.channels_last) if last else x
        pool = lambda order, x=x, weight=weight, bias=bias: [emulated_product.pool_head(x, weight, bias, order=order)]  # noqa: E731
        every_order(pool, cases.expect("pool_head", args))
    for shape, last in itertools.product(((2, 19, 37, 5, 7), (1, 8, 40, 4, 8)), (False, True)):  # by one, by four
        args = cases.inputs("pointwise_block", shape, F32, "gelu", VECTORS)
        y = cases.conv("pointwise_block", *args[:2], None)
        y = y.contiguous(memory_format=torch.channels_last) if last else y
        rest = args[2:]
        epilogue = lambda order, y=y, rest=rest: [emulated_product.epilogue(y.clone(), *rest, order=order)]  # noqa: E731
        every_order(epilogue, cases.expect("pointwise_block", args))
    for dtype in HALVES:
        weight, samples = torch.randn(9000), torch.empty(256, dtype=torch.int32)
        for order in emulated.ORDERS:
            copy = torch.empty(9000, dtype=dtype)
            check_equal(emulated_product.recast(weight, copy, samples, True, order=order), weight.to(dtype))
            weight[8192] += 1  # sampled: the first of the second run
            check_equal(emulated_product.recast(weight, copy, samples, False, order=order), weight.to(dtype))
    for last, width in ((False, 24), (False, 15), (True, 24)):
        x, weight = torch.randn(2, 3, 10, width).to(BF16), torch.randn(5, 3, 2, 3).to(BF16)
        wanted = products._patches(x, weight, last)
        for order in emulated.ORDERS:
            check_equal(emulated_product.unfold(x, weight, last, order=order)[0], wanted)
    for dtype, order in itertools.product(HALVES, emulated.ORDERS):
        vectors = tuple(torch.rand(3, 300).to(dtype))
        check_equal(emulated_product.widen(vectors, order=order), torch.stack(vectors).float())
    for dtype in cases.DTYPES:
        bias, mean, var, gamma, beta = vectors = tuple(torch.rand(5, 300).to(dtype))
        scale, shift = fold_all([(mean, var, gamma, beta)], [1e-5])[0]
        for order in emulated.ORDERS:
            rows = emulated_product.fold(vectors, 1e-5, order=order)
            torch.testing.assert_close(rows, torch.stack((bias.float(), scale, shift)))
    check_library("product")
