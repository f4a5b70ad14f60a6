"""AMX tiles: depthwise convolutions of bfloat16 (bands of every width, cells at every edge), float32 as three bfloat16,
infinities and NaN."""

from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F
from compare import check_equal, check_nonfinite
from conftest import LEVELS, at_level
from torch import Tensor

from cmx_kernels import backends, ops, registry
from cmx_kernels.ops import block_stack as stack

BF16, F32 = torch.bfloat16, torch.float32
NONE3 = (None, None, None)
# a band of one packed vector and of two; windows of 16, 32 and 64 columns; even, tall and wide
KERNELS = ((1, 1), (3, 3), (2, 8), (9, 9), (4, 10), (10, 4), (14, 14), (5, 15), (25, 25), (3, 26), (31, 31), (31, 1))
PLANES = ((1, 1), (7, 7), (5, 16), (16, 32), (33, 17))

pytestmark = pytest.mark.skipif(
    "amx" not in LEVELS, reason=f"no AMX on this processor, or not compiled: {', '.join(LEVELS) or registry.WHY_NO_C}"
)


@pytest.fixture(autouse=True)
def tiles() -> Iterator[None]:
    yield from at_level("amx")


def _convolved(x: Tensor, weight: Tensor, dtype: torch.dtype) -> Tensor:
    kh, kw = weight.shape[2:]
    padded = F.pad(x.to(dtype), ((kw - 1) // 2, kw // 2, (kh - 1) // 2, kh // 2))
    return F.conv2d(padded, weight.to(dtype), groups=x.shape[1])


def _fused(x: Tensor, weight: Tensor, residual: bool = False) -> Tensor:
    with backends.use("cpu"):
        return ops.depthwise_block(x, weight, *NONE3, "none", residual)


@pytest.mark.parametrize("plane", PLANES, ids=str)
@pytest.mark.parametrize("kernel", KERNELS, ids=str)
def test_every_tap_of_every_column(kernel: tuple[int, int], plane: tuple[int, int]) -> None:
    """Small integers, whose sums bfloat16 keeps where they are below 256: any tap at a wrong place shows."""
    x = torch.randint(0, 2, (2, 5, *plane)).to(BF16)
    weight = torch.randint(-2, 3, (5, 1, *kernel)).to(BF16)
    for layout in (torch.contiguous_format, torch.channels_last):
        for residual in (False, True):
            exact = _convolved(x, weight, torch.float64) + (x.double() if residual else 0)
            check_equal(_fused(x.contiguous(memory_format=layout), weight, residual), exact.to(BF16))


@pytest.mark.parametrize("value", (torch.inf, -torch.inf, torch.nan), ids=str)
@pytest.mark.parametrize("kernel", ((9, 9), (3, 12), (31, 31)), ids=str)
def test_what_is_not_finite_spoils_only_its_taps(kernel: tuple[int, int], value: float) -> None:
    """A band's zeros would make NaN of it along the row; nothing else changes by a bit."""
    x, weight = torch.randn(1, 5, 37, 39).to(BF16), torch.randn(5, 1, *kernel).to(BF16)
    weight[0, 0, 0, 0] = 0  # times an infinity: NaN, as in eager
    clean = x.clone()
    for c, y, at in ((0, 0, 0), (0, 20, 17), (3, 36, 38), (4, 18, 8)):
        x[0, c, y, at], clean[0, c, y, at] = value, 0
    out, eager = _fused(x, weight), _convolved(x, weight, torch.float32)
    check_nonfinite(out, eager)
    finite = torch.isfinite(eager)
    assert 0 < finite.sum() < finite.numel()
    check_equal(out[finite], _fused(clean, weight)[finite])


def test_nothing_but_nan() -> None:
    """As a model that has diverged: right, and no slower than a second."""
    x = torch.full((1, 2, 96, 96), torch.nan).to(BF16)
    assert _fused(x, torch.randn(2, 1, 31, 31).to(BF16)).isnan().all()


@pytest.mark.parametrize("layout", (torch.contiguous_format, torch.channels_last), ids=str)
def test_a_last_band_of_fewer_tiles(layout: torch.memory_format) -> None:
    """Its channels come in larger groups, which take more memory than those of the bands before it."""
    x, weight = (
        torch.randn(1, 16, 18, 32).to(BF16).contiguous(memory_format=layout),
        torch.randn(16, 1, 31, 31).to(BF16),
    )
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(2)  # bands of 10 rows and of 8: two tiles and one
        found = [_fused(x, weight) for _ in range(20)]
    finally:
        torch.set_num_threads(threads)
    exact = _convolved(x, weight, torch.float64)
    assert all(float((out.double() - exact).abs().max() / exact.abs().max()) < 2**-8 for out in found)


def test_what_is_not_finite_is_added_to_itself_alone() -> None:
    x, weight = torch.ones(1, 3, 8, 8).to(BF16), torch.zeros(3, 1, 1, 1).to(BF16)
    x[0, 1, 2, 3] = torch.inf
    out = _fused(x, weight, residual=True)
    assert out[0, 1, 2, 3].isnan()  # 0 * inf
    out[0, 1, 2, 3] = 1
    check_equal(out, torch.ones_like(out))


def _conv(*size: int) -> stack.ConvParams:
    return stack.ConvParams(torch.randn(size) / size[1] ** 0.5, torch.randn(size[0]), None, None)


def _in_any_bands(x: Tensor, packed: stack.PackedStack) -> Tensor:
    """What a stack makes of x, which must not depend by a bit on the threads, who choose the rows of a band."""
    threads, found = torch.get_num_threads(), []
    try:
        for count in (1, 2, 3, 7):
            torch.set_num_threads(count)
            found.append(stack.block_stack(x, packed))
    finally:
        torch.set_num_threads(threads)
    for other in found[1:]:
        check_equal(other, found[0])
    return found[0]


@pytest.mark.parametrize("planted", (False, True))
@pytest.mark.parametrize("size", ((1, 40, 35, 22), (3, 40, 9, 14), (1, 72, 161, 130)), ids=str)
def test_a_stack_gives_the_same_in_any_bands(size: tuple[int, int, int, int], planted: bool) -> None:
    """Threads choose the rows of a band, and who multiplies which pixels by which channels: several images in a band,
    one in several bands. An infinity in one of them does not change another by a bit."""
    torch.manual_seed(1)
    c = size[1]
    blocks = [(_conv(c, 1, 9, 9), _conv(c, c, 1, 1)) for _ in range(2)]
    x = torch.randn(size).to(BF16)
    if planted:
        x[0, 7, size[2] // 2, 11] = torch.inf
    assert torch.isfinite(_in_any_bands(x, stack.pack(None, blocks, "relu", BF16))).all() != planted


# ---- float32 as the sum of three bfloat16


def _product(x: Tensor, weight: Tensor) -> Tensor:
    """[pixels, c_in] x [c_out, c_in] -> [pixels, c_out]"""
    with backends.use("cpu"):
        return ops.pointwise_block(x.T[None, :, None], weight[..., None, None], *NONE3, "none")[0, :, 0].T


def _eager(x: Tensor, weight: Tensor) -> Tensor:
    return F.conv2d(x.T[None, :, None], weight[..., None, None])[0, :, 0].T


# blocks of one tile and of two either way, channels beyond a tile, sums in more than one run
@pytest.mark.parametrize("size", ((1, 5, 3), (16, 32, 16), (17, 33, 33), (49, 96, 80), (64, 1100, 48)), ids=str)
def test_every_one_of_six_products(size: tuple[int, int, int]) -> None:
    """Numbers of 24 bits against powers of two come out as they are, and so do sums of 12 bits against 12."""
    pixels, c_in, c_out = size
    for x, weight in (
        (torch.randn(pixels, c_in), torch.eye(c_out, c_in) * 2.0 ** torch.arange(c_out)[:, None].remainder(7)),
        (torch.eye(pixels, c_in) * -0.5, torch.randn(c_out, c_in)),
        (torch.randint(-4095, 4096, (pixels, c_in)).float(), torch.eye(c_out, c_in).flip(1) * 4093),
    ):
        check_equal(_product(x, weight), (x.double() @ weight.double().T).float())


@pytest.mark.parametrize("c_in", (64, 768, 1536, 5000))
def test_float32_is_as_exact_as_eager(c_in: int) -> None:
    """Root of the mean squared error, of random numbers and where nothing cancels."""
    for sign in (False, True):
        x, weight = torch.randn(96, c_in), torch.randn(64, c_in)
        if sign:
            x, weight = x.abs(), weight.abs()
        exact = x.double() @ weight.double().T
        eager = _eager(x, weight)
        error = lambda y: float((y - exact).square().mean().sqrt())  # noqa: E731, B023
        assert error(_product(x, weight)) <= 1.5 * error(eager)


def test_the_ends_of_the_range() -> None:
    """The largest number is no infinity, rounded to bfloat16; what a tile takes for zero is below 2^-126."""
    largest = torch.finfo(F32).max
    x = torch.tensor([[largest, 0.0], [-largest, 1.0], [1e-30, 0.0], [2.0**-120, 0.0]])
    weight = torch.tensor([[0.5, 1.0], [-0.25, 0.0]])
    exact = x.double() @ weight.double().T
    torch.testing.assert_close(_product(x, weight).double(), exact, rtol=2**-23, atol=2**-126)


@pytest.mark.parametrize("value", (torch.inf, -torch.inf, torch.nan), ids=str)
def test_float32_that_is_not_finite(value: float) -> None:
    """As in eager, of pixels and of weights, and no other result changes by a bit."""
    x, weight = torch.randn(50, 70), torch.randn(40, 70)
    weight[3] = 0
    weight[5, 1] = 2.0  # no second or third piece
    wanted = _product(x, weight)
    for where in ("x", "weight"):
        a, b = x.clone(), weight.clone()
        (a if where == "x" else b)[33, 1] = value
        out = _product(a, b)
        eager = _eager(a, b)
        check_nonfinite(out, eager)
        finite = torch.isfinite(eager)
        assert 0 < finite.sum() < finite.numel()
        check_equal(out[finite], wanted[finite])


@pytest.mark.parametrize("channels", (16, 40, 64))
def test_a_float32_stack_gives_the_same_in_any_bands(channels: int) -> None:
    """Channels of half a tile, of a ragged one, of whole ones."""
    blocks = [(_conv(channels, 1, 5, 5), _conv(channels, channels, 1, 1)) for _ in range(2)]
    x = torch.randn(2, channels, 13, 11)
    assert torch.isfinite(_in_any_bands(x, stack.pack(None, blocks, "gelu", F32))).all()
