"""pool_head: y[n, o] = sum_c weight[o, c] mean_p(x[n, c, p]) + bias[o]

x [N, C, H, W], weight [O, C], y [N, O]. One launch where it is predicted to be faster (config.head_is_one_launch): a
program takes an image and a block of classes, so that every such block reads the image again. Else two, with the means
[N, C] in float32 between them. Sums are in a fixed order in both.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from cmx_kernels import registry
from cmx_kernels.triton_kernels import config, launch
from cmx_kernels.triton_kernels.launch import begin_chained, wrap_triton


@triton.jit
def means_of(
    plane, inside, width, pixels, x_h, x_w,
    FLAT: tl.constexpr, WIDE: tl.constexpr, CHANNELS: tl.constexpr, PIXELS: tl.constexpr,
):  # fmt: skip
    """[CHANNELS] means of planes [CHANNELS, 1]. FLAT: x_w is the distance between any two neighbouring pixels."""
    sums = tl.zeros([CHANNELS, PIXELS], tl.float32)
    for first in range(0, pixels, PIXELS):
        p = first + tl.arange(0, PIXELS)
        p_inside = p < pixels
        if WIDE:
            p = p.to(tl.int64)
        at = p * x_w if FLAT else (p // width) * x_h + (p % width) * x_w
        sums += tl.load(plane + at[None, :], mask=inside[:, None] & p_inside[None, :], other=0).to(tl.float32)
    return tl.sum(sums, 1) / pixels


@triton.jit
def pool_head_fwd_kernel(
    x, weight, bias, y, channels, classes, width, pixels, x_n, x_c, x_h, x_w, weight_o, weight_c, bias_stride,
    FLAT: tl.constexpr, WIDE: tl.constexpr, CHANNELS: tl.constexpr, PIXELS: tl.constexpr, CLASSES: tl.constexpr,
    CHAINED: tl.constexpr,
):  # fmt: skip
    """CLASSES logits of one image, CHANNELS channels at a time."""
    begin_chained(CHAINED)
    class_tiles = tl.cdiv(classes, CLASSES)
    n = tl.program_id(0) // class_tiles
    o = tl.program_id(0) % class_tiles * CLASSES + tl.arange(0, CLASSES)
    i = tl.arange(0, CHANNELS)
    if WIDE:
        n, o, i = n.to(tl.int64), o.to(tl.int64), i.to(tl.int64)
    o_inside = o < classes
    acc = tl.zeros([CLASSES, CHANNELS], tl.float32)
    for first in range(0, channels, CHANNELS):
        c = first + i
        inside = c < channels
        plane = x + n * x_n + c[:, None] * x_c
        means = means_of(plane, inside, width, pixels, x_h, x_w, FLAT, WIDE, CHANNELS, PIXELS)
        at = weight + o[:, None] * weight_o + c[None, :] * weight_c
        w = tl.load(at, mask=o_inside[:, None] & inside[None, :], other=0).to(tl.float32)
        acc += w * tl.where(inside, means, 0.0)[None, :]
    logits = tl.sum(acc, 1)
    if bias is not None:
        logits += tl.load(bias + o * bias_stride, mask=o_inside, other=0).to(tl.float32)
    tl.store(y + n * classes + o, logits.to(y.dtype.element_ty), mask=o_inside)


@triton.jit
def pool_fwd_kernel(
    x, means, channels, width, pixels, x_n, x_c, x_h, x_w,
    FLAT: tl.constexpr, WIDE: tl.constexpr, CHANNELS: tl.constexpr, PIXELS: tl.constexpr, CHAINED: tl.constexpr,
):  # fmt: skip
    """means[n, c] for CHANNELS channels of one image."""
    begin_chained(CHAINED)
    channel_tiles = tl.cdiv(channels, CHANNELS)
    n = tl.program_id(0) // channel_tiles
    c = tl.program_id(0) % channel_tiles * CHANNELS + tl.arange(0, CHANNELS)
    if WIDE:
        n, c = n.to(tl.int64), c.to(tl.int64)
    inside = c < channels
    plane = x + n * x_n + c[:, None] * x_c
    found = means_of(plane, inside, width, pixels, x_h, x_w, FLAT, WIDE, CHANNELS, PIXELS)
    tl.store(means + n * channels + c, found, mask=inside)


@triton.jit
def head_fwd_kernel(
    means, weight, bias, y, images, channels, classes, weight_o, weight_c, bias_stride,
    PRECISION: tl.constexpr, WIDE: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr,
    CHAINED: tl.constexpr,
):  # fmt: skip
    """y [N, O] = means [N, C] weight^T + bias, a tile of ROWS images and COLUMNS classes a program."""
    begin_chained(CHAINED)
    column_tiles = tl.cdiv(classes, COLUMNS)
    n = tl.program_id(0) // column_tiles * ROWS + tl.arange(0, ROWS)
    o = tl.program_id(0) % column_tiles * COLUMNS + tl.arange(0, COLUMNS)
    if WIDE:
        n, o = n.to(tl.int64), o.to(tl.int64)
    n_inside, o_inside = n < images, o < classes
    acc = tl.zeros([ROWS, COLUMNS], tl.float32)
    for first in range(0, channels, DEPTH):
        c = first + tl.arange(0, DEPTH)
        c_inside = c < channels
        if WIDE:
            c = c.to(tl.int64)
        a = tl.load(means + n[:, None] * channels + c[None, :], mask=n_inside[:, None] & c_inside[None, :], other=0)
        b_inside = o_inside[None, :] & c_inside[:, None]
        b = tl.load(weight + o[None, :] * weight_o + c[:, None] * weight_c, mask=b_inside, other=0)
        acc = tl.dot(a, b.to(tl.float32), acc, input_precision=PRECISION)
    if bias is not None:
        acc += tl.load(bias + o * bias_stride, mask=o_inside, other=0).to(tl.float32)[None, :]
    at = y + n[:, None] * classes + o[None, :]
    tl.store(at, acc.to(y.dtype.element_ty), mask=n_inside[:, None] & o_inside[None, :])


def pool_head(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    y = registry.new_output("pool_head", x, weight, bias)
    if y.numel() == 0:
        return y
    (images, channels, height, width), classes, arch = x.shape, weight.shape[0], launch.arch(x)
    flat, p, c = launch.pixel_stride(x), config.pool(arch, launch.is_channels_last(x)), config.head(arch)
    steps = (*x.stride()[:3], x.stride(3) if flat is None else flat)
    image = channels * height * width * x.element_size()
    if config.head_is_one_launch(images, image, weight.nbytes, classes, launch.multiprocessors(x)):
        block = min(config.HEAD_CLASSES, max(16, 1 << (classes - 1).bit_length()))
        with launch.on_device(x):
            wrap_triton(pool_head_fwd_kernel)[(images * launch.cdiv(classes, block),)](
                x, weight, bias, y, channels, classes, width, height * width, *steps, *weight.stride(),
                *launch.strides(bias), FLAT=flat is not None, WIDE=launch.needs_wide_offsets(x, weight, y),
                CHANNELS=p.channels, PIXELS=p.pixels, CLASSES=block, num_warps=p.warps, **launch.chain(x),
            )  # fmt: skip
        return y
    means = torch.empty((images, channels), dtype=torch.float32, device=x.device)
    with launch.on_device(x):
        wrap_triton(pool_fwd_kernel)[(images * launch.cdiv(channels, p.channels),)](
            x, means, channels, width, height * width, *steps, FLAT=flat is not None,
            WIDE=launch.needs_wide_offsets(x), CHANNELS=p.channels, PIXELS=p.pixels,
            num_warps=p.warps, **launch.chain(x),
        )  # fmt: skip
        wrap_triton(head_fwd_kernel)[(c.programs(images, classes),)](
            means, weight, bias, y, images, channels, classes, *weight.stride(), *launch.strides(bias),
            PRECISION=launch.precision(x, convolution=False), WIDE=launch.needs_wide_offsets(weight, y),
            ROWS=c.rows, COLUMNS=c.columns, DEPTH=c.depth, num_warps=c.warps, num_stages=c.stages,
            **launch.chain(x),
        )  # fmt: skip
    return y


registry.implement("pool_head", pool_head)
