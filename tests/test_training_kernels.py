"""The CPU kernels of training against float64, at every instruction set: values, gradients, moments and sums."""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from compare import Expected, check
from torch import Tensor

from cmx_kernels import registry
from cmx_kernels.ops import training

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
LAYOUTS = [torch.contiguous_format, torch.channels_last]
DEPTHWISE = [
    (2, 24, 9, 11, 5, 5),
    (1, 33, 7, 7, 9, 8),
    (2, 16, 16, 16, 3, 7),
    (1, 20, 4, 5, 11, 2),
    (1, 5, 1, 13, 31, 31),
]
POINTWISE = [(2, 24, 9, 11, 31), (1, 33, 7, 7, 16), (3, 65, 1, 50, 70), (1, 16, 20, 30, 5)]
PATCHES = [(2, 3, 14, 21, 7, 7, 24), (3, 3, 13, 9, 2, 4, 17), (1, 4, 8, 40, 1, 20, 5)]
Op = Callable[..., tuple[Tensor, ...]]


def check_outputs(
    op: Op, reference: Op, args: tuple[Any, ...], terms: int, names: tuple[str, ...]
) -> tuple[Tensor, ...]:
    """The named outputs under the error rule; the rest is returned for the caller to check."""

    def cast(dtype: torch.dtype) -> tuple[Any, ...]:
        return tuple(a.to(dtype) if isinstance(a, Tensor) else a for a in args)

    out = op(*args)
    ref = reference(*cast(torch.float64))
    with stored_in(args[0].dtype):
        plain = reference(*cast(torch.float32))
    for name, a, exact, single in zip(names, out, ref, plain, strict=False):
        # gradients pass through sums of up to `terms` products of numbers as large as the largest
        magnitude = torch.full_like(exact, float(exact.abs().max()) * 4)
        check(a, Expected(exact, single, magnitude, terms, a.dtype), name)
    return out


@contextmanager
def stored_in(dtype: torch.dtype) -> Iterator[None]:
    """Where products take bfloat16 pairs, their operands are rounded as eager PyTorch rounds what it stores."""
    if dtype != torch.bfloat16 or registry.C.isa_level() not in ("avx512bf16", "amx"):
        yield
        return
    value, backward = training.value, training.activation_backward
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training, "value", lambda *args: value(*args).to(dtype).float())
        patch.setattr(training, "activation_backward", lambda *args: backward(*args).to(dtype).float())
        yield


def random(dtype: torch.dtype, layout: torch.memory_format, *shape: int) -> Tensor:
    return torch.randn(shape).to(dtype).contiguous(memory_format=layout)


def affine(c: int) -> Tensor:
    return torch.stack((torch.randn(c), torch.rand(c) + 0.5, torch.randn(c)))


def check_moments(a: Tensor, moments: Tensor, act: str, origin: float = 0.25) -> None:
    """Of what was stored: rounding is not the moments' fault. Sums of K values may lose what the error rule gives them.

    origin: how far the value from which differences are taken may be from the mean, in parts of the largest difference.
    """
    g = training.value(a.double(), None, act) if act == "none" else training.activation(act)(a.double())
    var, mean = torch.var_mean(g, (0, 2, 3), correction=0)
    u = torch.finfo(torch.float32).eps / 2
    lost = (math.sqrt(g[:, 0].numel()) + 3) * u
    off = origin * (g - mean[:, None, None]).abs().amax((0, 2, 3))
    own = 3e-7 if act in ("gelu", "gelu_tanh") else 0.0  # how far the kernels' activation may be from the function
    for name, found, exact, allowed in (
        ("mean", moments[0], mean, lost * (var.sqrt() + off) + u * mean.abs() + own),
        ("variance", moments[1], var, lost * (var + off**2) + 2 * own * var.sqrt() + own**2),
    ):
        worst = ((found.double() - exact).abs() / (allowed + 1e-30)).max()
        assert worst <= 1, f"{name}: {worst:.2g} times what is allowed"


