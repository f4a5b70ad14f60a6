"""depthwise_block: y = scale * act(dwconv_same(x, weight) + bias) + shift + residual * x

x [N, C, H, W], weight [C, 1, KH, KW], y [N, C, H, W]. Two kernels:

bands  16-bit types, rows dense in memory: per filter row, a product of image rows and a banded Toeplitz matrix on
       tensor cores: y[r, j] += sum_i x[r + ky, i] T_ky[i, j], T_ky[i, j] = weight[ky, i - j + left]. One channel a
       program; its rows are those of all images. Where a row fits one tile the padding falls out of the band.
strip  everything else, channels_last too: multiply-adds in float32. A program keeps ROWS rows of [CHANNELS, COLUMNS]
       in registers and reads each row of x once for each column of the filter.

In training (depthwise_training.py) both also turn the filter, and write their part of sums over what they have stored.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from cmx_kernels import registry
from cmx_kernels.triton_kernels import config, launch
from cmx_kernels.triton_kernels.activation import activate, finish, per_channel
from cmx_kernels.triton_kernels.launch import begin_chained, wrap_triton
from cmx_kernels.triton_kernels.statistics import store_moments


@triton.jit
def depthwise_fwd_bands_kernel(
    x, weight, bias, scale, shift, skip, y, pre, rows, partials,
    images, channels, height, width,
    x_n, x_c, x_h, weight_c, weight_h, weight_w, y_n, y_c, y_h,
    bias_stride, scale_stride, shift_stride,
    KH: tl.constexpr, KW: tl.constexpr, FLIP: tl.constexpr, ACT: tl.constexpr, RESIDUAL: tl.constexpr,
    OUT_ACT: tl.constexpr, UNIT: tl.constexpr, WIDE: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    WINDOW: tl.constexpr, BEFORE: tl.constexpr, CHAINED: tl.constexpr,
):  # fmt: skip
    """COLUMNS outputs of a row from WINDOW inputs, which start BEFORE columns to the left.

    x_n, x_c, x_h, width, y_n, y_c, y_h come divided by UNIT: what the compiler may know to divide them.
    """
    begin_chained(CHAINED)
    row_tiles = tl.cdiv(images * height, ROWS)
    column_tiles = tl.cdiv(width * UNIT, COLUMNS)
    tile = tl.program_id(0)
    c = tile // (row_tiles * column_tiles)
    r = (tile // column_tiles) % row_tiles * ROWS + tl.arange(0, ROWS)
    first = tile % column_tiles * COLUMNS
    xo = first + tl.arange(0, COLUMNS)
    xi = first - BEFORE + tl.arange(0, WINDOW)
    row = r % height
    n = r // height
    if WIDE:
        n, row, c = n.to(tl.int64), row.to(tl.int64), c.to(tl.int64)
    r_inside = r < images * height
    o_inside = r_inside[:, None] & (xo < width * UNIT)[None, :]
    i_inside = (xi >= 0) & (xi < width * UNIT)
    TOP: tl.constexpr = KH // 2 if FLIP else (KH - 1) // 2
    LEFT: tl.constexpr = KW // 2 if FLIP else (KW - 1) // 2
    plane = x + c * (x_c * UNIT) + n * (x_n * UNIT)
    taps = weight + c * weight_c
    if FLIP:
        taps += (KH - 1) * weight_h + (KW - 1) * weight_w
        weight_h, weight_w = -weight_h, -weight_w
    kx = tl.arange(0, WINDOW)[:, None] - tl.arange(0, COLUMNS)[None, :] + (LEFT - BEFORE)
    in_band = (kx >= 0) & (kx < KW)
    acc = tl.zeros([ROWS, COLUMNS], tl.float32)
    for ky in range(KH):
        above = row + (ky - TOP)
        inside = (r_inside & (above >= 0) & (above < height))[:, None] & i_inside[None, :]
        v = tl.load((plane + above * (x_h * UNIT))[:, None] + xi[None, :], mask=inside, other=0)
        band = tl.load(taps + ky * weight_h + kx * weight_w, mask=in_band, other=0)
        acc = tl.dot(v, band, acc)
    # 0 * inf: the zeros of the band spoil the neighbours of what is not finite. Then again, tap by tap
    if tl.max((tl.abs(acc) < float("inf")).to(tl.int32) == 0):
        acc = tl.zeros([ROWS, COLUMNS], tl.float32)
        for tap in range(KH * KW):
            above = row + (tap // KW - TOP)
            beside = xo + (tap % KW - LEFT)
            inside = (r_inside & (above >= 0) & (above < height))[:, None] & ((beside >= 0) & (beside < width * UNIT))
            v = tl.load((plane + above * (x_h * UNIT))[:, None] + beside[None, :], mask=inside, other=0)
            acc += v.to(tl.float32) * tl.load(taps + tap // KW * weight_h + tap % KW * weight_w).to(tl.float32)
    one = c + tl.arange(0, 1)
    acc = finish(acc, one, one < channels, bias, scale, shift, bias_stride, scale_stride, shift_stride, ACT, True)
    if RESIDUAL:
        same = (plane + row * (x_h * UNIT))[:, None] + xo[None, :]
        acc += tl.load(same, mask=o_inside, other=0).to(tl.float32)
    at = (c * (x_c * UNIT) + n * (x_n * UNIT) + row * (x_h * UNIT))[:, None] + xo[None, :]
    if skip is not None:
        acc += tl.load(skip + at, mask=o_inside, other=0).to(tl.float32)
    out = y + c * (y_c * UNIT) + n * (y_n * UNIT) + row * (y_h * UNIT)
    stored = acc.to(y.dtype.element_ty)
    tl.store(out[:, None] + xo[None, :], stored, mask=o_inside)
    if partials is not None:
        parts = row_tiles * column_tiles
        to = partials + c * parts + tile % parts
        v = stored.to(tl.float32)
        if pre is None:
            v = tl.where(o_inside, activate(v, OUT_ACT, False), 0.0)
            count = tl.sum(o_inside.to(tl.float32))
            mean = tl.sum(v) / count
            off = tl.where(o_inside, v - mean, 0.0)
            tl.store(to, count)
            tl.store(to + channels * parts, mean)
            tl.store(to + 2 * channels * parts, tl.sum(off * off))
        else:
            v = tl.where(o_inside, v, 0.0)
            u = tl.load(pre + at, mask=o_inside, other=0).to(tl.float32)
            tl.store(to, tl.sum(v))
            tl.store(to + channels * parts, tl.sum(v * (activate(u, OUT_ACT, False) - tl.load(rows + c))))


@triton.jit
def depthwise_fwd_strip_kernel(
    x, weight, bias, scale, shift, skip, y, pre, rows, partials,
    channels, height, width,
    x_n, x_c, x_h, x_w, weight_c, weight_h, weight_w, y_n, y_c, y_h, y_w,
    bias_stride, scale_stride, shift_stride,
    KH: tl.constexpr, KW: tl.constexpr, FLIP: tl.constexpr, ACT: tl.constexpr, RESIDUAL: tl.constexpr,
    OUT_ACT: tl.constexpr, WIDE: tl.constexpr, CHANNELS: tl.constexpr, COLUMNS: tl.constexpr, ROWS: tl.constexpr,
    CHAINED: tl.constexpr,
):  # fmt: skip
    """Any strides. Programs: columns fastest, then channels, rows, images."""
    begin_chained(CHAINED)
    column_tiles, row_tiles = tl.cdiv(width, COLUMNS), tl.cdiv(height, ROWS)
    channel_tiles = tl.cdiv(channels, CHANNELS)
    tile = tl.program_id(0)
    xo = tile % column_tiles * COLUMNS + tl.arange(0, COLUMNS)
    c = tile // column_tiles % channel_tiles * CHANNELS + tl.arange(0, CHANNELS)
    top = tile // (column_tiles * channel_tiles) % row_tiles * ROWS
    n = tile // (column_tiles * channel_tiles * row_tiles)
    if WIDE:
        xo, c, top, n = xo.to(tl.int64), c.to(tl.int64), top.to(tl.int64), n.to(tl.int64)
    c_inside, o_inside = c < channels, xo < width
    inside = c_inside[:, None] & o_inside[None, :]
    TOP: tl.constexpr = KH // 2 if FLIP else (KH - 1) // 2
    LEFT: tl.constexpr = KW // 2 if FLIP else (KW - 1) // 2
    if FLIP:
        weight += (KH - 1) * weight_h + (KW - 1) * weight_w
        weight_h, weight_w = -weight_h, -weight_w
    plane = x + n * x_n + c[:, None] * x_c
    zero = tl.zeros([CHANNELS, COLUMNS], tl.float32)
    acc = ()
    for _ in tl.static_range(ROWS):
        acc = acc + (zero,)
    for kx in range(KW):
        xi = xo + (kx - LEFT)
        i_inside = c_inside[:, None] & ((xi >= 0) & (xi < width))[None, :]
        taps = ()
        for ky in tl.static_range(KH):
            tap = tl.load(weight + c * weight_c + ky * weight_h + kx * weight_w, mask=c_inside, other=0)
            taps = taps + (tap.to(tl.float32)[:, None],)
        for i in tl.static_range(ROWS + KH - 1):
            row = top + (i - TOP)
            v = tl.load(plane + row * x_h + xi[None, :] * x_w, mask=i_inside & (row >= 0) & (row < height), other=0)
            v = v.to(tl.float32)
            sums = ()
            for o in tl.static_range(ROWS):
                if i >= o and i < o + KH:
                    sums = sums + (acc[o] + v * taps[i - o],)
                else:
                    sums = sums + (acc[o],)
            acc = sums
    NARROW: tl.constexpr = y.dtype.element_ty.primitive_bitwidth == 16
    first, second, count, seen = zero, zero, zero, ()
    for o in tl.static_range(ROWS):
        row = top + o
        out = finish(acc[o], c, c_inside, bias, scale, shift, bias_stride, scale_stride, shift_stride, ACT, NARROW)
        write = inside & (row < height)
        if RESIDUAL:
            out += tl.load(plane + row * x_h + xo[None, :] * x_w, mask=write, other=0).to(tl.float32)
        at = n * x_n + c[:, None] * x_c + row * x_h + xo[None, :] * x_w
        if skip is not None:
            out += tl.load(skip + at, mask=write, other=0).to(tl.float32)
        stored = out.to(y.dtype.element_ty)
        tl.store(y + n * y_n + c[:, None] * y_c + row * y_h + xo[None, :] * y_w, stored, mask=write)
        if partials is not None:
            v = stored.to(tl.float32)
            if pre is None:
                seen = seen + (tl.where(write, activate(v, OUT_ACT, False), 0.0),)
                first += seen[o]
                count += tl.where(write, 1.0, 0.0)
            else:
                v = tl.where(write, v, 0.0)
                u = activate(tl.load(pre + at, mask=write, other=0).to(tl.float32), OUT_ACT, False)
                first += v
                second += v * (u - per_channel(rows, 1, c, c_inside))
    if partials is not None:
        part = tile // (column_tiles * channel_tiles) * column_tiles + tile % column_tiles
        parts = tl.num_programs(0) // channel_tiles
        if pre is None:
            values = tl.sum(count, 1)
            mean = tl.sum(first, 1) / tl.maximum(values, 1.0)
            for o in tl.static_range(ROWS):
                off = tl.where(inside & (top + o < height), seen[o] - mean[:, None], 0.0)
                second += off * off
            store_moments(partials, part, parts, channels, c, c_inside, values, mean, tl.sum(second, 1))
        else:
            to = partials + c * parts + part
            tl.store(to, tl.sum(first, 1), mask=c_inside)
            tl.store(to + channels * parts, tl.sum(second, 1), mask=c_inside)


def _window(width: int, kw: int) -> tuple[int, int, int]:
    """COLUMNS, WINDOW, BEFORE of the bands: powers of two; BEFORE a multiple of 8, so that windows stay aligned."""
    columns = max(16, 1 << (width - 1).bit_length())
    if columns <= 32:
        return columns, columns, 0
    columns = 16 if kw <= 17 else 32
    return columns, 2 * columns, columns // 2


def _unit(*numbers: int) -> int:
    """The largest of 8, 4, 2, 1 that divides all."""
    return next(unit for unit in (8, 4, 2, 1) if all(number % unit == 0 for number in numbers))


def convolve(
    x: Tensor,
    weight: Tensor,
    vectors: tuple[Tensor | None, Tensor | None, Tensor | None],
    act: str,
    residual: bool,
    y: Tensor,
    skip: Tensor | None = None,
    flip: bool = False,
    out_act: str = "none",
    statistics: int = 0,
    pre: Tensor | None = None,
    mean: Tensor | None = None,
) -> Tensor | None:
    """y = scale * act(dwconv_same(x, weight) + bias) + shift + residual * x + skip, skip and pre with the strides of x.

    flip: by the filter turned by 180 degrees, which is the gradient's convolution.
    statistics: rows of partials to return: 3 for the moments of out_act(y), 2 for sum(y) and sum(y * (out_act(pre) -
    mean)), None for 0.
    """
    (images, channels, height, width), (kh, kw) = x.shape, weight.shape[2:]
    taps, arch = (weight.stride(0), *weight.stride()[2:]), launch.arch(x)
    shared = {
        "KH": kh,
        "KW": kw,
        "FLIP": flip,
        "ACT": act,
        "RESIDUAL": residual,
        "OUT_ACT": out_act,
        "WIDE": launch.needs_wide_offsets(x, y),
        **launch.chain(x),
    }
    bands = x.dtype != torch.float32 and (x.stride(3) == 1 or width == 1) and y.stride(3) == 1
    if bands:
        columns, window, before = _window(width, kw)
        b = config.bands(arch, images * height, columns)
        parts = launch.cdiv(images * height, b.rows) * launch.cdiv(width, columns)
        groups = channels
    else:
        s = config.strip(arch, width, launch.is_channels_last(x), kh)
        parts = images * launch.cdiv(height, s.rows) * launch.cdiv(width, s.columns)
        groups = launch.cdiv(channels, s.channels)
    partials = None
    if statistics:
        partials = torch.empty((statistics, channels, parts), dtype=torch.float32, device=x.device)
    tensors = x, weight, *vectors, skip, y, pre, mean, partials
    with launch.on_device(x):
        if bands:
            numbers = (*x.stride()[:3], width, *y.stride()[:3])
            unit = _unit(*numbers)
            x_n, x_c, x_h, units, y_n, y_c, y_h = (number // unit for number in numbers)
            wrap_triton(depthwise_fwd_bands_kernel)[(groups * parts,)](
                *tensors, images, channels, height, units, x_n, x_c, x_h, *taps, y_n, y_c, y_h,
                *launch.strides(*vectors), UNIT=unit, ROWS=b.rows, COLUMNS=columns, WINDOW=window, BEFORE=before,
                num_warps=b.warps, num_stages=b.stages, **shared,
            )  # fmt: skip
        else:
            wrap_triton(depthwise_fwd_strip_kernel)[(groups * parts,)](
                *tensors, channels, height, width, *x.stride(), *taps, *y.stride(), *launch.strides(*vectors),
                CHANNELS=s.channels, COLUMNS=s.columns, ROWS=s.rows, num_warps=s.warps, **shared,
            )  # fmt: skip
    return partials


def depthwise_block(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
    act: str,
    residual: bool,
) -> Tensor:
    y = registry.new_output("depthwise_block", x, weight, bias, scale, shift, act, residual)
    if y.numel():
        convolve(x, weight, (bias, scale, shift), act, residual, y)
    return y


registry.implement("depthwise_block", depthwise_block)
