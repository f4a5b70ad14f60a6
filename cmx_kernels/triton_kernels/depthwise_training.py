"""depthwise_block in training: a = dwconv_same(X, weight) + bias with the moments of act(a), and its gradients.

X [N, C, H, W] and the gradient da are formed once, by a pass that writes them in the dtype of x: computing an
activation again for each of a convolution's reads (one a filter row on tensor cores, one a tap else) costs more than 4
bytes of traffic. [pred] bfloat16, 9x9, 32x32 planes, an H200, picoseconds an element: a pass 0.9 to 1.4, the
convolution 1.9 (bytes), dweight 4 (multiply-adds).

    a, dX      the kernels of depthwise_block.py; dX = conv^T(da) (+ grad) is a convolution by the turned filter
    dweight    depthwise_bwd_weight_kernel: multiply-adds, X formed as it is read, each number of it once
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from cmx_kernels import registry
from cmx_kernels.triton_kernels import config, launch
from cmx_kernels.triton_kernels.depthwise_block import convolve
from cmx_kernels.triton_kernels.launch import wrap_triton
from cmx_kernels.triton_kernels.statistics import finish_moments, finish_sums, value
from cmx_kernels.triton_kernels.training_passes import form_gradient, form_sum


@triton.jit
def depthwise_bwd_weight_kernel(
    x, da, rows, partials,
    images, channels, height, width, splits,
    x_n, x_c, x_h, x_w,
    KH: tl.constexpr, KW: tl.constexpr, ACT: tl.constexpr, WIDE: tl.constexpr,
    CHANNELS: tl.constexpr, COLUMNS: tl.constexpr, ROWS: tl.constexpr, KYS: tl.constexpr, KXS: tl.constexpr,
):  # fmt: skip
    """Parts of dweight[c, ky, kx] = sum of X[n, c, r + ky - TOP, j + kx - LEFT] da[n, c, r, j], KYS x KXS taps each.

    A program walks down ROWS rows of planes with a window of KYS rows of X; da of each row comes once for each kx. x
    and da have the same strides. Programs: channels fastest, then the groups of taps, then the shares of planes.
    """
    channel_tiles, column_tiles = tl.cdiv(channels, CHANNELS), tl.cdiv(width, COLUMNS)
    row_tiles = tl.cdiv(height, ROWS)
    c = tl.program_id(0) % channel_tiles * CHANNELS + tl.arange(0, CHANNELS)
    GROUPS: tl.constexpr = (KW + KXS - 1) // KXS
    group = tl.program_id(0) // channel_tiles % (GROUPS * ((KH + KYS - 1) // KYS))
    split = tl.program_id(0) // (channel_tiles * GROUPS * ((KH + KYS - 1) // KYS))
    ky, kx = group // GROUPS * KYS, group % GROUPS * KXS
    if WIDE:
        c = c.to(tl.int64)
    inside = c < channels
    up, left = (KH - 1) // 2 - ky, (KW - 1) // 2 - kx
    zero = tl.zeros([CHANNELS, COLUMNS], tl.float32)
    acc = ()
    for _ in tl.static_range(KXS * KYS):
        acc = acc + (zero,)
    for tile in range(split, images * row_tiles * column_tiles, splits):
        column = tile % column_tiles * COLUMNS + tl.arange(0, COLUMNS)
        first = tile // column_tiles % row_tiles * ROWS
        n = tile // (column_tiles * row_tiles)
        if WIDE:
            column, first, n = column.to(tl.int64), first.to(tl.int64), n.to(tl.int64)
        plane = n * x_n + c[:, None] * x_c
        x_inside = inside[:, None] & (column < width)[None, :]
        window = ()
        for _ in tl.static_range(KYS):
            window = window + (zero,)
        for above in range(KYS - 1):
            row = first + (above - up)
            here = x_inside & (row >= 0) & (row < height)
            v = tl.load(x + (plane + row * x_h + column[None, :] * x_w), mask=here, other=0).to(tl.float32)
            moved = ()
            for j in tl.static_range(1, KYS):
                moved = moved + (window[j],)
            window = moved + (tl.where(here, value(v, rows, channels, c, inside, ACT), 0.0),)
        for r in tl.range(first, tl.minimum(first + ROWS, height), disable_licm=True):
            row = r + (KYS - 1 - up)
            here = x_inside & (row >= 0) & (row < height)
            v = tl.load(x + (plane + row * x_h + column[None, :] * x_w), mask=here, other=0).to(tl.float32)
            moved = ()
            for j in tl.static_range(1, KYS):
                moved = moved + (window[j],)
            window = moved + (tl.where(here, value(v, rows, channels, c, inside, ACT), 0.0),)
            sums = ()
            for k in tl.static_range(KXS):
                beside = column + (left - k)
                here = inside[:, None] & ((beside >= 0) & (beside < width))[None, :]
                d = tl.load(da + (plane + r * x_h + beside[None, :] * x_w), mask=here, other=0).to(tl.float32)
                for i in tl.static_range(KYS):
                    sums = sums + (acc[k * KYS + i] + window[i] * d,)
            acc = sums
    for k in tl.static_range(KXS):
        for i in tl.static_range(KYS):
            to = partials + ((c * KH + ky + i) * KW + (kx + k)) * splits + split
            tl.store(to, tl.sum(acc[k * KYS + i], 1), mask=inside & (ky + i < KH) & (kx + k < KW))


def weight_gradient(x: Tensor, affine: Tensor | None, da: Tensor, act: str, dweight: Tensor) -> None:
    """Write dweight [C, 1, KH, KW] from x and da of the same strides."""
    (images, channels, height, width), (kh, kw) = x.shape, dweight.shape[2:]
    c = config.walk(launch.arch(x), width, launch.is_channels_last(x), kh, kw)
    groups = launch.cdiv(channels, c.channels) * launch.cdiv(kh, c.kernel_rows) * launch.cdiv(kw, c.kernel_columns)
    tiles = images * launch.cdiv(height, c.rows) * launch.cdiv(width, c.columns)
    splits = config.splits(tiles, groups, launch.multiprocessors(x))
    partials = torch.empty((channels * kh * kw, splits), dtype=torch.float32, device=x.device)
    with launch.on_device(x):
        wrap_triton(depthwise_bwd_weight_kernel)[(groups * splits,)](
            x, da, affine, partials, images, channels, height, width, splits, *da.stride(),
            KH=kh, KW=kw, ACT=act, WIDE=launch.needs_wide_offsets(x, da), CHANNELS=c.channels, COLUMNS=c.columns,
            ROWS=c.rows, KYS=c.kernel_rows, KXS=c.kernel_columns, num_warps=c.warps,
        )  # fmt: skip
        finish_sums(partials, dweight)


def _rows(v: Tensor | None) -> Tensor | None:
    return None if v is None else v.float().contiguous()


def depthwise_block_train(
    x: Tensor, affine: Tensor | None, weight: Tensor, bias: Tensor | None, act: str
) -> tuple[Tensor, Tensor]:
    a, moments = registry.new_output("depthwise_block_train", x, affine, weight, bias, act)
    if not a.numel():
        return a, moments.fill_(torch.nan)
    if affine is not None:
        x = form_sum(launch.dense(x, launch.is_channels_last(a)), _rows(affine), None, None, act)
    partials = convolve(x, weight, (bias, None, None), "none", False, a, out_act=act, statistics=3)
    assert partials is not None
    with launch.on_device(x):
        finish_moments(partials, moments)
    return a, moments


def depthwise_block_backward(
    grad: Tensor,
    a: Tensor,
    coefficients: Tensor,
    x: Tensor,
    affine: Tensor | None,
    weight: Tensor,
    act: str,
    residual: bool,
    need_input: bool,
    need_weight: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    args = (grad, a, coefficients, x, affine, weight, act, residual, need_input, need_weight)
    dx, dweight, dbias, sums = registry.new_output("depthwise_block_backward", *args)
    if not x.numel():
        return dx, dweight.zero_(), dbias.zero_(), sums.zero_()
    last, affine = x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous(), _rows(affine)
    grad, a, x = (launch.dense(t, last) for t in (grad, a, x))
    da = torch.empty_like(a)
    dbias_found = form_gradient(grad, a, coefficients, act, da)
    if need_input:
        pre, rows = (None, 0) if affine is None else (x, 2)
        skip = grad if residual else None
        partials = convolve(da, weight, (None, None, None), "none", False, dx, skip, True, act, rows, pre, affine)
        if partials is not None:
            with launch.on_device(x):
                finish_sums(partials, sums)
    if need_weight:
        weight_gradient(x, affine, da, act, dweight)
    return dx, dweight, dbias_found if need_weight else dbias, sums


registry.implement("depthwise_block_train", depthwise_block_train)
registry.implement("depthwise_block_backward", depthwise_block_backward)