def test_moments_with_outliers(isa: str) -> None:
    """Most values of a channel are zero, and a piece of its sums may begin with one that is far from them."""
    x, weight = torch.randn(4, 3, 32, 32), torch.randn(256, 3, 2, 2) / 5
    with torch.no_grad():
        a, moments = training.patch_embed_train(
            x.contiguous(memory_format=torch.channels_last), weight, torch.zeros(256), "relu"
        )
    check_moments(a, moments, "relu", origin=0)


def check_sums(dx: Tensor, x: Tensor, rows: Tensor, act: str, sums: Tensor) -> None:
    exact = training.affine_sums(dx.double(), x.double(), rows.double(), act)
    size = training.affine_sums(dx.double().abs(), x.double(), rows.double(), act).abs().max() + dx.double().abs().sum()
    assert (sums.double() - exact).abs().max() <= 2e-6 * size


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", DEPTHWISE, ids=str)
def test_depthwise(isa: str, shape: tuple[int, ...], dtype: torch.dtype, layout: torch.memory_format) -> None:
    n, c, h, w, kh, kw = shape
    x, grad = (random(dtype, layout, n, c, h, w) for _ in range(2))
    weight, bias, k = random(dtype, LAYOUTS[0], c, 1, kh, kw) / (kh * kw) ** 0.5, torch.randn(c), torch.randn(4, c)
    for act in ("gelu", "relu", "gelu_tanh", "none"):
        for rows in (None, affine(c)):
            forward = (x, rows, weight, bias, act)
            terms = kh * kw
            names = ("a",)
            a, moments = check_outputs(training.depthwise_train, training.depthwise_reference, forward, terms, names)
            check_moments(a, moments, act)
            backward = (grad, a, k, x, rows, weight, act, rows is None, True, True)
            found = check_outputs(
                training.depthwise_backward,
                training.depthwise_backward_reference,
                backward,
                n * h * w + terms,
                ("dx", "dweight", "dbias"),
            )
            if rows is not None:
                check_sums(found[0], x, rows, act, found[3])


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", POINTWISE, ids=str)
def test_pointwise(isa: str, shape: tuple[int, ...], dtype: torch.dtype, layout: torch.memory_format) -> None:
    n, c, h, w, out = shape
    x, skip = (random(dtype, layout, n, c, h, w) for _ in range(2))
    weight, bias, k = random(dtype, LAYOUTS[0], out, c, 1, 1) / c**0.5, torch.randn(out), torch.randn(4, out)
    grad = random(dtype, layout, n, out, h, w)
    for act, rows, second in (
        ("gelu", affine(c), (skip, affine(c))),
        ("relu", affine(c), (skip, None)),
        ("none", None, (None, None)),
    ):
        forward = (x, rows, *second, weight, bias, act)
        a, moments = check_outputs(training.pointwise_train, training.pointwise_reference, forward, c, ("a",))
        check_moments(a, moments, act)
        backward = (grad, a, k, x, rows, *second, weight, act, True, True)
        found = check_outputs(
            training.pointwise_backward,
            training.pointwise_backward_reference,
            backward,
            n * h * w + out,
            ("dx", "dweight", "dbias"),
        )
        if rows is not None:
            check_sums(found[0], x, rows, act, found[3])


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", PATCHES, ids=str)
def test_patches(isa: str, shape: tuple[int, ...], dtype: torch.dtype, layout: torch.memory_format) -> None:
    n, c, h, w, p, q, out = shape
    x, grad = random(dtype, layout, n, c, h, w), random(dtype, layout, n, out, h // p, w // q)
    weight, k = random(dtype, LAYOUTS[0], out, c, p, q) / (c * p * q) ** 0.5, torch.randn(4, out)
    forward = (x, weight, None, "gelu")
    a, moments = check_outputs(training.patch_embed_train, training.patch_embed_reference, forward, c * p * q, ("a",))
    check_moments(a, moments, "gelu")
    check_outputs(
        training.patch_embed_backward,
        training.patch_embed_backward_reference,
        (grad, a, k, x, weight, "gelu", True, True),
        grad[:, 0].numel() + out,
        ("dx", "dweight", "dbias"),
    )
