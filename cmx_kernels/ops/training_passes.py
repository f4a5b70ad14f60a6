"""The passes of training around products, and products with statistics: what CUDA C++ and Triton have kernels of.

x and its companions are contiguous, or all of them channels_last. What a product reads lies as it wants it ("product
layout"): [C, N, H, W] in memory, or, for channels_last, [N, H, W, C]. As tests on the CPU call them, they are their
references. What is made of them: training_products.py.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from cmx_kernels.ops import training
from cmx_kernels.ops.checks import compute_dtype, in_format, memory_format
from cmx_kernels.registry import define

LAST = torch.channels_last


def product_layout(t: Tensor, last: bool) -> Tensor:
    return t.contiguous(memory_format=LAST) if last else t.transpose(0, 1).contiguous().transpose(0, 1)


def is_last(x: Tensor) -> bool:
    return memory_format(x) == LAST


def sum_reference(
    x: Tensor, affine: Tensor | None, skip: Tensor | None, skip_affine: Tensor | None, act: str
) -> Tensor:
    u = training.sum_of(x, affine, skip, skip_affine, act)
    return product_layout(u.to(x.dtype), is_last(x)).clone()


def _new_in_product_layout(x: Tensor) -> Tensor:
    if is_last(x):
        return torch.empty_like(x)
    n, c, h, w = x.shape
    return x.new_empty((c, n, h, w)).transpose(0, 1)


def gradient_reference(grad: Tensor, a: Tensor, coefficients: Tensor, act: str) -> tuple[Tensor, Tensor]:
    da = training.gradient_of(grad, a, coefficients, act)
    return product_layout(da.to(a.dtype), is_last(a)), da.sum((0, 2, 3))


def _per_channel(like: Tensor, *rows: int) -> Tensor:
    return like.new_empty((*rows, like.shape[1]), dtype=compute_dtype(like))


def _no_products(*_: Any, **__: Any) -> int:
    return 0


define(
    "training_sum",
    "(Tensor x, Tensor? affine, Tensor? skip, Tensor? skip_affine, str act) -> Tensor",
    lambda x, *_: _new_in_product_layout(x),
    sum_reference,
    flops=_no_products,
)
define(
    "training_gradient",
    "(Tensor grad, Tensor a, Tensor coefficients, str act) -> (Tensor, Tensor)",
    lambda grad, a, *_: (_new_in_product_layout(a), _per_channel(a)),
    gradient_reference,
    flops=_no_products,
)
define(
    "training_moments",
    "(Tensor a, str act) -> Tensor",
    lambda a, act: _per_channel(a, 2),
    training.moments_of,
    flops=_no_products,
)
define(
    "training_sums",
    "(Tensor grad, Tensor x, Tensor affine, str act) -> Tensor",
    lambda grad, x, *_: _per_channel(x, 2),
    training.affine_sums,
    flops=_no_products,
)


def _product_and_moments(
    x: Tensor, weight: Tensor, bias: Tensor | None, act: str, channels_last: bool
) -> tuple[Tensor, Tensor]:
    a, moments = training.patch_embed_reference(x, weight, bias, act)
    return in_format(a, LAST if channels_last else torch.contiguous_format), moments


def _fake_product(
    x: Tensor, weight: Tensor, bias: Tensor | None, act: str, channels_last: bool
) -> tuple[Tensor, Tensor]:
    n, _, h, w = x.shape
    c, _, p, q = weight.shape
    layout = LAST if channels_last else torch.contiguous_format
    a = torch.empty((n, c, h // p, w // q), dtype=x.dtype, device=x.device, memory_format=layout)
    return a, _per_channel(a, 2)


# a = conv(x, weight, stride = kernel) + bias in the layout asked for, whatever that of x, and the moments of act(a)
define(
    "training_product",
    "(Tensor x, Tensor weight, Tensor? bias, str act, bool channels_last) -> (Tensor, Tensor)",
    _fake_product,
    _product_and_moments,
    flops=_no_products,
)


def _product_and_sums(da: Tensor, weight: Tensor, x: Tensor, affine: Tensor, act: str) -> tuple[Tensor, Tensor]:
    dtype = compute_dtype(x)
    dx = F.conv2d(da.to(dtype), weight.to(dtype).transpose(0, 1)).to(x.dtype)
    dx = in_format(dx, memory_format(x))
    return dx, training.affine_sums(dx, x, affine, act)


# dX = weight^T da in the layout of x, and the sums that training_sums takes of it
define(
    "training_product_sums",
    "(Tensor da, Tensor weight, Tensor x, Tensor affine, str act) -> (Tensor, Tensor)",
    lambda da, weight, x, *_: (torch.empty_like(x, memory_format=memory_format(x)), _per_channel(x, 2)),
    _product_and_sums,
    flops=_no_products,
)
