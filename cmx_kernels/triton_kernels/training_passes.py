"""The elementwise passes of training around torch's products and our convolutions (ops/training_passes.py).

    training_sum        out = X + skip, each (act(x) - mean) * scale + shift where it has an affine
    training_gradient   out = da = (p grad + q (act(a) - mean) + r) act'(a), and sum(da)
    training_moments    mean and variance of act(a)
    training_sums       sum(grad), sum(grad * (act(x) - mean))

Memory-bound: each number is read once and written once. A program keeps [CHANNELS, PIXELS] of running sums over its
share of the tiles. Tensors are contiguous, or all of them channels_last; what a product reads is in product layout.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from cmx_kernels import registry
from cmx_kernels.triton_kernels import config, launch
from cmx_kernels.triton_kernels.activation import activate, per_channel
from cmx_kernels.triton_kernels.launch import wrap_triton
from cmx_kernels.triton_kernels.statistics import finish_moments, finish_sums, slope, store_moments, value


@triton.jit
def training_rows_kernel(
    one, two, out, one_rows, two_rows, partials,
    images, channels, pixels, splits,
    in_n, in_c, in_p, out_n, out_c, out_p,
    MODE: tl.constexpr, ACT: tl.constexpr, WIDE: tl.constexpr, CHANNELS: tl.constexpr, PIXELS: tl.constexpr,
):  # fmt: skip
    """one and two have the strides in_*; one_rows: affine of one, or coefficients; two_rows: affine of two."""
    channel_tiles = tl.cdiv(channels, CHANNELS)
    pixel_tiles = tl.cdiv(pixels, PIXELS)
    split = tl.program_id(0) // channel_tiles
    c = tl.program_id(0) % channel_tiles * CHANNELS + tl.arange(0, CHANNELS)
    inside = c < channels
    if WIDE:
        c = c.to(tl.int64)
    zero = tl.zeros([CHANNELS, PIXELS], tl.float32)
    first, second, count, shift = zero, zero, zero, zero
    for tile in range(split, images * pixel_tiles, splits):
        n = tile // pixel_tiles
        p = tile % pixel_tiles * PIXELS + tl.arange(0, PIXELS)
        valid = inside[:, None] & (p < pixels)[None, :]
        if WIDE:
            n, p = n.to(tl.int64), p.to(tl.int64)
        at = n * in_n + c[:, None] * in_c + p[None, :] * in_p
        to = n * out_n + c[:, None] * out_c + p[None, :] * out_p
        v = tl.load(one + at, mask=valid, other=0).to(tl.float32)
        if MODE == "sum":
            v = value(v, one_rows, channels, c, inside, ACT)
            if two is not None:
                w = tl.load(two + at, mask=valid, other=0).to(tl.float32)
                v += value(w, two_rows, channels, c, inside, ACT)
            tl.store(out + to, v.to(out.dtype.element_ty), mask=valid)
        if MODE == "gradient":
            a = tl.load(two + at, mask=valid, other=0).to(tl.float32)
            centred = activate(a, ACT, False) - per_channel(one_rows + 3 * channels, 1, c, inside)
            v = v * per_channel(one_rows, 1, c, inside) + centred * per_channel(one_rows + channels, 1, c, inside)
            v += per_channel(one_rows + 2 * channels, 1, c, inside)
            if ACT == "relu":
                v = tl.where(a > 0, v, 0.0)  # an infinite gradient times 0 would be NaN
            else:
                v *= slope(a, ACT)
            tl.store(out + to, v.to(out.dtype.element_ty), mask=valid)
            first += tl.where(valid, v, 0.0)
        if MODE == "moments":  # deviations from the first value in each place
            v = activate(v, ACT, False)
            shift = tl.where(count == 0, v, shift)
            off = tl.where(valid, v - shift, 0.0)
            count += tl.where(valid, 1.0, 0.0)
            first += off
            second += off * off
        if MODE == "sums":
            x = tl.load(two + at, mask=valid, other=0).to(tl.float32)
            first += v
            second += v * (activate(x, ACT, False) - per_channel(two_rows, 1, c, inside))
    at = partials + c * splits + split if MODE != "sum" else None
    if MODE == "gradient" or MODE == "sums":
        tl.store(at, tl.sum(first, 1), mask=inside)
    if MODE == "sums":
        tl.store(at + channels * splits, tl.sum(second, 1), mask=inside)
    if MODE == "moments":
        some = tl.maximum(count, 1.0)
        n = tl.sum(count, 1)
        means = shift + first / some
        mean = tl.sum(count * means, 1) / tl.maximum(n, 1.0)
        off = tl.where(count > 0, means - mean[:, None], 0.0)
        m2 = tl.sum(second - first * first / some + count * off * off, 1)
        store_moments(partials, split, splits, channels, c, inside, n, mean, tl.where(m2 < 0, 0.0, m2))


def _run(
    mode: str, act: str, one: Tensor, two: Tensor | None, out: Tensor | None, *rows: Tensor | None, result: int = 0
) -> Tensor:
    """Launch one pass; its partials [result, C, splits], written by the first stage."""
    images, channels, height, width = one.shape
    last = launch.is_channels_last(one)
    one, two = launch.dense(one, last), None if two is None else launch.dense(two, last)
    c = config.training_rows(launch.arch(one), height * width, last)
    columns = images * launch.cdiv(height * width, c.pixels)
    groups = launch.cdiv(channels, c.channels)
    splits = config.splits(columns, groups, launch.multiprocessors(one))
    partials = torch.empty((result, channels, splits), dtype=torch.float32, device=one.device)
    into = one if out is None else out
    given = (None if r is None else r.float().contiguous() for r in rows)
    with launch.on_device(one):
        wrap_triton(training_rows_kernel)[(groups * splits,)](
            one, two, out, *given, partials if result else None, images, channels, height * width, splits,
            *one.stride()[:2], channels if last else 1, *into.stride()[:2], channels if last else 1,
            MODE=mode, ACT=act, WIDE=launch.needs_wide_offsets(one, into), CHANNELS=c.channels, PIXELS=c.pixels,
            num_warps=c.warps,
        )  # fmt: skip
    return partials


def _floats(like: Tensor, *size: int) -> Tensor:
    return torch.empty(size, dtype=torch.float32, device=like.device)


def form_sum(x: Tensor, affine: Tensor | None, skip: Tensor | None, skip_affine: Tensor | None, act: str) -> Tensor:
    """X + skip in the layout of x"""
    u = torch.empty_like(x)
    _run("sum", act, x, skip, u, affine, skip_affine)
    return u


def form_gradient(grad: Tensor, a: Tensor, coefficients: Tensor, act: str, da: Tensor) -> Tensor:
    """Write da; returns its sum [C]"""
    partials = _run("gradient", act, grad, a, da, coefficients, None, result=1)
    dbias = _floats(a, a.shape[1])
    with launch.on_device(a):
        finish_sums(partials, dbias)
    return dbias


def training_sum(x: Tensor, affine: Tensor | None, skip: Tensor | None, skip_affine: Tensor | None, act: str) -> Tensor:
    u = registry.new_output("training_sum", x, affine, skip, skip_affine, act)
    if u.numel():
        _run("sum", act, x, skip, u, affine, skip_affine)
    return u


def training_gradient(grad: Tensor, a: Tensor, coefficients: Tensor, act: str) -> tuple[Tensor, Tensor]:
    da, dbias = registry.new_output("training_gradient", grad, a, coefficients, act)
    return da, form_gradient(grad, a, coefficients, act, da) if da.numel() else dbias.zero_()


def training_moments(a: Tensor, act: str) -> Tensor:
    moments = registry.new_output("training_moments", a, act)
    if not a.numel():
        return moments.fill_(torch.nan)
    partials = _run("moments", act, a, None, None, None, None, result=3)
    with launch.on_device(a):
        finish_moments(partials, moments)
    return moments


def training_sums(grad: Tensor, x: Tensor, affine: Tensor, act: str) -> Tensor:
    sums = registry.new_output("training_sums", grad, x, affine, act)
    if not x.numel():
        return sums.zero_()
    partials = _run("sums", act, grad, x, None, None, affine, result=2)
    with launch.on_device(x):
        finish_sums(partials, sums)
    return sums


registry.implement("training_sum", training_sum)
registry.implement("training_gradient", training_gradient)
registry.implement("training_moments", training_moments)
registry.implement("training_sums", training_sums)
