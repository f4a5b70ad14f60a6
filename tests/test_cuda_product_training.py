"""The CUDA product's statistics, executed on the CPU (tests/emulator), by the error rule against float64.

Of training: y = weight x + bias is stored, and with it go the moments of act(y), or beside a tensor `like` with its
mean, sum(y) and sum(y (act(like) - mean)). Expected are those of y as it was stored.
"""

import cases
import emulated
import emulated_product
import pytest
import torch
import training_cases as problems
from compare import check, check_equal
from torch import Tensor

pytestmark = emulated.needs(emulated_product.library)
F32, F16, BF16 = torch.float32, torch.float16, torch.bfloat16
WGMMA = emulated_product.WGMMA
SHAPES = {  # n, c_in, c_out, h, w, of which the tiles are several, end in the middle, and are read in every width
    "pixels": ((3, 24, 136, 6, 8), (2, 40, 70, 5, 8), (5, 70, 140, 4, 20), (3, 16, 33, 7, 14), (1, 8, 129, 1, 264)),
    "channels_last": ((3, 24, 136, 6, 8), (5, 16, 24, 7, 9), (2, 21, 33, 5, 29), (1, 130, 70, 1, 3), (2, 8, 72, 9, 9)),
    "gather": ((2, 24, 17, 1, 49), (3, 5, 70, 3, 5)),
}
every_layout = pytest.mark.parametrize("layout", emulated_product.LAYOUTS)
every_tile = pytest.mark.parametrize("tile", (0, 1, WGMMA))


def last(t: Tensor) -> Tensor:
    return t.contiguous(memory_format=torch.channels_last)


