"""GELU of the CUDA kernels before it is rounded: every 16-bit number, and float32 against the formula with erf."""

import ctypes

import ahead
import emulated
import pytest
import torch
from compare import ulp
from torch import Tensor

F32, F64 = torch.float32, torch.float64
AT_ONCE = 32 * 64  # numbers of a launch


@ahead.once
def library() -> ctypes.CDLL:
    return ctypes.CDLL(str(emulated.build("library", "tests/emulator/activations.cu")))


pytestmark = emulated.needs(library)


def emulated_gelu(x: Tensor, dtype: torch.dtype) -> Tensor:
    """float32, before a rounding to dtype."""
    found = []
    for numbers in torch.nn.functional.pad(x.to(F32), (0, -x.numel() % AT_ONCE)).view(-1, AT_ONCE):
        memory = torch.cat([numbers, torch.full((AT_ONCE,), torch.nan)])
        assert library().cmx_gelu(ctypes.c_void_p(memory.data_ptr()), dtype.itemsize) == 0
        found.append(memory[AT_ONCE:])
    return torch.cat(found)[: x.numel()]


def gelu(x: Tensor) -> Tensor:
    """In float64, also where 1 + erf cancels."""
    return x.double() * torch.special.erfc(-x.double() * 0.5**0.5) / 2


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16), ids=str)
def test_every_16_bit_number(dtype: torch.dtype) -> None:
    """Off by less than half an ulp; where Phi(x) is too small for float32, the result is less than this."""
    x = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
    x = x[x.isfinite()]
    assert x.numel() == 2**16 - 2 ** (16 - (8 if dtype == torch.bfloat16 else 5))
    exact = gelu(x)
    off = (emulated_gelu(x, dtype).double() - exact).abs()
    least = 16 * torch.finfo(F32).tiny
    normal = exact.abs() >= least
    assert (off / ulp(exact, dtype))[normal].max() < 0.5
    assert off[~normal].max() < least


def test_float32() -> None:
    """No further off than torch's own, anywhere; for x >= -1 by less than 3 ulp, and to -5.6 by a hundredth."""
    bits = torch.arange(0, 2**31 - 2**23, 4001, dtype=torch.int64).to(torch.int32).view(F32)
    x = torch.cat([bits, -bits, torch.linspace(-6, 6, 100_001)])
    exact, out, plain = gelu(x), emulated_gelu(x, F32).double(), torch.nn.functional.gelu(x).double()
    off = (out - exact).abs()
    for low, high in ((-40, -6), (-6, -3), (-3, -1), (-1, 0), (0, 1), (1, 3), (3, 6), (6, 40)):
        here = (x >= low) & (x < high)
        assert off[here].max() <= 1.1 * (plain - exact)[here].abs().max(), f"{low} to {high}"
    assert (off / ulp(exact, F32))[(x >= -1) & (exact.abs() >= torch.finfo(F32).tiny)].max() < 3
    assert (off / exact.abs())[(x >= -5.6) & (x < -1)].max() < 0.01
    assert torch.equal(out[x > 6], x[x > 6].double())


def test_special_values() -> None:
    x = torch.tensor([torch.inf, -torch.inf, torch.nan, 0.0, -0.0])
    for dtype in (F32, torch.bfloat16):
        out = emulated_gelu(x, dtype)
        assert out[0] == torch.inf
        assert out[1:3].isnan().all()
        assert (out[3:] == 0).all()
