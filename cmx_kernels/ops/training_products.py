"""pointwise_block and patch_embed of training on a GPU: passes that form X, da and the sums, and the products.

On CUDA in 16-bit types the products of the forward pass and of the input's gradient are ours (csrc/cuda/product*.cu):
moments, and sums of the gradient, are taken of their tiles while they are in shared memory, which saves the passes that
read a, and dX. Products are torch's own in float32, where cuBLAS follows allow_tf32 and wgmma multiplies no TF32 out of
planes; on tensor cores that neither mma.sync nor wgmma feeds at their rate (compute capability 10 and 11); in Triton.

What a product reads, X and da, is written once in x's dtype and freed after the call: nothing more is kept for backward
than the operators' contract says. Products add in float32, or in TF32 where torch.backends.cuda.matmul.allow_tf32 says
so; torch's product gives a 16-bit pre-activation its bias in its own dtype, as nn.Conv2d does. ``passes`` holds the
operators of training_passes.py: torch.ops.cmx has them in CUDA C++, torch.ops.cmx_triton in Triton.
"""

import functools
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from cmx_kernels.ops import training
from cmx_kernels.ops.checks import in_format, memory_format
from cmx_kernels.ops.training import Gradients
from cmx_kernels.ops.training_passes import LAST, is_last
from cmx_kernels.registry import compose

# ---- the products, on tensors in product layout


def _is_ours(passes: Any, x: Tensor) -> bool:
    """Whether a product of x takes its statistics itself."""
    if x.dtype == torch.float32 or passes is torch.ops.cmx_triton:
        return False
    return not x.is_cuda or _mma_has_its_rate(x.device)


@functools.cache
def _mma_has_its_rate(device: torch.device) -> bool:
    return torch.cuda.get_device_capability(device)[0] not in (10, 11)


def _matrix(t: Tensor, last: bool) -> Tensor:
    """[N, C, H, W] in product layout -> [C, N * H * W], a view"""
    return t.permute(0, 2, 3, 1).reshape(-1, t.shape[1]).t() if last else t.transpose(0, 1).reshape(t.shape[1], -1)


def _product(weight: Tensor, u: Tensor, bias: Tensor | None, last: bool) -> Tensor:
    """weight [O, K] times u [N, K, H, W] -> [N, O, H, W] in x's own layout"""
    n, _, h, w = u.shape
    out = weight.shape[0]
    bias = None if bias is None else bias.to(u.dtype)
    if last:
        flat = _matrix(u, last).t()
        found = flat @ weight.t() if bias is None else torch.addmm(bias, flat, weight.t())
        return found.view(n, h, w, out).permute(0, 3, 1, 2)
    weights, pixels = weight.expand(n, *weight.shape), u.flatten(2)
    if bias is None:
        return torch.bmm(weights, pixels).view(n, out, h, w)
    return torch.baddbmm(bias.view(1, -1, 1).expand(n, out, h * w), weights, pixels).view(n, out, h, w)


def _outer(da: Tensor, u: Tensor, last: bool) -> Tensor:
    """sum over pixels of da [N, O, H, W] times u [N, K, H, W] -> [O, K], added and returned in float32

    On a GPU too it is torch's: bound by the tensor cores, with nothing to fuse (numbers: csrc/cuda/README.md).
    """
    left, right = _matrix(da, last), _matrix(u, last).t()
    if da.dtype == torch.float32 or not da.is_cuda:  # torch has no such product on the CPU
        return torch.mm(left.float(), right.float())
    return torch.mm(left, right, out_dtype=torch.float32)


def _forward(
    passes: Any, weight: Tensor, u: Tensor, bias: Tensor | None, act: str, last: bool
) -> tuple[Tensor, Tensor]:
    if _is_ours(passes, u):
        return passes.training_product(u, weight, bias, act, last)
    a = in_format(_product(weight.flatten(1), u, bias, last), LAST if last else torch.contiguous_format)
    return a, passes.training_moments(a, act)


def pointwise_train(
    passes: Any,
    x: Tensor,
    affine: Tensor | None,
    skip: Tensor | None,
    skip_affine: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    act: str,
) -> tuple[Tensor, Tensor]:
    if x.dtype == torch.float64:
        return training.pointwise_reference(x, affine, skip, skip_affine, weight, bias, act)
    layout = memory_format(x)
    x, skip = in_format(x, layout), None if skip is None else in_format(skip, layout)
    plain = affine is None and skip is None
    u = x if plain else passes.training_sum(x, affine, skip, skip_affine, act)
    return _forward(passes, weight, u, bias, act, layout == LAST)


