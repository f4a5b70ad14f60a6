"""The CUDA matrix product, executed on the CPU (tests/emulator), by the error rule of the operators against float64."""

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
TILES = emulated_product.TILES
OPS = ("pointwise_block", "patch_embed")
SHAPES = [(op, shape) for op in OPS for shape in cases.SHAPES[op] if shape[0]]
ids = cases.name
both_types = pytest.mark.parametrize("dtype", (F16, BF16), ids=ids)
every_tile = pytest.mark.parametrize("tile", TILES)


def last(t: Tensor) -> Tensor:
    return t.contiguous(memory_format=torch.channels_last)


def run(args: tuple, tile: int = 1, layout: str | None = None, **options: object) -> Tensor | None:
    """None where the layout is gathered, for which there is one tile only."""
    try:
        y, found = emulated_product.product(*args, tile=tile, **options)
    except emulated.NoPlan:
        assert tile != 1
        return None
    assert layout in (None, found)
    return y


@every_tile
@both_types
@pytest.mark.parametrize(("op", "shape"), SHAPES, ids=ids)
def test_shapes(op: str, shape: tuple[int, ...], dtype: torch.dtype, tile: int) -> None:
    args = cases.inputs(op, shape, dtype, "gelu", VECTORS)
    expected, order = cases.expect(op, args), sum(shape) % 6
    out = run(args, tile, order=order)
    if out is not None:
        check(out, expected)
    out = run(
        (last(args[0]), *args[1:]), tile, order=order, out=last(torch.full_like(expected.ref, torch.nan, dtype=dtype))
    )
    if out is not None:
        check(out, expected, "channels_last")


@every_tile
@pytest.mark.parametrize("layout", emulated_product.LAYOUTS)
def test_thread_orders(layout: str, tile: int) -> None:
    """Any thread order and any arrival of the copies give the same bits; more steps than stages, several tiles."""
    shape = (3, 270, 140, 4, 20) if layout != "gather" else (2, 271, 70, 5, 13)
    args = cases.inputs("pointwise_block", shape, BF16, "gelu", VECTORS)
    expected, out = cases.expect("pointwise_block", args), None
    for order in emulated.ORDERS:
        x, y = args[0], torch.full_like(expected.ref, torch.nan, dtype=BF16)
        x, y = (last(x), last(y)) if layout == "channels_last" else (x, y)
        found = run((x, *args[1:]), tile, layout, order=order, out=y)
        if found is None:
            return
        check(found, expected, f"order {order}")
        check_equal(found, found if out is None else out, f"order {order}")
        out = found


@every_tile
@pytest.mark.parametrize("k", (0, 1, 2, 4, 7, 8, 15, 16, 17, 24, 31, 33, 40, 63, 64, 65, 72, 127, 128, 130, 200))
def test_every_k(k: int, tile: int) -> None:
    """Weights of 16, 8, 4 and 2 bytes at a time, and steps that are cut off."""
    for shape in ((1, k, 9, 2, 8), (2, k, 24, 3, 4)):
        args = cases.inputs("pointwise_block", shape, BF16, "relu", VECTORS)
        expected = cases.expect("pointwise_block", args)
        check(run(args, tile), expected, f"{shape}")
        y = last(torch.full_like(expected.ref, torch.nan, dtype=BF16))
        check(run((last(args[0]), *args[1:]), tile, out=y), expected, f"{shape}, channels_last")


@every_tile
@pytest.mark.parametrize("plane", (1, 2, 3, 4, 6, 8, 12, 49, 56, 60, 64, 66, 100, 128, 130, 136, 196))
def test_every_plane(plane: int, tile: int) -> None:
    """Pixels of 16, 8, 4 and 2 bytes at a time, tiles that end in the middle of an image."""
    args = cases.inputs("pointwise_block", (5, 24, 17, 1, plane), F16, "gelu", VECTORS)
    out = run(args, tile)
    if out is not None:
        check(out, cases.expect("pointwise_block", args))


@every_tile
@pytest.mark.parametrize("act", cases.ACTS)
def test_activations(act: str, tile: int) -> None:
    for vectors in (VECTORS, (None, F32, None), (None, None, None)):
        args = cases.inputs("pointwise_block", (2, 40, 70, 6, 8), BF16, act, vectors)
        expected = cases.expect("pointwise_block", args)
        check(run(args, tile, "pixels"), expected)
        y = last(torch.full_like(expected.ref, torch.nan, dtype=BF16))
        check(run((last(args[0]), *args[1:]), tile, "channels_last", out=y), expected)


