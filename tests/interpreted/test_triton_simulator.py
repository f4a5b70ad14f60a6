"""The repaired interpreter itself: what Triton's own gets wrong is right, and planted bugs are caught."""

import pytest
import torch
import triton
import triton.language as tl
import triton_simulator
from compare import check_equal
from triton.runtime.errors import InterpreterError

triton_simulator.install()


@triton.jit
def product_kernel(a, b, y, PRECISION: tl.constexpr):
    i = tl.arange(0, 32)
    at = i[:, None] * 32 + i[None, :]
    c = tl.dot(tl.load(a + at), tl.load(b + at), input_precision=PRECISION)
    tl.store(y + at, c.to(y.dtype.element_ty))


@triton.jit
def copy_kernel(x, y, n, STEP: tl.constexpr, MASKED: tl.constexpr):
    i = tl.program_id(0) * STEP + tl.arange(0, 16)
    v = tl.load(x + i, mask=i < n, other=0) if MASKED else tl.load(x + i)
    tl.store(y + i, v, mask=i < n)


@triton.jit
def same_place_kernel(y):
    tl.store(y + tl.arange(0, 16) // 2, tl.arange(0, 16).to(tl.float32))


@triton.jit
def shift_kernel(y, n, BACK: tl.constexpr):
    """In place, from the neighbour that another program stores to: after it, or before it."""
    i = tl.program_id(0) * 16 + tl.arange(0, 16)
    v = tl.load(y + (n - 1 + i) % n) if BACK else tl.load(y + (i + 1) % n)
    tl.store(y + i, v)


@triton.jit
def sum_kernel(x, y):
    i = tl.arange(0, 16)
    tl.store(y + i, tl.load(x + i) + tl.load(x + i))


def test_bfloat16() -> None:
    a, b = torch.randn(2, 32, 32).bfloat16()
    y = torch.empty(32, 32, dtype=torch.bfloat16)
    product_kernel[(1,)](a, b, y, PRECISION="ieee")
    check_equal(y, (a.float() @ b.float()).bfloat16())
    x = torch.tensor([0.0, -0.0, torch.inf, -torch.inf, torch.nan, 1.00390625, 3.3895e38, 1e-40])
    got = torch.from_numpy(triton_simulator.to_bfloat16(x.numpy()).astype("int32")).to(torch.int16).view(torch.bfloat16)
    check_equal(got, x.bfloat16())
    with pytest.raises(InterpreterError, match="bfloat16 arithmetic"):
        sum_kernel[(1,)](a, y)


def test_tf32() -> None:
    a, b = torch.randn(2, 32, 32)
    strict, rounded = torch.empty(2, 32, 32)
    product_kernel[(1,)](a, b, strict, PRECISION="ieee")
    product_kernel[(1,)](a, b, rounded, PRECISION="tf32")
    wanted = a.double() @ b.double()
    assert (strict - wanted).abs().max() < 1e-5 < 1e-4 < (rounded - wanted).abs().max() < 2e-2


def test_out_of_bounds() -> None:
    """The tensors end, their storage goes on."""
    x, y = torch.randn(40)[:28], torch.zeros(40)[:28]
    copy_kernel[(2,)](x, y, 28, STEP=16, MASKED=True)
    check_equal(y, x)
    with pytest.raises(InterpreterError, match="load out of bounds: 4 of 16 addresses, the first 0 bytes past the end"):
        copy_kernel[(2,)](x, y, 28, STEP=16, MASKED=False)
    with pytest.raises(InterpreterError, match="store out of bounds"):
        copy_kernel[(2,)](x, y[:20], 28, STEP=16, MASKED=True)


def test_races() -> None:
    x, y = torch.randn(31), torch.zeros(31)
    with pytest.raises(InterpreterError, match=r"programs \(0, 0, 0\) and \(1, 0, 0\) store to one element"):
        copy_kernel[(2,)](x, y, 31, STEP=15, MASKED=True)
    with pytest.raises(InterpreterError, match="stores twice to one element"):
        same_place_kernel[(1,)](y)


@pytest.mark.parametrize("back", [True, False])
def test_loads_that_race_with_stores(back: bool) -> None:
    """Whichever comes first here; within one program, and between launches, there is an order."""
    y = torch.randn(32)
    with pytest.raises(triton_simulator.WrongAccess, match=r"load race: program \(\d, 0, 0\) loads an element that"):
        shift_kernel[(2,)](y, 32, BACK=back)
    for first in (0, 16):
        part = y[first : first + 16]
        wanted = part.roll(1 if back else -1)
        shift_kernel[(1,)](part, 16, BACK=back)
        check_equal(part, wanted)