def pointwise_backward(
    passes: Any,
    grad: Tensor,
    a: Tensor,
    coefficients: Tensor,
    x: Tensor,
    affine: Tensor | None,
    skip: Tensor | None,
    skip_affine: Tensor | None,
    weight: Tensor,
    act: str,
    need_input: bool,
    need_weight: bool,
) -> Gradients:
    if x.dtype == torch.float64:
        args = (grad, a, coefficients, x, affine, skip, skip_affine, weight, act, need_input, need_weight)
        return training.pointwise_backward_reference(*args)
    layout = memory_format(x)
    grad, a, x = (in_format(t, layout) for t in (grad, a, x))
    skip = None if skip is None else in_format(skip, layout)
    last = layout == LAST
    da, dbias = passes.training_gradient(grad, a, coefficients, act)
    dx = dweight = found = None
    if need_weight:
        dweight = _outer(da, passes.training_sum(x, affine, skip, skip_affine, act), last).view_as(weight)
    if need_input and affine is not None and _is_ours(passes, da):
        dx, found = passes.training_product_sums(da, weight, x, affine, act)
    elif need_input:
        dx = in_format(_product(weight.flatten(1).t(), da, None, last), layout)
        found = None if affine is None else passes.training_sums(dx, x, affine, act)
    dx = x.new_empty(0) if dx is None else dx
    return dx, _given(dweight, x), _given(dbias if need_weight else None, x), _given(found, x)


def _given(t: Tensor | None, x: Tensor) -> Tensor:
    """float32, empty where it is not wanted; an operator returns no tensor twice"""
    return x.new_empty(0, dtype=torch.float32) if t is None else t


def _whole(k: int) -> int:
    """k rounded up to rows of 16 bytes, which tensor cores and TMA want: a 7x7 patch has 147 numbers."""
    return (k + 7) // 8 * 8


def _patches(x: Tensor, weight: Tensor, last: bool) -> Tensor:
    """[N, Cin, H, W] -> [N, Cin * p * q, H / p, W / q] in product layout, zeros behind; the image's rest is dropped

    The product could read them where they lie, number by number, but is predicted to take 319 us so on an H200 for the
    stem of 1536/20 at batch 64, and 91 us on patches laid out like this (cost_model.product, bf16).
    """
    n, channels, p, q = x.shape[0], *weight.shape[1:]
    h, w, k = x.shape[2] // p, x.shape[3] // q, channels * p * q
    cut = x[:, :, : h * p, : w * q].reshape(n, channels, h, p, w, q)
    if last:
        rows = x.new_zeros((n, h, w, _whole(k)))
        rows[..., :k].unflatten(-1, (channels, p, q)).copy_(cut.permute(0, 2, 4, 1, 3, 5))
        return rows.permute(0, 3, 1, 2)
    planes = x.new_zeros((_whole(k), n, h, w))
    planes[:k].unflatten(0, (channels, p, q)).copy_(cut.permute(1, 3, 5, 0, 2, 4))
    return planes.transpose(0, 1)


def _image(patches: Tensor, x: Tensor, weight: Tensor) -> Tensor:
    """The inverse, zeros where the image was dropped"""
    n, channels, p, q = x.shape[0], *weight.shape[1:]
    h, w = patches.shape[2:]
    image = patches.reshape(n, channels, p, q, h, w).permute(0, 1, 4, 2, 5, 3).reshape(n, channels, h * p, w * q)
    return F.pad(image, (0, x.shape[3] - w * q, 0, x.shape[2] - h * p))


def patch_embed_train(passes: Any, x: Tensor, weight: Tensor, bias: Tensor | None, act: str) -> tuple[Tensor, Tensor]:
    if x.dtype == torch.float64:
        return training.patch_embed_reference(x, weight, bias, act)
    last = is_last(x)
    flat = weight.flatten(1)
    flat = F.pad(flat, (0, _whole(flat.shape[1]) - flat.shape[1]))
    return _forward(passes, flat[:, :, None, None], _patches(x, weight, last), bias, act, last)


def patch_embed_backward(
    passes: Any,
    grad: Tensor,
    a: Tensor,
    coefficients: Tensor,
    x: Tensor,
    weight: Tensor,
    act: str,
    need_input: bool,
    need_weight: bool,
) -> Gradients:
    if x.dtype == torch.float64:
        return training.patch_embed_backward_reference(grad, a, coefficients, x, weight, act, need_input, need_weight)
    layout = memory_format(x)
    grad, a = in_format(grad, layout), in_format(a, layout)
    last = layout == LAST
    da, dbias = passes.training_gradient(grad, a, coefficients, act)
    nothing = x.new_empty(0, dtype=torch.float32)
    dx, dweight = x.new_empty(0), x.new_empty(0, dtype=torch.float32)
    if need_weight:
        found = _outer(da, _patches(x, weight, last), last)
        dweight = found[:, : weight[0].numel()].contiguous().view(weight.shape)
    if need_input:
        dx = in_format(_image(_product(weight.flatten(1).t(), da, None, last), x, weight), layout)
    return dx, dweight, dbias if need_weight else nothing.clone(), nothing


for _name, _function in (
    ("pointwise_block_train", pointwise_train),
    ("pointwise_block_backward", pointwise_backward),
    ("patch_embed_train", patch_embed_train),
    ("patch_embed_backward", patch_embed_backward),
):
    compose(_name, _function)
