"""The CUDA kernels of training, executed on the CPU (tests/emulator), by the error rule against the references."""

import cases
import emulated
import emulated_training
import pytest
import torch
import training_cases as problems
from compare import check, check_equal
from torch import Tensor

from cmx_kernels.ops import batchnorm

pytestmark = emulated.needs(emulated.library)
F32, F16, BF16 = torch.float32, torch.float16, torch.bfloat16
ids = cases.name
SHAPES = (  # n, c, h, w, kh, kw
    (1, 1, 1, 1, 1, 1), (2, 3, 7, 7, 7, 7), (1, 33, 14, 14, 9, 9), (3, 5, 17, 19, 5, 5), (2, 2, 36, 35, 3, 3),
    (1, 9, 8, 8, 8, 8), (2, 7, 6, 3, 3, 5), (1, 3, 5, 40, 1, 7), (1, 2, 20, 23, 31, 31), (1, 9, 2, 2, 30, 30),
    (2, 5, 11, 37, 2, 6), (1, 3, 13, 16, 15, 17),
)  # fmt: skip


BACKWARD = [
    (kernel, dtype) for dtype in (F32, F16, BF16) for kernel in ("ffma", "mma") if (kernel, dtype) != ("mma", F32)
]


def run(args: tuple, kernel: str = "ffma", exact: bool = False, **options: object) -> tuple[Tensor, ...]:
    """exact: da and X are numbers of x's dtype, so that no kernel rounds them."""
    found = emulated_training.depthwise_backward(*args, kernel=kernel, **options)
    wanted = problems.expect_gradients(args, rounded=kernel == "mma" and not exact)
    for expected, out, what in zip(wanted, found, ("dx", "dweight", "dbias"), strict=False):
        if out.numel():
            check(out, expected, what)
    dx, x, affine, act = found[0], args[3], args[4], args[6]
    if dx.numel() and affine is not None:
        check(found[3], problems.expect_sums(dx, x, affine, act, rounded=kernel == "mma"), "sums")
    return found


def backward(shape: tuple[int, ...], dtype: torch.dtype, act: str = "gelu", affine: bool = True, **options) -> tuple:
    args = problems.depthwise_inputs(shape, dtype, act, affine)
    a = problems.expect_pre_activation(args).ref.to(dtype)
    return problems.backward_inputs(args, a, **options)


# ---- forward: the affine on load, and the moments


@pytest.mark.parametrize("act", cases.ACTS)
@pytest.mark.parametrize(("kernel", "dtype"), [("ffma", F32), ("ffma", F16), ("ffma", BF16)], ids=ids)
def test_forward(kernel: str, dtype: torch.dtype, act: str) -> None:
    for shape in SHAPES:
        x, affine, weight, bias, _ = args = problems.depthwise_inputs(shape, dtype, act)
        moments = torch.full((2, shape[1]), torch.nan)
        options = {"affine": affine, "in_act": act, "moments": moments, "order": sum(shape) % 6}
        a = emulated.depthwise(kernel, x, weight, bias, act=act, **options)
        check(a, problems.expect_pre_activation(args), f"{shape}")
        check(moments, problems.expect_moments(a, act), f"moments of {shape}")


@pytest.mark.parametrize("kernel", ("mma", "mma_plane", "mma_last"))
@pytest.mark.parametrize("dtype", (F16, BF16), ids=ids)
def test_forward_on_tensor_cores(dtype: torch.dtype, kernel: str) -> None:
    """Moments of what is stored, for any deal of the tiles to warps and any order of threads."""
    shapes = ((5, 2, 16, 16, 7, 7), (1, 2, 32, 32, 9, 9)) + ((3, 2, 9, 11, 5, 4), (2, 3, 40, 70, 3, 12)) * (
        kernel != "mma_plane"
    )
    if kernel == "mma_last":
        shapes += ((3, 37, 9, 11, 5, 4),)
    for shape in shapes:
        x, _, weight, bias, act = args = problems.depthwise_inputs(shape, dtype, affine=False)
        seen = []
        for order in emulated.ORDERS:
            moments = torch.full((2, shape[1]), torch.nan)
            a = emulated.depthwise(kernel, x, weight, bias, act=act, moments=moments, order=order)
            check(a, problems.expect_pre_activation(args), f"{shape}")
            check(moments, problems.expect_moments(a, act), f"moments of {shape}")
            seen.append(moments)
        for other in seen[1:]:
            check_equal(other, seen[0], "moments in another order of threads")