def inputs(shape: tuple[int, ...], dtype: torch.dtype, layout: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """x, weight, bias, and a tensor of the size and layout of y"""
    x, weight, bias, *_ = cases.inputs("pointwise_block", shape, dtype, "gelu", (F32, F32, F32))
    like = problems.normal(shape[0], *shape[2:], seed=9).to(dtype)
    return (last(x), weight, bias, last(like)) if layout == "channels_last" else (x, weight, bias, like)


def run(args: tuple, tile: int, act: str, layout: str, sums: Tensor | None = None, **options: object) -> tuple | None:
    """y, and its moments or sums; None where this tile takes no such layout. sums: the mean of act(like)"""
    x, weight, bias, like = args
    found, y = torch.full((2, len(weight)), torch.nan), torch.full_like(like, torch.nan)
    beside = {} if sums is None else {"like": like, "mean": sums}
    try:
        out, read = emulated_product.product(
            x, weight, bias, act=act, tile=tile, out=y, found=found, multiprocessors=2, **beside, **options
        )
    except emulated.NoPlan:
        return None
    assert read == layout
    return out, found


@every_tile
@every_layout
@pytest.mark.parametrize("dtype", (F16, BF16), ids=cases.name)
def test_statistics(dtype: torch.dtype, layout: str, tile: int) -> None:
    """Of what is stored, which is what inference stores."""
    ran = 0
    for shape in SHAPES[layout]:
        args, rows, order = inputs(shape, dtype, layout), problems.rows(3, shape[2]), sum(shape) % 6
        one = run(args, tile, "gelu", layout, order=order)
        if one is None:
            continue
        two = run(args, tile, "gelu", layout, rows[0].contiguous(), order=order)
        y = torch.full_like(args[3], torch.nan)
        emulated_product.product(*args[:3], tile=tile, out=y, multiprocessors=2)
        check_equal(one[0], y)
        check_equal(two[0], y)
        check(one[1], problems.expect_moments(y, "gelu"), f"moments of {shape}")
        check(two[1], problems.expect_sums(y, args[3], rows, "gelu"), f"sums of {shape}")
        ran += 1
    assert ran == ({1: 2}.get(tile, 0) if layout == "gather" else {WGMMA: 3}.get(tile, 5))


@every_tile
def test_images_inside_of_channels(tile: int) -> None:
    """x as [C, N, H, W] in memory, which training hands over; NaN around it."""
    x, weight, bias, like = inputs((3, 24, 136, 6, 8), BF16, "pixels")
    memory = torch.full((26, 3, 6, 8), torch.nan, dtype=BF16)
    memory[1:-1] = x.transpose(0, 1)
    inside = memory[1:-1].transpose(0, 1)
    for sums in (None, problems.rows(1, 136)[0]):
        wanted = run((x, weight, bias, like), tile, "gelu", "pixels", sums)
        found = run((inside, weight, bias, like), tile, "gelu", "pixels", sums)
        assert found is not None
        for out, same in zip(found, wanted, strict=True):
            check_equal(out, same)


@every_tile
@every_layout
def test_thread_orders(layout: str, tile: int) -> None:
    """Any order of threads, any arrival of the copies give the same bits; several tiles."""
    shape = SHAPES[layout][0]
    args, mean = inputs(shape, BF16, layout), problems.rows(1, shape[2])[0]
    for sums in (None, mean):
        first = run(args, tile, "gelu", layout, sums)
        for order in emulated.ORDERS:
            found = run(args, tile, "gelu", layout, sums, order=order)
            if found is None:
                return
            for out, same in zip(found, first, strict=True):
                check_equal(out, same, f"order {order}")


@every_tile
@pytest.mark.parametrize("layout", ("pixels", "channels_last"))
@pytest.mark.parametrize("act", cases.ACTS)
def test_activations(act: str, layout: str, tile: int) -> None:
    args, rows = inputs((2, 16, 136, 6, 8), BF16, layout), problems.rows(3, 136)
    y, moments = run(args, tile, act, layout)
    check(moments, problems.expect_moments(y, act))
    y, sums = run(args, tile, act, layout, rows[0].contiguous())
    check(sums, problems.expect_sums(y, args[3], rows, act))


@every_tile
@pytest.mark.parametrize("layout", ("pixels", "channels_last"))
@pytest.mark.parametrize(("mean", "deviation"), ((1e4, 64.0), (64.0, 1.0)))
def test_moments_of_a_large_mean(mean: float, deviation: float, layout: str, tile: int) -> None:
    """Near 1e4 numbers of float16 are 8 apart; as many ulps as from 1e4 with deviation 1 in float32."""
    shape = (3, 8, 72, 9, 16)
    x, weight, _, like = inputs(shape, F16, layout)
    x, weight = torch.zeros_like(x), torch.zeros_like(weight)
    x[:, :1] = (problems.normal(3, 1, 9, 16) * deviation + mean).to(F16)
    weight[:, 0] = 1
    y, moments = run((x, weight, None, like), tile, "none", layout)
    check(moments, problems.expect_moments(y, "none"))
    torch.testing.assert_close(moments[1].double(), y.double().var((0, 2, 3), correction=0), rtol=1e-5, atol=0)


@every_tile
def test_an_outlier(tile: int) -> None:
    """Where every deviation is taken from a number that is itself far off, the variance is still right."""
    shape = (2, 8, 72, 8, 16)
    x, weight, _, like = inputs(shape, F16, "pixels")
    x, weight = torch.zeros_like(x), torch.zeros_like(weight)
    x[:, 0] = problems.normal(2, 8, 16).to(F16) / 64
    x[:, 0, :, 0] = 6e4
    weight[:, 0] = 1
    y, moments = run((x, weight, None, like), tile, "none", "pixels")
    check(moments, problems.expect_moments(y, "none"))


@every_tile
@pytest.mark.parametrize("layout", ("pixels", "channels_last"))
def test_reads_nothing_around(layout: str, tile: int) -> None:
    """NaN around x and `like`, in whose memory y lies too; `like` is read in the width that its address allows."""

    def placed(t: Tensor) -> Tensor:
        n, c, h, w = t.shape
        memory = torch.full((n + 2, c, h, w), torch.nan, dtype=t.dtype)
        return (last(memory) if layout == "channels_last" else memory)[1:-1].copy_(t)

    args, rows = inputs((2, 24, 136, 6, 8), BF16, layout), problems.rows(3, 136)
    x, weight, bias, like = args
    wanted = run(args, tile, "gelu", layout, rows[0].contiguous())
    for given in (placed(like), torch.empty(like.numel() + 1, dtype=BF16)[1:].as_strided_(like.shape, like.stride())):
        given.copy_(like)
        found = run((placed(x), weight, bias, given), tile, "gelu", layout, rows[0].contiguous())
        if found is None:
            assert tile == WGMMA
            assert given.data_ptr() % 16  # TMA would have to store y so
            continue
        check_equal(found[0], wanted[0])
        check_equal(found[1], wanted[1])


@pytest.mark.parametrize("layout", ("pixels", "channels_last"))
@every_tile
def test_nonfinite(tile: int, layout: str) -> None:
    """A NaN or an infinity in a channel spoils the moments of this channel."""
    x, weight, bias, like = inputs((2, 24, 136, 6, 8), BF16, layout)
    bias[3], bias[70] = torch.nan, torch.inf
    _, moments = run((x, weight, bias, like), tile, "relu", layout)
    spoiled = torch.tensor([3, 70])
    assert moments[:, spoiled].isnan().any(0).all()
    others = torch.ones(136, dtype=torch.bool)
    others[spoiled] = False
    assert moments[:, others].isfinite().all()
