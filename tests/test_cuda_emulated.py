"""The CUDA kernels, executed on the CPU (tests/emulator), by the error rule of the operators against float64."""

import itertools

import cases
import emulated
import pytest
import torch
from compare import Expected, check, check_equal, ulp
from torch import Tensor

pytestmark = emulated.needs(emulated.library)
F32, F16, BF16 = torch.float32, torch.float16, torch.bfloat16
HALVES = (BF16, F16)
EVERY_KERNEL = [("ffma", F32), *((kernel, dtype) for kernel in ("ffma", "mma", "mma_last") for dtype in HALVES)]
PLANE_KERNEL = [("mma_plane", F16), ("mma_plane", BF16)]
PLANES = [(n, 3, size, size, k, k) for n, size in ((1, 32), (5, 32), (1, 16), (5, 16)) for k in (7, 9)]
VECTORS = (F32, F32, F32)
ids = cases.name


def problem(
    shape: tuple[int, ...], dtype: torch.dtype, act: str = "gelu", residual: bool = True
) -> tuple[tuple, Expected]:
    args = cases.inputs("depthwise_block", shape, dtype, act, VECTORS, residual)
    return args, cases.expect("depthwise_block", args)


def run(kernel: str, args: tuple, **options: object) -> Tensor:
    try:
        return emulated.depthwise(kernel, *args, **options)
    except emulated.NoPlan:
        pytest.fail(f"{kernel} refuses {list(args[0].shape)}")


