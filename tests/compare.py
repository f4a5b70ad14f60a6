"""The error rule of every numerical test: |out - ref| <= 2 max|plain - ref| + eps, with ref in float64.

``ref`` and ``plain`` are the same formula in torch, on the same (already rounded) inputs, in float64 and in the dtype
the operator computes in. The operators promise float32 arithmetic and one rounding at the end, so for float16 and
bfloat16 ``plain`` is torch in float32: stricter than torch in x's dtype, which rounds after every step.

``eps`` is what a faultless kernel may lose beyond ``plain``, element by element:
    half an ulp of the output's dtype     the final rounding
    (sqrt(K) + 3) u M, u = 2^-24          sums of K products in float32, in any order (Higham and Mary 2019, doi
                                          10.1137/18M1226312, with lambda = 1), then activation, affine and residual;
                                          M, the ``magnitude``, is the formula on absolute values
    one smallest normal number            below it hardware may flush to zero
For a float64 output the reference is no better than the kernel, so eps counts twice.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor


class Expected(NamedTuple):
    """What an operator should return."""

    ref: Tensor  # float64
    plain: Tensor  # the same in plain torch, in the dtype the operator computes in
    magnitude: Tensor  # float64, at least the size of every number the element was summed from
    terms: int  # K, how many products one element sums
    dtype: torch.dtype


def ulp(x: Tensor, dtype: torch.dtype) -> Tensor:
    """The distance between neighbours of ``dtype`` at |x|, as float64."""
    info = torch.finfo(dtype)
    exponent = torch.frexp(x.abs().double().clamp_min(info.tiny)).exponent - 1
    return torch.ldexp(torch.full_like(x, info.eps, dtype=torch.float64), exponent)


def allowed_error(expected: Expected) -> Tensor:
    ref, plain, magnitude, terms, dtype = expected
    error_of_plain = (plain.double() - ref).abs().max() if ref.numel() else torch.zeros(())
    sums = (math.sqrt(terms) + 3) * torch.finfo(plain.dtype).eps / 2 * magnitude
    eps = ulp(ref, dtype) / 2 + sums + torch.finfo(dtype).tiny
    return 2 * error_of_plain + (2 * eps if dtype == torch.float64 else eps)


def check(out: Tensor, expected: Expected, what: str = "out") -> None:
    """Assert dtype, shape, finiteness and the error rule; on failure show the worst elements."""
    ref, plain, dtype = expected.ref, expected.plain, expected.dtype
    assert out.dtype == dtype, f"{what}: got {out.dtype}, wanted {dtype}"
    assert out.shape == ref.shape, f"{what}: got shape {list(out.shape)}, wanted {list(ref.shape)}"
    assert torch.isfinite(ref).all(), f"{what}: the expected values are not finite, use check_nonfinite"
    error = (out.double() - ref).abs()
    allowed = allowed_error(expected)
    bad = ~(error <= allowed)  # a NaN is bad
    assert not bad.any(), f"{what}: {report(out, ref, plain, error / allowed, bad, 'times what is allowed')}"


def check_nonfinite(out: Tensor, eager: Tensor, also: Tensor | None = None, what: str = "out") -> None:
    """Assert that inf, -inf and NaN are exactly where ``eager`` has them, or where ``also`` does if they disagree."""
    assert out.shape == eager.shape, f"{what}: got shape {list(out.shape)}, wanted {list(eager.shape)}"
    bad = _kind(out) != _kind(eager)
    if also is not None:
        bad &= _kind(out) != _kind(also)
    assert not bad.any(), f"{what}, finite or not: {report(out, eager, eager, bad.double(), bad)}"


def _kind(t: Tensor) -> Tensor:
    """0 finite, 1 inf, 2 -inf, 3 NaN"""
    return torch.isposinf(t) + 2 * torch.isneginf(t) + 3 * torch.isnan(t)


def check_equal(out: Tensor, wanted: Tensor, what: str = "out") -> None:
    """Assert bit equality (NaN equals NaN)."""
    assert (out.dtype, out.shape) == (wanted.dtype, wanted.shape), f"{what}: {out.dtype} {list(out.shape)}"
    bad = ~((out == wanted) | (out.isnan() & wanted.isnan()))
    difference = (out.double() - wanted.double()).abs()
    assert not bad.any(), f"{what} is not bit-equal: {report(out, wanted, wanted, difference, bad, 'off')}"


def report(out: Tensor, ref: Tensor, plain: Tensor, badness: Tensor, bad: Tensor, unit: str = "") -> str:
    """How many elements are wrong, where they lie, and the worst three."""
    badness = badness.nan_to_num(nan=torch.inf).where(bad, torch.zeros_like(badness))
    where = bad.nonzero()
    low, high = where.min(0).values.tolist(), where.max(0).values.tolist()
    lines = [f"{len(where)} of {bad.numel()} elements are wrong, all within {low} to {high} of shape {list(out.shape)}"]
    for flat in badness.flatten().topk(min(3, len(where))).indices.tolist():
        index = tuple(int(i) for i in torch.unravel_index(torch.tensor(flat), out.shape))
        values = f"out {out[index].item():.9g}  ref {ref[index].item():.9g}  plain {plain[index].item():.9g}"
        lines.append(f"  {list(index)}: {values}  " + (f"{badness[index].item():.3g} {unit}" if unit else ""))
    return "\n".join(lines)