@every_tile
@both_types
def test_integers_are_exact(dtype: torch.dtype, tile: int) -> None:
    for shape in ((2, 100, 130, 9, 16), (3, 64, 32, 4, 4)):
        n, c_in, c_out, h, w = shape
        x, weight = torch.randint(-3, 4, (n, c_in, h, w)).to(dtype), torch.randint(-2, 3, (c_out, c_in, 1, 1)).to(dtype)
        bias, scale, shift = (torch.randint(-9, 9, (c_out,)).float() for _ in range(3))
        args = (x, weight, bias, scale / 4, shift, "relu")
        check_equal(run(args, tile), cases.formula(torch.float64, "pointwise_block", *args).to(dtype))


@pytest.mark.parametrize("layout", cases.LAYOUTS)
@pytest.mark.parametrize("op", OPS)
def test_layouts(op: str, layout: str) -> None:
    """Every layout of x, its neighbours in memory NaN; the output inside other memory, which does not change."""
    for shape in (cases.RAGGED[op], (2, 16, 24, 8, 8) if op == "pointwise_block" else (2, 3, 16, 12, 16, 4, 4)):
        x, *rest = cases.inputs(op, shape, BF16, "gelu", VECTORS)
        x = cases.LAYOUTS[layout](x)
        expected = cases.expect(op, (x, *rest))
        n, c, h, w = expected.ref.shape
        memory = torch.full((n + 1, c + 2, h, w), 7.0, dtype=BF16)
        for memory_of_y in (memory, memory.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2)):
            y = memory_of_y[1:, 1:-1]
            for tile in TILES:
                out = run((x, *rest), tile, out=y)
                if out is not None:
                    check(out, expected, f"{shape}, tile {tile}")
            assert (memory_of_y[0] == 7).all()
            assert (memory_of_y[:, (0, -1)] == 7).all()


@every_tile
@pytest.mark.parametrize("value", (torch.inf, -torch.inf, torch.nan))
def test_nonfinite(value: float, tile: int) -> None:
    """A non-finite input spoils exactly the outputs that the formula spoils."""
    for place in (last, torch.clone):
        x, *rest = cases.inputs("pointwise_block", (2, 19, 37, 5, 8), BF16, "none", VECTORS)
        x[1, 3, 2, 5] = value
        y = place(torch.full((2, 37, 5, 8), torch.nan, dtype=BF16))
        eager = cases.formula(torch.float64, "pointwise_block", x, *rest).to(BF16)
        check_nonfinite(run((place(x), *rest), tile, out=y), eager)


@pytest.mark.parametrize("dtype", (F32, F16, BF16), ids=ids)
@pytest.mark.parametrize("shape", [s for s in (*cases.POOL, (17, 40, 9, 4, 8)) if s[0]], ids=ids)
def test_pool_head(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    x, weight, bias = cases.inputs("pool_head", shape, dtype, vectors=(F32,) * 3)
    expected = cases.expect("pool_head", (x, weight, bias))
    for layout in ("contiguous", "channels_last", "misaligned", "column_slice", "transposed_pixels"):
        outs = [emulated_product.pool_head(cases.LAYOUTS[layout](x), weight, bias, order=order) for order in (0, 4, 5)]
        check(outs[0], expected, layout)
        assert all(torch.equal(out, outs[0]) for out in outs), "depends on the order of the threads"


def test_pool_head_without_channels() -> None:
    """Nothing to sum: the bias. A launch of no blocks would be an error."""
    x, weight, bias = cases.inputs("pool_head", (2, 0, 5, 3, 3), BF16, vectors=(F32,) * 3)
    check_equal(emulated_product.pool_head(x, weight, bias), bias.to(BF16).expand(2, 5))


@pytest.mark.parametrize("act", cases.ACTS)
def test_epilogue(act: str) -> None:
    """After a convolution of torch's own, the whole operator."""
    for shape in ((2, 19, 37, 5, 7), (1, 8, 40, 4, 8), (3, 5, 9, 1, 1)):
        for vectors in (VECTORS, (None, F32, None)):
            args = cases.inputs("pointwise_block", shape, F32, act, vectors)
            for place in (torch.clone, last):
                y = place(cases.conv("pointwise_block", *args[:2], None))
                out = emulated_product.epilogue(y, *args[2:], order=len(vectors))
                check(out, cases.expect("pointwise_block", args), f"{shape}")