@pytest.mark.parametrize("shape", [s for s in cases.DEPTHWISE if s[0]], ids=ids)
@pytest.mark.parametrize(("kernel", "dtype"), EVERY_KERNEL, ids=ids)
def test_shapes(kernel: str, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    if kernel == "mma_last" and shape[1] == 1:
        pytest.skip("one channel is planes")
    args, expected = problem(shape, dtype)
    check(run(kernel, args, order=sum(shape) % 6), expected)


@pytest.mark.parametrize("shape", PLANES, ids=ids)
@pytest.mark.parametrize("dtype", HALVES, ids=ids)
def test_planes(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    args, expected = problem(shape, dtype)
    for order in emulated.ORDERS:
        check(run("mma_plane", args, order=order), expected, f"order {order}")


@pytest.mark.parametrize(("kernel", "dtype"), EVERY_KERNEL, ids=ids)
def test_thread_orders(kernel: str, dtype: torch.dtype) -> None:
    """Any thread order and any arrival of the copies give the same bits; more tiles a warp than stages."""
    for shape in ((3, 2, 35, 38, 7, 7), (7, 2, 13, 9, 4, 5), (2, 3, 40, 33, 11, 19)):
        args, expected = problem(shape, dtype)
        first = run(kernel, args)
        check(first, expected, f"{shape}")
        for order in emulated.ORDERS:
            check_equal(run(kernel, args, order=order), first, f"{shape}, order {order}")


@pytest.mark.parametrize("k", range(1, 32))
@pytest.mark.parametrize(("kernel", "dtype"), EVERY_KERNEL, ids=ids)
def test_every_kernel_size(kernel: str, dtype: torch.dtype, k: int) -> None:
    for kh, kw in ((k, k), (k, 32 - k)):
        args, expected = problem((1, 2, 11, 20, kh, kw), dtype)
        check(run(kernel, args), expected, f"{kh}x{kw}")


@pytest.mark.parametrize("width", range(1, 42))
@pytest.mark.parametrize(("kernel", "dtype"), EVERY_KERNEL, ids=ids)
def test_every_width(kernel: str, dtype: torch.dtype, width: int) -> None:
    """Global accesses of 16, 8, 4 and 2 bytes, edges of tiles, and both sizes of tile."""
    for height in (6, 19):
        args, expected = problem((1, 2, height, width, 5, 5), dtype)
        check(run(kernel, args), expected, f"{height}x{width}")


@pytest.mark.parametrize("residual", (True, False))
@pytest.mark.parametrize("act", cases.ACTS)
@pytest.mark.parametrize(("kernel", "dtype"), [*EVERY_KERNEL, *PLANE_KERNEL], ids=ids)
def test_activations(kernel: str, dtype: torch.dtype, act: str, residual: bool) -> None:
    for shape in [(2, 3, 16, 16, 7, 7), (2, 3, 32, 32, 9, 9)] + [(2, 3, 9, 11, 5, 4)] * (kernel != "mma_plane"):
        args, expected = problem(shape, dtype, act, residual)
        check(run(kernel, args), expected, f"{shape}")


@pytest.mark.parametrize(("kernel", "dtype"), [*EVERY_KERNEL, *PLANE_KERNEL], ids=ids)
def test_integers_are_exact(kernel: str, dtype: torch.dtype) -> None:
    for n, h, w, kh, kw in ((2, 32, 32, 9, 9), (3, 16, 16, 7, 7)) + ((1, 19, 23, 8, 3),) * (kernel != "mma_plane"):
        x, weight = torch.randint(-3, 4, (n, 2, h, w)).to(dtype), torch.randint(-2, 3, (2, 1, kh, kw)).to(dtype)
        bias, scale, shift = (torch.randint(-9, 9, (2,)).float() for _ in range(3))
        args = (x, weight, bias, scale / 4, shift, "relu", True)
        check_equal(run(kernel, args), cases.formula(torch.float64, "depthwise_block", *args).to(dtype))


@pytest.mark.parametrize(("kernel", "dtype"), [*EVERY_KERNEL, *PLANE_KERNEL], ids=ids)
def test_affine_on_load(kernel: str, dtype: torch.dtype) -> None:
    """Rounded by the tensor cores; the padding stays zero; the residual is the same."""
    for shape in [(2, 3, 16, 16, 7, 7), (1, 3, 32, 32, 9, 9)] + [(2, 3, 9, 11, 5, 4), (1, 2, 36, 35, 3, 12)] * (
        kernel != "mma_plane"
    ):
        x, *rest = cases.inputs("depthwise_block", shape, dtype, "gelu", VECTORS)
        for act in ("none", "gelu"):
            rows = torch.randn(3, shape[1])
            mean, scale, shift = (r[:, None, None].double() for r in rows)
            seen = (cases._act(act, x.double()) - mean) * scale + shift
            rounded = seen.to(dtype) if kernel != "ffma" else seen
            out = run(kernel, (x, *rest), affine=rows, in_act=act)
            wide = [r.double() if isinstance(r, Tensor) else r for r in rest]
            expected = cases.expect("depthwise_block", (rounded, *wide))
            plain = cases.formula(F32, "depthwise_block", rounded, *rest)
            slack = 2**-22 if kernel == "ffma" else torch.finfo(dtype).eps * 2  # x' itself may round the other way
            size = expected.magnitude + slack / 2**-24 * seen.abs().max()
            check(out, expected._replace(plain=plain, magnitude=size, dtype=dtype), f"{shape}")


def surrounded(t: Tensor, value: float) -> Tensor:
    """The same numbers with free strides for N and C, inside memory full of `value`."""
    n, c, h, w = t.shape
    memory = torch.full((n + 1, c + 2, h, w), value, dtype=t.dtype)
    view = memory[1:, 1:-1]
    return view.copy_(t)


@pytest.mark.parametrize("layout", ("sliced", "channels_last", "misaligned", "transposed"))
@pytest.mark.parametrize(
    ("kernel", "dtype"), [*(k for k in EVERY_KERNEL if k[0] != "mma_last"), ("mma_plane", BF16)], ids=ids
)
def test_layouts(kernel: str, dtype: torch.dtype, layout: str) -> None:
    """Reads nothing (NaN) and writes nothing (7) around the views."""
    if kernel != "ffma" and layout in ("channels_last", "transposed"):
        pytest.skip("rows are not contiguous")
    if kernel == "mma_plane" and layout == "misaligned":
        pytest.skip("mma_plane takes aligned planes")
    shapes = [(2, 5, 17, 20, 7, 7), (3, 35, 9, 18, 4, 3)] if kernel != "mma_plane" else [(3, 2, 16, 16, 9, 9)]
    for shape in shapes:
        (x, *rest), expected = problem(shape, dtype)
        place = {
            "sliced": surrounded,
            "channels_last": lambda t, value: surrounded(t, value).contiguous(memory_format=torch.channels_last),
            "misaligned": lambda t, value: (
                torch.full((t.numel() + 2,), value, dtype=t.dtype)[1:-1].view(t.shape).copy_(t)
            ),
            "transposed": lambda t, value: surrounded(t.mT, value).mT,
        }[layout]
        out = place(torch.full_like(x, torch.nan), 7.0)
        check(run(kernel, (place(x, torch.nan), *rest), out=out), expected)
        if layout == "sliced":
            memory = out._base
            assert (memory[0] == 7).all()
            assert (memory[:, 0] == 7).all()
            assert (memory[:, -1] == 7).all()


def surrounded_last(t: Tensor, value: float, around: int) -> Tensor:
    """channels_last with free strides for every dimension but C, inside memory full of `value`."""
    n, c, h, w = t.shape
    memory = torch.full((n + 1, h + 2, w + 2, c + 2 * around), value, dtype=t.dtype)
    return memory[1:, 1:-1, 1:-1, around : around + c].permute(0, 3, 1, 2).copy_(t)


@pytest.mark.parametrize("around", (0, 1, 2, 4, 8))
def test_channels_last(around: int) -> None:
    """Every size of access, blocks of 2 to 16 channels, groups that are not full; nothing around is touched."""
    for c, h, w, kh, kw in (
        *((c, 9, 11, 5, 4) for c in (2, 3, 4, 6, 8, 12, 16, 17, 20, 40)),
        *((24, 17, 34, k, k) for k in (7, 13, 31)),
    ):
        (x, *rest), expected = problem((3, c, h, w, kh, kw), BF16)
        out = surrounded_last(torch.full_like(x, torch.nan), 7.0, around)
        check(run("mma_last", (surrounded_last(x, torch.nan, around), *rest), out=out), expected, f"{c} channels")
        memory = out._base.clone()
        memory[1:, 1:-1, 1:-1, around : around + c] = 7
        assert (memory == 7).all(), f"{c} channels"


@pytest.mark.parametrize(("around", "most"), ((0, 0.1), (4, 0), (2, 0), (1, 1)))
def test_bank_conflicts_of_channels_last(around: int, most: float) -> None:
    """Of pieces of 16, 8, 4 and 2 bytes, on their way to the planes and back: extra cycles for an access."""
    (x, *rest), _ = problem((1, 16, 32, 32, 7, 7), BF16)
    view, out = surrounded_last(x, 0, around), surrounded_last(x, 0, around)
    load, _, store, *_ = emulated.bank_use(lambda: run("mma_last", (view, *rest), out=out))
    for accesses, conflicts in (load, store):
        assert accesses >= 256
        assert conflicts <= most * accesses


def test_what_mma_last_refuses() -> None:
    args, _ = problem((2, 3, 9, 11, 5, 4), BF16)
    with pytest.raises(emulated.NoPlan):
        emulated.depthwise("mma_last", *args, out=torch.empty_like(args[0]))
    args, _ = problem((2, 3, 9, 11, 5, 4), F32)
    with pytest.raises(emulated.NoPlan):
        emulated.depthwise("mma_last", *args)


def test_nonfinite_values_stay_in_their_channel() -> None:
    x, *rest = problem((2, 20, 17, 18, 7, 7), BF16)[0]
    first = run("mma_last", (x, *rest))
    x[:, 11] = torch.nan
    out = run("mma_last", (x, *rest))
    assert out[:, 11].isnan().all()
    assert torch.equal(out[:, torch.arange(20) != 11], first[:, torch.arange(20) != 11])


@pytest.mark.parametrize("multiprocessors", (1, 3, 132))
def test_splits(multiprocessors: int) -> None:
    """Every way the tiles of a channel are dealt to blocks and warps."""
    for kernel, shape in (
        ("mma_plane", (23, 2, 16, 16, 7, 7)),
        ("mma", (9, 1, 33, 5, 3, 3)),
        ("mma_last", (9, 40, 33, 5, 3, 3)),
        ("ffma", (3, 2, 9, 9, 3, 3)),
        ("ffma", (3, 300, 5, 8, 3, 3)),  # five groups of channels
    ):
        for dtype in (BF16, F32) if kernel == "ffma" else (BF16,):
            args, expected = problem(shape, dtype)
            check(run(kernel, args, multiprocessors=multiprocessors), expected, kernel)


SPECIAL = (torch.inf, -torch.inf, torch.nan)


@pytest.mark.parametrize("act", cases.ACTS)
@pytest.mark.parametrize(
    ("kernel", "shape"),
    [("ffma", (1, 1, 40, 70, k, k)) for k in (5, 7, 12)]
    + [("mma", (1, 1, 40, 70, k, k)) for k in (5, 8, 13, 20, 31)]
    + [("mma_last", (1, 2, 40, 70, k, k)) for k in (5, 13, 31)]
    + [("mma_plane", (1, 1, 32, 32, k, k)) for k in (7, 9)],
    ids=ids,
)
def test_nonfinite(kernel: str, shape: tuple[int, ...], act: str) -> None:
    """A non-finite input spoils every output the formula spoils; how far beyond is what the documentation says."""
    kw = shape[5]
    for value in SPECIAL:
        x, *rest = cases.inputs("depthwise_block", shape, BF16, act, VECTORS)
        row, column = shape[2] // 2, shape[3] // 2 + 1
        x[..., row, column] = value
        out = run(kernel, (x, *rest))
        eager = cases.formula(torch.float64, "depthwise_block", x, *rest).to(BF16)
        assert not (out.isfinite() & ~eager.isfinite()).any(), f"{value}: finite where the formula is not"
        reach = (out.isfinite() == 0).nonzero()
        columns, rows = (reach[:, 3] - column).abs().max(), (reach[:, 2] - row).abs().max()
        window = max(2, (kw + 14) // 8)
        assert rows <= shape[4] // 2 + (kernel in ("mma", "mma_last"))
        assert columns <= (kw // 2 if kernel == "ffma" else 4 * (window - 1) + 7)


def test_ffma_is_exact_for_nonfinite_values() -> None:
    for act, value in itertools.product(cases.ACTS, SPECIAL):
        for k in (4, 7):
            x, *rest = cases.inputs("depthwise_block", (1, 1, 20, 23, k, k), F32, act, VECTORS)
            x[..., 9, 11] = value
            out, eager = run("ffma", (x, *rest)), cases.formula(torch.float64, "depthwise_block", x, *rest)
            assert torch.equal(out.isnan(), eager.isnan())
            assert torch.equal(out.isinf(), eager.isinf())


def test_gelu_of_every_16_bit_number() -> None:
    """Below half an ulp of error before the rounding: the neighbour at most, and rarely."""
    for dtype, kernel in itertools.product(HALVES, ("ffma", "mma")):
        bits = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16)
        x = bits.view(dtype)
        x = x[x.isfinite()]
        x = torch.nn.functional.pad(x, (0, -x.numel() % 256)).view(1, -1, 16, 16)
        one = torch.ones(x.shape[1], 1, 1, 1, dtype=dtype)
        out = run(kernel, (x, one, None, None, None, "gelu", False)).double()
        exact = cases.formula(torch.float64, "depthwise_block", x, one, None, None, None, "gelu", False)
        rounded = exact.to(dtype).double()
        off = (out - rounded).abs() / ulp(rounded, dtype)
        kept = (x.flatten()[None] >= -5) & (rounded.abs().flatten()[None] >= torch.finfo(dtype).tiny)
        off = off.flatten()[kept.flatten()]
        assert off.max() <= 1
        assert (off > 0).double().mean() < 0.01


def test_shared_memory_is_never_taken_back() -> None:
    """A launch that needs less than the one before leaves what that was allowed: another thread may want it."""
    for images in (8, 6):  # more than 48 KB for 4 warps, and for 3
        args, expected = problem((images, 1, 16, 16, 31, 31), BF16)
        check(run("mma", args), expected, f"{images} images")
