"""pointwise_block: y[n, o, p] = scale * act(sum_i weight[o, i] x[n, i, p] + bias) + shift, a product per image plane

x [N, I, P], weight [O, I], y [N, O, P], P = H W pixels. A program takes tiles of [ROWS output channels, COLUMNS pixels]
in turn. Columns run through the pixels of all images. Tiles are ordered in groups, so that programs that run at the
same time share rows of weight and columns of x in L2.
"""

import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from cmx_kernels import registry
from cmx_kernels.triton_kernels import config, launch
from cmx_kernels.triton_kernels.activation import finish
from cmx_kernels.triton_kernels.launch import begin_chained, wrap_triton


@triton.jit
def grouped(tile, row_tiles, column_tiles, GROUP: tl.constexpr):
    """The position of a tile: GROUP columns, all their rows, then the next columns."""
    group = tile // (GROUP * row_tiles)
    first = group * GROUP
    size = tl.minimum(column_tiles - first, GROUP)
    inside = tile % (GROUP * row_tiles)
    return inside // size, first + inside % size


@triton.jit
def pointwise_fwd_kernel(
    x, weight, bias, scale, shift, y,
    images, channels_in, channels_out, width, pixels,
    x_n, x_c, x_h, x_w, weight_o, weight_i, y_n, y_c, y_p,
    bias_stride, scale_stride, shift_stride,
    ACT: tl.constexpr, PRECISION: tl.constexpr, FLAT: tl.constexpr, WIDE: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr, GROUP: tl.constexpr, CHAINED: tl.constexpr,
):  # fmt: skip
    """Any strides, any sizes. FLAT: x_w is the distance between any two neighbouring pixels."""
    begin_chained(CHAINED)
    columns = images * pixels
    if WIDE:
        columns = tl.cast(images, tl.int64) * pixels
    row_tiles = tl.cdiv(channels_out, ROWS)
    column_tiles = tl.cdiv(columns, COLUMNS)
    for tile in tl.range(tl.program_id(0), row_tiles * column_tiles, tl.num_programs(0)):
        row, column = grouped(tile, row_tiles, column_tiles, GROUP)
        o = row * ROWS + tl.arange(0, ROWS)
        j = column * COLUMNS + tl.arange(0, COLUMNS)
        i = tl.arange(0, DEPTH)
        step = tl.full([], DEPTH, tl.int64 if WIDE else tl.int32)
        if WIDE:
            o, i = o.to(tl.int64), i.to(tl.int64)
        n, p = j // pixels, j % pixels
        if FLAT:
            at = n * x_n + p * x_w
        else:
            at = n * x_n + (p // width) * x_h + (p % width) * x_w
        a_at = weight + o[:, None] * weight_o + i[None, :] * weight_i
        b_at = x + at[None, :] + i[:, None] * x_c
        o_inside, j_inside = o < channels_out, j < columns
        acc = tl.zeros([ROWS, COLUMNS], tl.float32)
        for k in range(0, channels_in, DEPTH):
            a = tl.load(a_at, mask=o_inside[:, None] & (i[None, :] < channels_in - k), other=0)
            b = tl.load(b_at, mask=j_inside[None, :] & (i[:, None] < channels_in - k), other=0)
            acc = tl.dot(a, b, acc, input_precision=PRECISION)
            a_at += step * weight_i
            b_at += step * x_c
        NARROW: tl.constexpr = y.dtype.element_ty.primitive_bitwidth == 16
        acc = finish(acc, o, o_inside, bias, scale, shift, bias_stride, scale_stride, shift_stride, ACT, NARROW)
        out_at = y + (n * y_n + p * y_p)[None, :] + o[:, None] * y_c
        tl.store(out_at, acc.to(y.dtype.element_ty), mask=o_inside[:, None] & j_inside[None, :])


@triton.jit
def pointwise_fwd_descriptor_kernel(
    x, weight, y, bias, scale, shift,
    images, channels_in, channels_out, pixels,
    bias_stride, scale_stride, shift_stride,
    ACT: tl.constexpr, PRECISION: tl.constexpr, LAST: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr, GROUP: tl.constexpr, CHAINED: tl.constexpr,
):  # fmt: skip
    """Copies by tensor descriptors (TMA). x and y are [N, C, P], or with LAST [N, P, C]; no tile crosses images."""
    begin_chained(CHAINED)
    row_tiles = tl.cdiv(channels_out, ROWS)
    pixel_tiles = tl.cdiv(pixels, COLUMNS)
    column_tiles = images * pixel_tiles
    for tile in tl.range(tl.program_id(0), row_tiles * column_tiles, tl.num_programs(0)):
        row, column = grouped(tile, row_tiles, column_tiles, GROUP)
        n, p = column // pixel_tiles, (column % pixel_tiles) * COLUMNS
        acc = tl.zeros([ROWS, COLUMNS], tl.float32)
        for k in range(0, channels_in, DEPTH):
            a = weight.load([row * ROWS, k])
            if LAST:
                b = x.load([n, p, k]).reshape(COLUMNS, DEPTH).T
            else:
                b = x.load([n, k, p]).reshape(DEPTH, COLUMNS)
            acc = tl.dot(a, b, acc, input_precision=PRECISION)
        o = row * ROWS + tl.arange(0, ROWS)
        NARROW: tl.constexpr = y.dtype.primitive_bitwidth == 16
        inside = o < channels_out
        acc = finish(acc, o, inside, bias, scale, shift, bias_stride, scale_stride, shift_stride, ACT, NARROW)
        if LAST:
            y.store([n, p, row * ROWS], acc.to(y.dtype).T.reshape(1, COLUMNS, ROWS))
        else:
            y.store([n, row * ROWS, p], acc.to(y.dtype).reshape(1, ROWS, COLUMNS))


def _planes(x: Tensor, last: bool) -> Tensor | None:
    """x [N, C, H, W] as [N, C, P] or, ``last``, [N, P, C], where a tensor descriptor can hold it."""
    pixel, (n, c, h, w) = launch.pixel_stride(x), x.shape
    if pixel is None:
        return None
    flat = x.as_strided((n, c, h * w), (x.stride(0), x.stride(1), pixel))
    return _described(flat.transpose(1, 2) if last else flat)


def _described(t: Tensor) -> Tensor | None:
    """t with valid strides, if they and its address are multiples of 16 bytes and its rows are dense."""
    line = 16 // t.element_size()
    outer = [s if size > 1 else line for size, s in zip(t.shape[:-1], t.stride()[:-1], strict=True)]
    dense = t.stride(-1) == 1 and all(s > 0 and s % line == 0 for s in outer)
    return t.as_strided(t.shape, (*outer, 1)) if dense and t.data_ptr() % 16 == 0 else None


def _descriptors(x: Tensor, weight: Tensor, y: Tensor, last: bool, columns: int) -> list[Tensor] | None:
    """x, weight and y as descriptors want them, or None. torch.compile's graphs cannot hold descriptors."""
    pixels = x.shape[2] * x.shape[3]
    whole = launch.cdiv(pixels, columns) * columns
    if not launch.is_plain(x) or 8 * whole > 9 * pixels:  # tiles end with their image: an eighth of waste at most
        return None
    found = [_planes(x, last), _described(weight[:, :, 0, 0]), _planes(y, last)]
    return [t for t in found if t is not None] if None not in found else None


def _is_aligned(x: Tensor, weight: Tensor, last: bool, flat: int | None) -> bool:
    """Whether the rows of tiles can be copied 16 bytes at a time."""
    line = 16 // x.element_size()
    outer = (x.stride(0), x.stride(3) if last else x.stride(1), weight.stride(0))
    dense = weight.stride(1) == 1 and (last or (flat == 1 and x.shape[2] * x.shape[3] % line == 0))
    return dense and all(s % line == 0 for s in outer)


def pointwise_block(
    x: Tensor, weight: Tensor, bias: Tensor | None, scale: Tensor | None, shift: Tensor | None, act: str
) -> Tensor:
    y = registry.new_output("pointwise_block", x, weight, bias, scale, shift, act)
    if y.numel() == 0:
        return y
    (images, channels_in, height, width), channels_out = x.shape, weight.shape[0]
    pixels, precision, vectors = height * width, launch.precision(x), (bias, scale, shift)
    last, flat = launch.is_channels_last(x), launch.pixel_stride(x)
    sizes = (channels_out, images * pixels, launch.multiprocessors(x), _is_aligned(x, weight, last, flat))
    c = config.pointwise(launch.arch(x), x.dtype, precision, *sizes)
    described = _descriptors(x, weight, y, last, c.columns) if c.descriptors else None
    c = c if described is not None else config.pointwise_pointers(c)
    tiles = {"ROWS": c.rows, "COLUMNS": c.columns, "DEPTH": c.depth, "GROUP": c.group}
    options = {"ACT": act, "PRECISION": precision, **tiles, "num_warps": c.warps, "num_stages": c.stages}
    options |= launch.chain(x)
    with launch.on_device(x):
        if described is not None:
            shapes = ((c.depth, c.columns), (c.rows, c.columns))  # [channels, pixels] of x and y
            blocks_x, blocks_y = ([1, *(reversed(s) if last else s)] for s in shapes)
            blocks = (blocks_x, [c.rows, c.depth], blocks_y)
            described_as = [TensorDescriptor(t, t.shape, t.stride(), b) for t, b in zip(described, blocks, strict=True)]
            columns = images * launch.cdiv(pixels, c.columns) * c.columns
            wrap_triton(pointwise_fwd_descriptor_kernel)[(c.programs(channels_out, columns),)](
                *described_as, *vectors, images, channels_in, channels_out, pixels, *launch.strides(*vectors),
                LAST=last, **options,
            )  # fmt: skip
            return y
        wrap_triton(pointwise_fwd_kernel)[(c.programs(channels_out, images * pixels),)](
            x, weight, *vectors, y,
            images, channels_in, channels_out, width, pixels,
            x.stride(0), x.stride(1), x.stride(2), x.stride(3) if flat is None else flat, *weight.stride()[:2],
            y.stride(0), y.stride(1), y.stride(3), *launch.strides(*vectors),
            FLAT=flat is not None, WIDE=launch.needs_wide_offsets(x, weight, y), **options,
        )  # fmt: skip
    return y


registry.implement("pointwise_block", pointwise_block)
