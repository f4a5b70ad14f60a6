"""depthwise_block: y = scale * act(dwconv_same(x, weight) + bias) + shift + residual * x

x [N, C, H, W], weight [C, 1, KH, KW], y [N, C, H, W]. Two kernels:

bands  16-bit types, rows dense in memory: per filter row, a product of image rows and a banded Toeplitz matrix on
       tensor cores: y[r, j] += sum_i x[r + ky, i] T_ky[i, j], T_ky[i, j] = weight[ky, i - j + left]. One channel a
       program; its rows are those of all images. Where a row fits one tile the padding falls out of the band.
strip  everything else, channels_last too: multiply-adds in float32. A program keeps ROWS rows of [CHANNELS, COLUMNS]
       in registers and reads each row of x once for each column of the filter.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.library import wrap_triton

from cmx_kernels import registry
from cmx_kernels.triton_kernels import config, launch
from cmx_kernels.triton_kernels.activation import finish


@triton.jit
def depthwise_fwd_bands_kernel(
    x, weight, bias, scale, shift, y,
    images, channels, height, width,
    x_n, x_c, x_h, weight_c, weight_h, weight_w, y_n, y_c, y_h,
    bias_stride, scale_stride, shift_stride,
    KH: tl.constexpr, KW: tl.constexpr, ACT: tl.constexpr, RESIDUAL: tl.constexpr, UNIT: tl.constexpr,
    WIDE: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, WINDOW: tl.constexpr, BEFORE: tl.constexpr,
):  # fmt: skip
    """COLUMNS outputs of a row from WINDOW inputs, which start BEFORE columns to the left.

    x_n, x_c, x_h, width, y_n, y_c, y_h come divided by UNIT: what the compiler may know to divide them.
    """
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
    TOP: tl.constexpr = (KH - 1) // 2
    LEFT: tl.constexpr = (KW - 1) // 2
    plane = x + c * (x_c * UNIT) + n * (x_n * UNIT)
    taps = weight + c * weight_c
    kx = tl.arange(0, WINDOW)[:, None] - tl.arange(0, COLUMNS)[None, :] + (LEFT - BEFORE)
    in_band = (kx >= 0) & (kx < KW)
    acc = tl.zeros([ROWS, COLUMNS], tl.float32)
    for ky in range(KH):
        above = row + (ky - TOP)
        inside = (r_inside & (above >= 0) & (above < height))[:, None] & i_inside[None, :]
        rows = tl.load((plane + above * (x_h * UNIT))[:, None] + xi[None, :], mask=inside, other=0)
        band = tl.load(taps + ky * weight_h + kx * weight_w, mask=in_band, other=0)
        acc = tl.dot(rows, band, acc)
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
    out = y + c * (y_c * UNIT) + n * (y_n * UNIT) + row * (y_h * UNIT)
    tl.store(out[:, None] + xo[None, :], acc.to(y.dtype.element_ty), mask=o_inside)


@triton.jit
def depthwise_fwd_strip_kernel(
    x, weight, bias, scale, shift, y,
    channels, height, width,
    x_n, x_c, x_h, x_w, weight_c, weight_h, weight_w, y_n, y_c, y_h, y_w,
    bias_stride, scale_stride, shift_stride,
    KH: tl.constexpr, KW: tl.constexpr, ACT: tl.constexpr, RESIDUAL: tl.constexpr, WIDE: tl.constexpr,
    CHANNELS: tl.constexpr, COLUMNS: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Any strides. Programs: columns fastest, then channels, rows, images."""
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
    plane = x + n * x_n + c[:, None] * x_c
    acc = ()
    for _ in tl.static_range(ROWS):
        acc = acc + (tl.zeros([CHANNELS, COLUMNS], tl.float32),)
    for kx in range(KW):
        xi = xo + (kx - (KW - 1) // 2)
        i_inside = c_inside[:, None] & ((xi >= 0) & (xi < width))[None, :]
        taps = ()
        for ky in tl.static_range(KH):
            tap = tl.load(weight + c * weight_c + ky * weight_h + kx * weight_w, mask=c_inside, other=0)
            taps = taps + (tap.to(tl.float32)[:, None],)
        for i in tl.static_range(ROWS + KH - 1):
            row = top + (i - (KH - 1) // 2)
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
    for o in tl.static_range(ROWS):
        row = top + o
        out = finish(acc[o], c, c_inside, bias, scale, shift, bias_stride, scale_stride, shift_stride, ACT, NARROW)
        write = inside & (row < height)
        if RESIDUAL:
            out += tl.load(plane + row * x_h + xo[None, :] * x_w, mask=write, other=0).to(tl.float32)
        at = y + n * y_n + c[:, None] * y_c + row * y_h + xo[None, :] * y_w
        tl.store(at, out.to(y.dtype.element_ty), mask=write)


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
    if y.numel() == 0:
        return y
    (images, channels, height, width), (kh, kw) = x.shape, weight.shape[2:]
    taps, vectors, arch = (weight.stride(0), *weight.stride()[2:]), (bias, scale, shift), launch.arch(x)
    shared = {"KH": kh, "KW": kw, "ACT": act, "RESIDUAL": residual, "WIDE": launch.needs_wide_offsets(x, y)}
    with launch.on_device(x):
        if x.dtype != torch.float32 and (x.stride(3) == 1 or width == 1) and y.stride(3) == 1:
            columns, window, before = _window(width, kw)
            b = config.bands(arch, images * height, columns)
            numbers = (*x.stride()[:3], width, *y.stride()[:3])
            unit = _unit(*numbers)
            x_n, x_c, x_h, units, y_n, y_c, y_h = (number // unit for number in numbers)
            tiles = channels * launch.cdiv(images * height, b.rows) * launch.cdiv(width, columns)
            wrap_triton(depthwise_fwd_bands_kernel)[(tiles,)](
                x, weight, *vectors, y, images, channels, height, units, x_n, x_c, x_h, *taps, y_n, y_c, y_h,
                *launch.strides(*vectors), UNIT=unit, ROWS=b.rows, COLUMNS=columns, WINDOW=window, BEFORE=before,
                num_warps=b.warps, num_stages=b.stages, **shared,
            )  # fmt: skip
            return y
        s = config.strip(arch, width, launch.is_channels_last(x), kh)
        tiles = images * launch.cdiv(channels, s.channels) * launch.cdiv(height, s.rows) * launch.cdiv(width, s.columns)
        wrap_triton(depthwise_fwd_strip_kernel)[(tiles,)](
            x, weight, *vectors, y, channels, height, width, *x.stride(), *taps, *y.stride(),
            *launch.strides(*vectors), CHANNELS=s.channels, COLUMNS=s.columns, ROWS=s.rows, num_warps=s.warps, **shared,
        )  # fmt: skip
    return y


registry.implement("depthwise_block", depthwise_block)
