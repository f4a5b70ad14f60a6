"""The operators with a BatchNorm on the statistics of its batch: y, mean, var.

    a = conv(x, weight) + bias
    y = (act(a) - mean) / sqrt(biased var + eps) * gamma + beta (+ x)

mean and var are over N, H, W; var is the unbiased one, for running statistics. Gradients for x, weight, bias, gamma
and beta; mean and var have none. Pre-activations are kept for backward, nothing else.
"""

from functools import partial
from typing import Any

import torch
from torch import Tensor

from cmx_kernels import backends
from cmx_kernels.ops import training
from cmx_kernels.ops.batchnorm import Norm
from cmx_kernels.ops.checks import autocast, autocast_is_on
from cmx_kernels.ops.depthwise_block import check as check_depthwise
from cmx_kernels.ops.differentiable import Unit, Value
from cmx_kernels.ops.patch_embed import check as check_patches
from cmx_kernels.ops.pointwise_block import check as check_pointwise

Trained = tuple[Tensor, Tensor, Tensor]


def patches_forward(x: Tensor, weight: Tensor, bias: Tensor | None, *, act: str, backend: str) -> Any:
    return training.patch_embed_train(x, weight, bias, act, backend=backend)


def patches_backward(
    grad: Tensor, a: Tensor, k: Tensor, x: Tensor, weight: Tensor, *need: bool, act: str, backend: str
) -> Any:
    return training.patch_embed_backward(grad, a, k, x, weight, act, *need, backend=backend)


def _depthwise_forward(x: Tensor, weight: Tensor, bias: Tensor | None, *, act: str, backend: str) -> Any:
    return training.depthwise_train(x, None, weight, bias, act, backend=backend)


def _depthwise_backward(
    grad: Tensor, a: Tensor, k: Tensor, x: Tensor, weight: Tensor, *need: bool, act: str, backend: str
) -> Any:
    return training.depthwise_backward(grad, a, k, x, None, weight, act, False, *need, backend=backend)


def _pointwise_forward(x: Tensor, weight: Tensor, bias: Tensor | None, *, act: str, backend: str) -> Any:
    return training.pointwise_train(x, None, None, None, weight, bias, act, backend=backend)


def _pointwise_backward(
    grad: Tensor, a: Tensor, k: Tensor, x: Tensor, weight: Tensor, *need: bool, act: str, backend: str
) -> Any:
    return training.pointwise_backward(grad, a, k, x, None, None, None, weight, act, *need, backend=backend)


_OPS = {
    "patch_embed": (check_patches, patches_forward, patches_backward),
    "depthwise_block": (check_depthwise, _depthwise_forward, _depthwise_backward),
    "pointwise_block": (check_pointwise, _pointwise_forward, _pointwise_backward),
}


def _run(name: str, x: Tensor, weight: Tensor, vectors: tuple[Any, Any, Any], act: str, eps: float) -> Trained:
    if autocast_is_on(x):
        x, weight = autocast(x, weight)
        with torch.autocast(x.device.type, enabled=False):
            return _run(name, x, weight, vectors, act, eps)
    if backends.transformed():
        raise RuntimeError(
            f"{name}_train: {backends.TRANSFORMED}; {name} without scale, shift and residual, and after it "
            f"torch.nn.functional.batch_norm(training=True), is made of such"
        )
    check, forward, backward = _OPS[name]
    check(x, weight, *vectors, act)
    backend = backends.select(f"{name}_train", x, act)  # says, or with a forced backend raises, what does not run
    run = partial(forward, act=act, backend=backend), partial(backward, act=act, backend=backend)
    a, rows, moments = Unit.apply(*run, x, weight, *vectors, Norm(eps))
    mean, var = moments.detach()
    return Value.apply(a, rows, moments, act), mean, var


def patch_embed_train(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    gamma: Tensor | None = None,
    beta: Tensor | None = None,
    act: str = "gelu",
    eps: float = 1e-5,
) -> Trained:
    """x [N, Cin, H, W], weight [C, Cin, p, q], vectors [C] or None -> y [N, C, H // p, W // q], mean [C], var [C]

    Raises:
        TypeError, ValueError: as patch_embed; one value per channel has no variance.
        RuntimeError: under torch.func and forward-mode differentiation; so do the two below.
    """
    return _run("patch_embed", x, weight, (bias, gamma, beta), act, eps)


def depthwise_block_train(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    gamma: Tensor | None = None,
    beta: Tensor | None = None,
    act: str = "gelu",
    residual: bool = True,
    eps: float = 1e-5,
) -> Trained:
    """x [N, C, H, W], weight [C, 1, kh, kw], vectors [C] or None -> y [N, C, H, W], mean [C], var [C]

    Raises:
        TypeError, ValueError: as depthwise_block; one value per channel has no variance.
    """
    y, mean, var = _run("depthwise_block", x, weight, (bias, gamma, beta), act, eps)
    return y + x.to(y.dtype) if residual else y, mean, var


def pointwise_block_train(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    gamma: Tensor | None = None,
    beta: Tensor | None = None,
    act: str = "gelu",
    eps: float = 1e-5,
) -> Trained:
    """x [N, Cin, H, W], weight [C, Cin, 1, 1], vectors [C] or None -> y [N, C, H, W], mean [C], var [C]

    Raises:
        TypeError, ValueError: as pointwise_block; one value per channel has no variance.
    """
    return _run("pointwise_block", x, weight, (bias, gamma, beta), act, eps)
