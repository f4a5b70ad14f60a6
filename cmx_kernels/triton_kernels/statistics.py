"""Sums over pixels for training, in two stages and a fixed order, without atomics.

A program of the first stage writes its part to partials [rows, parts]. The second stage adds the parts in float64:

    sums       out[row] = sum of the parts
    moments    parts (count, mean, m2 = sum of squared deviations) of a channel, rows [3, C]:
               mean = sum(count_i mean_i) / n    var = sum(m2_i + count_i (mean_i - mean)^2) / n     (Chan et al. 1983)

Deviations are from a mean that is near, never sums of squares: a mean of 1e4 beside a deviation of 1 comes out right.
"""

import triton
import triton.language as tl
from torch import Tensor

from cmx_kernels.triton_kernels import launch
from cmx_kernels.triton_kernels.activation import activate, per_channel
from cmx_kernels.triton_kernels.launch import wrap_triton


@triton.jit
def slope(v, ACT: tl.constexpr):
    """act'(v) for float32 v, as torch defines it"""
    if ACT == "relu":
        v = tl.where(v > 0, 1.0, 0.0)
    if ACT == "gelu":  # Phi(v) + v phi(v)
        v = 0.5 * (1 + tl.erf(v * 0.7071067811865476)) + v * (0.3989422804014327 * tl.exp(-0.5 * v * v))
    if ACT == "gelu_tanh":  # s + 2 v s (1 - s) u', s = 1 / (1 + 2^(-2u log2 e)), u as in activate
        s = 1 / (1 + tl.exp2(v * (-0.10294324 * v * v - 2.3022082)))
        v = s + v * s * (1 - s) * (1.5957691216057308 + 0.2140644488 * v * v)
    if ACT == "none":
        v = tl.full(v.shape, 1.0, tl.float32)
    return v


@triton.jit
def value(v, rows, channels, c, inside, ACT: tl.constexpr):
    """X = (act(v) - mean) * scale + shift of v [C, P] in float32; rows [3, C], or None: v as it is"""
    if rows is not None:
        v = activate(v, ACT, False) - per_channel(rows, 1, c, inside)
        v = v * per_channel(rows + channels, 1, c, inside) + per_channel(rows + 2 * channels, 1, c, inside)
    return v


@triton.jit
def store_moments(partials, part, parts, channels, c, inside, count, mean, m2):
    """count, mean, m2 [C] of this program"""
    at = partials + c * parts + part
    tl.store(at, count, mask=inside)
    tl.store(at + channels * parts, mean, mask=inside)
    tl.store(at + 2 * channels * parts, m2, mask=inside)


@triton.jit
def moments_final_kernel(partials, moments, channels, parts, PARTS: tl.constexpr):
    """moments [2, C]: mean and biased variance of one channel a program"""
    c = tl.program_id(0).to(tl.int64)
    at = partials + c * parts
    further = tl.cast(channels, tl.int64) * parts  # not channels.to: 1 is a constant of the compiler
    count, total, squares = tl.zeros([PARTS], tl.float64), tl.zeros([PARTS], tl.float64), tl.zeros([PARTS], tl.float64)
    for first in range(0, parts, PARTS):
        i = first + tl.arange(0, PARTS)
        n = tl.load(at + i, mask=i < parts, other=0).to(tl.float64)
        count += n
        total += n * tl.load(at + further + i, mask=i < parts, other=0).to(tl.float64)
    values = tl.sum(count, 0)
    mean = tl.sum(total, 0) / values
    for first in range(0, parts, PARTS):
        i = first + tl.arange(0, PARTS)
        n = tl.load(at + i, mask=i < parts, other=0).to(tl.float64)
        off = tl.load(at + further + i, mask=i < parts, other=0).to(tl.float64) - mean
        squares += tl.load(at + 2 * further + i, mask=i < parts, other=0).to(tl.float64) + n * off * off
    tl.store(moments + c, mean.to(tl.float32))
    tl.store(moments + channels + c, (tl.sum(squares, 0) / values).to(tl.float32))


@triton.jit
def sums_final_kernel(partials, out, count, parts, ROWS: tl.constexpr, PARTS: tl.constexpr):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    sums = tl.zeros([ROWS, PARTS], tl.float64)
    for first in range(0, parts, PARTS):
        i = first + tl.arange(0, PARTS)
        inside = (row < count)[:, None] & (i < parts)[None, :]
        sums += tl.load(partials + row[:, None] * parts + i[None, :], mask=inside, other=0).to(tl.float64)
    tl.store(out + row, tl.sum(sums, 1).to(tl.float32), mask=row < count)


def finish_moments(partials: Tensor, moments: Tensor) -> None:
    """partials [3, C, parts] -> moments [2, C]"""
    _, channels, parts = partials.shape
    wrap_triton(moments_final_kernel)[(channels,)](partials, moments, channels, parts, PARTS=128, num_warps=1)


def finish_sums(partials: Tensor, out: Tensor) -> None:
    """partials [..., parts] -> out, as many numbers as there are rows of parts"""
    count, parts = out.numel(), partials.shape[-1]
    wrap_triton(sums_final_kernel)[(launch.cdiv(count, 16),)](
        partials, out, count, parts, ROWS=16, PARTS=32, num_warps=1
    )
