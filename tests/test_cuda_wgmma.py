"""The matrix product of sm_90a (TMA, mbarriers, wgmma), executed on the CPU, by the error rule against float64."""

import cases
import emulated
import emulated_product
import pytest
import torch
from compare import check, check_equal, check_nonfinite
from torch import Tensor

pytestmark = emulated.needs(emulated_product.library)
F32, F16, BF16 = torch.float32, torch.float16, torch.bfloat16
VECTORS = (F32, F32, F32)
ids = cases.name
both_types = pytest.mark.parametrize("dtype", (F16, BF16), ids=ids)
both_layouts = pytest.mark.parametrize("layout", ("pixels", "channels_last"))


def run(args: tuple, layout: str, order: int = 0, multiprocessors: int = 1, out: Tensor | None = None) -> Tensor:
    """On x in this layout; the output in it too."""
    x, weight, *rest = args
    if out is None:
        out = torch.full((len(x), len(weight), *x.shape[2:]), torch.nan, dtype=x.dtype)
        out = last(out) if layout == "channels_last" else out
    x = last(x) if layout == "channels_last" else x
    tile = emulated_product.WGMMA
    y, found = emulated_product.product(
        x, weight, *rest, tile=tile, order=order, multiprocessors=multiprocessors, out=out
    )
    assert found == layout
    return y


def last(t: Tensor) -> Tensor:
    return t.contiguous(memory_format=torch.channels_last)


@both_layouts
@both_types
@pytest.mark.parametrize(
    "shape",
    (
        (1, 64, 128, 8, 16),  # one tile, one step: no cluster
        (1, 8, 8, 2, 4),  # far smaller than a tile
        (2, 128, 256, 8, 16),
        (3, 200, 136, 5, 8),  # panels of 40 pixels, tiles that end in one image and begin in the next
        (5, 72, 264, 4, 18),
        (2, 520, 40, 9, 24),
    ),
    ids=ids,
)
def test_shapes(shape: tuple[int, ...], dtype: torch.dtype, layout: str) -> None:
    args = cases.inputs("pointwise_block", shape, dtype, "gelu", VECTORS)
    expected = cases.expect("pointwise_block", args)
    for multiprocessors in (1, 4):
        check(run(args, layout, sum(shape) % 6, multiprocessors), expected, f"{multiprocessors} blocks")


@both_layouts
def test_thread_orders(layout: str) -> None:
    """Any thread order and any arrival of the copies give the same bits; many steps, 1 and 2 clusters."""
    args = cases.inputs("pointwise_block", (3, 392, 264, 8, 9), BF16, "gelu", VECTORS)
    expected, out = cases.expect("pointwise_block", args), None
    for order in emulated.ORDERS:
        for multiprocessors in (2, 5):
            found = run(args, layout, order, multiprocessors)
            check(found, expected, f"order {order}")
            check_equal(found, found if out is None else out, f"order {order}, {multiprocessors} blocks")
            out = found


@both_layouts
def test_every_k(layout: str) -> None:
    for k in (8, 56, 64, 72, 120, 128, 192, 256, 320, 328, 384):  # up to and beyond the stages of the ring
        args = cases.inputs("pointwise_block", (2, k, 24, 8, 16), BF16, "relu", VECTORS)
        check(run(args, layout, k // 8 % 6), cases.expect("pointwise_block", args), f"k = {k}")


@both_layouts
def test_every_plane(layout: str) -> None:
    for plane in (8, 16, 56, 64, 72, 120, 128, 136, 192, 200):
        args = cases.inputs("pointwise_block", (3, 24, 16, 1, plane), F16, "gelu", VECTORS)
        check(run(args, layout, plane // 8 % 6), cases.expect("pointwise_block", args), f"{plane} pixels")


@both_layouts
@pytest.mark.parametrize("act", cases.ACTS)
def test_activations(act: str, layout: str) -> None:
    for vectors in (VECTORS, (None, F32, None), (None, None, None)):
        args = cases.inputs("pointwise_block", (2, 40, 72, 6, 8), BF16, act, vectors)
        check(run(args, layout), cases.expect("pointwise_block", args))


@both_layouts
@both_types
def test_integers_are_exact(dtype: torch.dtype, layout: str) -> None:
    for n, c_in, c_out, h, w in ((2, 104, 136, 9, 16), (3, 64, 32, 4, 4)):
        x, weight = torch.randint(-3, 4, (n, c_in, h, w)).to(dtype), torch.randint(-2, 3, (c_out, c_in, 1, 1)).to(dtype)
        bias, scale, shift = (torch.randint(-9, 9, (c_out,)).float() for _ in range(3))
        args = (x, weight, bias, scale / 4, shift, "relu")
        check_equal(run(args, layout), cases.formula(torch.float64, "pointwise_block", *args).to(dtype))


@both_layouts
def test_inside_other_memory(layout: str) -> None:
    """x with NaN around it, the output inside other memory, which does not change."""
    x, *rest = cases.inputs("pointwise_block", (2, 24, 40, 5, 8), BF16, "gelu", VECTORS)
    around = torch.full((4, 40, 5, 8), torch.nan, dtype=BF16)
    memory = torch.full((4, 56, 5, 8), 7.0, dtype=BF16)
    if layout == "channels_last":
        around, memory = last(around), last(memory)
    around[1:3, 8:32] = x
    y = memory[1:3, 8:48]
    out = emulated_product.product(around[1:3, 8:32], *rest, tile=emulated_product.WGMMA, out=y)
    check(out[0], cases.expect("pointwise_block", (x, *rest)))
    assert (memory[0::3] == 7).all()
    assert (memory[:, :8] == 7).all()
    assert (memory[:, 48:] == 7).all()


@both_layouts
@pytest.mark.parametrize("value", (torch.inf, -torch.inf, torch.nan))
def test_nonfinite(value: float, layout: str) -> None:
    """A non-finite input spoils exactly the outputs that the formula spoils."""
    args = cases.inputs("pointwise_block", (2, 24, 40, 5, 8), BF16, "none", VECTORS)
    args[0][1, 3, 2, 5] = value
    check_nonfinite(run(args, layout), cases.formula(torch.float64, "pointwise_block", *args).to(BF16))


def test_planes_of_one_pixel() -> None:
    """They are rows of channels, although the strides of a contiguous tensor say that pixels are neighbours."""
    args = cases.inputs("pointwise_block", (5, 24, 16, 1, 1), BF16, "gelu", VECTORS)
    y, layout = emulated_product.product(*args, tile=emulated_product.WGMMA)
    assert layout == "channels_last"
    check(y, cases.expect("pointwise_block", args))


@pytest.mark.parametrize(
    "shape", ((2, 20, 16, 4, 8), (2, 16, 16, 7, 7), (2, 24, 16, 3, 4)), ids=("c_in", "plane", "half a row")
)
def test_what_tma_cannot_copy(shape: tuple[int, ...]) -> None:
    with pytest.raises(emulated.NoPlan):
        run(cases.inputs("pointwise_block", shape, BF16), "pixels")


def test_strides_that_overlap() -> None:
    x, *rest = cases.inputs("pointwise_block", (1, 24, 16, 4, 8), BF16)
    with pytest.raises(emulated.NoPlan):
        emulated_product.product(x.expand(3, 24, 4, 8), *rest, tile=emulated_product.WGMMA)