@pytest.mark.parametrize(("kernel", "dtype"), [("ffma", F32), ("mma", F16)], ids=ids)
def test_moments_of_a_large_mean(kernel: str, dtype: torch.dtype) -> None:
    """Mean 1e4 and deviation 1 (8 and 1/16 for float16, whose numbers near 1e4 are 8 apart)"""
    mean, deviation = (1e4, 1.0) if dtype == F32 else (64.0, 1.0)
    x = (problems.normal(9, 2, 33, 34) * deviation + mean).to(dtype)
    moments = torch.empty(2, 2)
    one = torch.ones(2, 1, 1, 1, dtype=dtype)
    a = emulated.depthwise(kernel, x, one, act="none", moments=moments, multiprocessors=3)
    check_equal(a, x)
    check(moments, problems.expect_moments(a, "none"))
    torch.testing.assert_close(moments[1].double(), x.double().var((0, 2, 3), correction=0), rtol=1e-5, atol=0)


# ---- backward


def shapes_of(kernel: str) -> tuple[tuple[int, ...], ...]:
    """The tensor cores have tiles of 32x32 and of two images of 16x16, a warp's up to 9x9, of a block above."""
    tiles = ((5, 2, 16, 16, 7, 7), (2, 2, 32, 32, 9, 9), (1, 2, 33, 70, 9, 8))
    large = ((5, 2, 16, 16, 13, 13), (2, 1, 32, 32, 31, 31), (1, 2, 40, 33, 21, 11), (1, 1, 35, 70, 10, 25))
    return SHAPES if kernel == "ffma" else (*SHAPES, *tiles, *large)


@pytest.mark.parametrize("affine", (True, False))
@pytest.mark.parametrize(("kernel", "dtype"), BACKWARD, ids=ids)
def test_backward(kernel: str, dtype: torch.dtype, affine: bool) -> None:
    for shape in shapes_of(kernel):
        args = backward(shape, dtype, affine=affine, residual=sum(shape) % 2 == 0)
        run(args, kernel, order=sum(shape) % 3)


@pytest.mark.parametrize("dtype", (F16, BF16), ids=ids)
def test_tensor_cores_round_inputs_only(dtype: torch.dtype) -> None:
    """Where da and X are what is stored, the rule is that of float32 sums, rounded once."""
    for shape in shapes_of("mma"):
        grad, a, k, x, _, *rest = backward(shape, dtype, "none", affine=False)
        run((grad, a, torch.eye(4, 1).repeat(1, k.shape[1]), x, None, *rest), "mma", exact=True)


@pytest.mark.parametrize("act", cases.ACTS)
@pytest.mark.parametrize(("kernel", "dtype"), BACKWARD, ids=ids)
def test_activations(kernel: str, dtype: torch.dtype, act: str) -> None:
    run(backward((2, 3, 9, 11, 5, 4), dtype, act), kernel)


@pytest.mark.parametrize("k", range(1, 32))
def test_every_kernel_size(k: int) -> None:
    for kernel in ((k, k), (k, 32 - k)):
        run(backward((1, 2, 11, 13, *kernel), F32))


def test_every_kernel_size_on_tensor_cores() -> None:
    small = [(kh, kw) for kh in range(1, 10) for kw in range(1, 10)]
    for kernel in (*small, *((k, k) for k in range(10, 32)), *((k, 32 - k) for k in range(1, 32))):
        run(backward((1, 2, 11, 13, *kernel), BF16), "mma")
    with pytest.raises(emulated.NoPlan):
        run(backward((1, 2, 11, 13, 3, 3), F32), "mma")


