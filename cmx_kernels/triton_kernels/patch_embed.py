"""patch_embed: y[n, o, p] = scale * act(sum_k weight[o, k] patch[n, k, p] + bias) + shift, one product over patches

x [N, I, H, W], weight [O, I, P, Q], y [N, O, H // P, W // Q]. k runs through the pixels of a patch, (i, dy, dx), and
the columns through the patches of all images. A program takes one tile and reads pixels where they lie: no im2col.
"""

import triton
import triton.language as tl
from torch import Tensor

from cmx_kernels import registry
from cmx_kernels.triton_kernels import config, launch
from cmx_kernels.triton_kernels.activation import finish
from cmx_kernels.triton_kernels.launch import begin_chained, wrap_triton


@triton.jit
def patch_embed_fwd_kernel(
    x, weight, bias, scale, shift, y,
    columns, channels_in, channels_out, out_height, out_width,
    x_n, x_c, x_h, x_w, weight_o, weight_i, weight_h, weight_w, y_n, y_c, y_h, y_w,
    bias_stride, scale_stride, shift_stride,
    P: tl.constexpr, Q: tl.constexpr, ACT: tl.constexpr, PRECISION: tl.constexpr, WIDE: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr, CHAINED: tl.constexpr,
):  # fmt: skip
    begin_chained(CHAINED)
    row_tiles = tl.cdiv(channels_out, ROWS)
    tile = tl.program_id(0)
    o = tile % row_tiles * ROWS + tl.arange(0, ROWS)
    column = tile // row_tiles
    if WIDE:
        o, column = o.to(tl.int64), column.to(tl.int64)
    j = column * COLUMNS + tl.arange(0, COLUMNS)
    n, oy, ox = j // (out_height * out_width), j // out_width % out_height, j % out_width
    corner = x + n * x_n + oy * P * x_h + ox * Q * x_w
    o_inside, j_inside = o < channels_out, j < columns
    products = channels_in * (P * Q)
    acc = tl.zeros([ROWS, COLUMNS], tl.float32)
    for first in range(0, products, DEPTH):
        k = first + tl.arange(0, DEPTH)
        k_inside = k < products
        i, dy, dx = k // (P * Q), k // Q % P, k % Q
        if WIDE:
            i = i.to(tl.int64)
        a_at = weight + o[:, None] * weight_o + (i * weight_i + dy * weight_h + dx * weight_w)[None, :]
        b_at = corner[None, :] + (i * x_c + dy * x_h + dx * x_w)[:, None]
        a = tl.load(a_at, mask=o_inside[:, None] & k_inside[None, :], other=0)
        b = tl.load(b_at, mask=j_inside[None, :] & k_inside[:, None], other=0)
        acc = tl.dot(a, b, acc, input_precision=PRECISION)
    NARROW: tl.constexpr = y.dtype.element_ty.primitive_bitwidth == 16
    acc = finish(acc, o, o_inside, bias, scale, shift, bias_stride, scale_stride, shift_stride, ACT, NARROW)
    at = y + o[:, None] * y_c + (n * y_n + oy * y_h + ox * y_w)[None, :]
    tl.store(at, acc.to(y.dtype.element_ty), mask=o_inside[:, None] & j_inside[None, :])


def patch_embed(
    x: Tensor, weight: Tensor, bias: Tensor | None, scale: Tensor | None, shift: Tensor | None, act: str
) -> Tensor:
    y = registry.new_output("patch_embed", x, weight, bias, scale, shift, act)
    if y.numel() == 0:
        return y
    images, channels_out, out_height, out_width = y.shape
    columns, vectors, precision = images * out_height * out_width, (bias, scale, shift), launch.precision(x)
    c = config.patch_embed(launch.arch(x), x.dtype, precision)
    with launch.on_device(x):
        wrap_triton(patch_embed_fwd_kernel)[(c.programs(channels_out, columns),)](
            x, weight, *vectors, y, columns, x.shape[1], channels_out, out_height, out_width,
            *x.stride(), *weight.stride(), *y.stride(), *launch.strides(*vectors),
            P=weight.shape[2], Q=weight.shape[3], ACT=act, PRECISION=precision,
            WIDE=launch.needs_wide_offsets(x, weight, y), ROWS=c.rows, COLUMNS=c.columns, DEPTH=c.depth,
            num_warps=c.warps, num_stages=c.stages, **launch.chain(x),
        )  # fmt: skip
    return y


registry.implement("patch_embed", patch_embed)