@pytest.mark.parametrize("need", ((True, False), (False, True), (False, False)))
@pytest.mark.parametrize(("kernel", "dtype"), (("ffma", F32), ("mma", BF16)), ids=ids)
@pytest.mark.parametrize(("k", "affine"), ((3, True), (11, True), (11, False)))
def test_what_is_not_needed(kernel: str, dtype: torch.dtype, need: tuple[bool, bool], k: int, affine: bool) -> None:
    args = backward((3, 5, 9, 11, k, k), dtype, affine=affine)
    found, everything = run((*args[:8], *need), kernel), run(args, kernel)
    for out, same, wanted in zip(found, everything, (need[0], need[1], need[1], need[0]), strict=True):
        if wanted:
            check_equal(out, same)
        else:
            assert not out.numel()


@pytest.mark.parametrize("kernel", ("ffma", "mma"))
def test_thread_orders(kernel: str) -> None:
    """Any thread order gives the same bits; several tiles a block."""
    for shape in ((7, 5, 35, 38, 7, 7), (3, 2, 13, 9, 4, 5), (19, 1, 16, 16, 9, 9), (7, 1, 16, 11, 13, 19)):
        args = backward(shape, BF16)
        first = run(args, kernel, multiprocessors=1)
        for order in (1, 2):
            for out, same in zip(run(args, kernel, order=order), first, strict=True):
                check_equal(out, same)


@pytest.mark.parametrize("multiprocessors", (1, 3, 132))
@pytest.mark.parametrize(("kernel", "dtype"), (("ffma", F32), ("mma", BF16)), ids=ids)
def test_splits(kernel: str, dtype: torch.dtype, multiprocessors: int) -> None:
    run(backward((23, 2, 9, 9, 3, 3), dtype), kernel, multiprocessors=multiprocessors)


@pytest.mark.parametrize(("kernel", "dtype"), (("ffma", F32), ("ffma", BF16), ("mma", BF16)), ids=ids)
@pytest.mark.parametrize("layout", ("channels_last", "sliced", "mixed"))
def test_layouts(layout: str, kernel: str, dtype: torch.dtype) -> None:
    """Reads nothing (NaN) around the views; every tensor may have strides of its own. The tensor cores want rows."""

    def last(t: Tensor) -> Tensor:
        return t.contiguous(memory_format=torch.channels_last)

    def sliced(t: Tensor) -> Tensor:
        memory = torch.full((t.shape[0] + 1, t.shape[1] + 2, *t.shape[2:]), torch.nan, dtype=t.dtype)
        return memory[1:, 1:-1].copy_(t)

    for shape in ((2, 35, 9, 18, 4, 3), (3, 3, 20, 12, 9, 9), (2, 2, 20, 12, 15, 11)):
        grad, a, k, x, *rest = backward(shape, dtype)
        first = run((grad, a, k, x, *rest), kernel)
        place = {
            "channels_last": (last,) * 3,
            "sliced": (sliced,) * 3,
            "mixed": (last, sliced, lambda t: t.mT.contiguous().mT),
        }
        grad, a, x = (f(t) for f, t in zip(place[layout], (grad, a, x), strict=True))
        out = place[layout][0](torch.empty_like(x)).fill_(torch.nan)
        if kernel == "mma" and layout != "sliced":
            with pytest.raises(emulated.NoPlan):
                run((grad, a, k, x, *rest), kernel, dx=out)
            continue
        found = run((grad, a, k, x, *rest), kernel, dx=out)
        check_equal(found[0], first[0])


@pytest.mark.parametrize("channels", (1, 5, 128, 300))
def test_batchnorm(channels: int) -> None:
    """The bits of the CPU's loop, and of the reference."""
    generator = torch.Generator().manual_seed(channels)
    moments, sums, vectors = (torch.rand(2, channels, generator=generator) - f for f in (0, 0.5, 0.5))
    for gamma, beta, count, fixed in ((None, None, 2, True), (*vectors, 1 << 20, False), (vectors[0], None, 77, False)):
        given = moments, gamma, beta, 1e-5, count
        found = emulated_training.batchnorm_rows(*given)
        back = sums, found[0], found[1], count, fixed
        both = (*found, *emulated_training.batchnorm_gradients(*back))
        for wanted in (
            (*torch.ops.cmx.batchnorm_rows(*given), *torch.ops.cmx.batchnorm_gradients(*back)),
            (*batchnorm._rows_reference(*given), *batchnorm._gradients_reference(*back)),
        ):
            for out, same in zip(both, wanted, strict=True):
                check_equal(out, same)
