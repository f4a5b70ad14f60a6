"""pointwise_block and patch_embed of training as a GPU runs them (ops/training_products.py), whoever has the passes.

``passes`` has the four passes as torch.ops.cmx has them; the products are torch's. By the error rule. For 16-bit types
`plain` is torch in the same dtype: X, da and the bias are rounded, as eager's.
"""

from typing import Any

import torch
import training_cases as problems
from compare import Expected, check
from torch import Tensor

from cmx_kernels.ops import training
from cmx_kernels.ops import training_passes as reference
from cmx_kernels.ops import training_products as products

F32, F64 = torch.float32, torch.float64
PLAIN = torch.ops.cmx  # on the CPU: the references of the passes


def compare(got: tuple, ref: tuple, plain: tuple, magnitude: tuple, terms: tuple[int, ...]) -> None:
    for i, (out, *expected, count) in enumerate(zip(got, ref, plain, magnitude, terms, strict=False)):
        if out.numel():
            assert out.stride() == expected[1].stride(), f"result {i}"
            check(out, Expected(expected[0], expected[1].float(), expected[2], count, expected[1].dtype), f"result {i}")
        else:
            assert out.shape == expected[1].shape


def last(t: Tensor | None) -> Tensor | None:
    return None if t is None else t.contiguous(memory_format=torch.channels_last)


def check_pointwise(passes: Any, shape: tuple[int, ...], skips: int, dtype: torch.dtype, layout: str) -> None:
    """skips: 2 with an affine on both, 1 on a plain skip, 0 nothing but x"""
    n, cin, cout, h, w = shape
    x, skip = (problems.normal(n, cin, h, w, seed=i).to(dtype) for i in range(2))
    affine, other = (problems.rows(3, cin, seed=i) for i in (2, 3))
    weight = (problems.normal(cout, cin, 1, 1) * cin**-0.5).to(dtype)
    given = [x, affine if skips else None, skip if skips else None, other if skips == 2 else None]
    if layout == "channels_last":
        given[0], given[2] = last(given[0]), last(given[2])
    args = (*given, weight, problems.rows(1, cout)[0], "gelu")
    a, found = products.pointwise_train(passes, *args)
    ref = training.pointwise_reference(*problems.to(F64, args))
    positive = problems.positive_sum(*given, act="gelu")
    magnitude = training.pointwise_reference(*positive, weight.double().abs(), args[5].double().abs(), "none")
    plain = products.pointwise_train(PLAIN, *args)
    compare((a,), ref, plain, magnitude, (cin,))
    if n * h * w > 1:
        check(found, problems.expect_moments(a, "gelu"), "moments")

    grad = problems.normal(*a.shape, seed=5).to(dtype)
    k = problems.rows(4, cout, seed=6)
    back = (last(grad) if layout == "channels_last" else grad, plain[0], k, *given, weight, "gelu")
    for need in ((True, True), (True, False), (False, True)):
        got = products.pointwise_backward(passes, *back, *need)
        ref = training.pointwise_backward_reference(*problems.to(F64, (*back, *need)))
        plain_back = products.pointwise_backward(PLAIN, *back, *need)
        magnitude = training.pointwise_backward_reference(*problems.positive_pointwise_backward((*back, *need)))
        compare(got[:3], ref, plain_back, magnitude, (cout, n * h * w, n * h * w))
        if got[3].numel():
            check(got[3], problems.expect_sums(got[0], given[0], affine, "gelu"), "sums")
        else:
            assert plain_back[3].shape == got[3].shape


def check_patch_embed(passes: Any, shape: tuple[int, ...], dtype: torch.dtype, layout: str) -> None:
    n, cin, cout, h, w, p, q = shape
    x = problems.normal(n, cin, h, w).to(dtype)
    x = last(x) if layout == "channels_last" else x
    weight = (problems.normal(cout, cin, p, q) * (cin * p * q) ** -0.5).to(dtype)
    args = (x, weight, problems.rows(1, cout)[0], "gelu_tanh")
    a, found = products.patch_embed_train(passes, *args)
    plain = products.patch_embed_train(PLAIN, *args)
    sizes = [t.double().abs() for t in args[:3]]
    magnitude = training.patch_embed_reference(*sizes, "none")
    compare((a,), training.patch_embed_reference(*problems.to(F64, args)), plain, magnitude, (cin * p * q,))
    check(found, problems.expect_moments(a, "gelu_tanh"), "moments")
    grad = problems.normal(*a.shape, seed=5).to(dtype)
    back = (grad, plain[0], problems.rows(4, cout), x, weight, "gelu_tanh")
    for need in ((True, True), (False, True)):
        got = products.patch_embed_backward(passes, *back, *need)
        ref = training.patch_embed_backward_reference(*problems.to(F64, (*back, *need)))
        plain_back = products.patch_embed_backward(PLAIN, *back, *need)
        size = (*problems.positive_gradient(*back[:3], "gelu_tanh"), *sizes[:2], "none", *need)
        magnitude = training.patch_embed_backward_reference(*size)
        compare(got, ref, plain_back, magnitude, (cout, a.numel() // cout, a.numel() // cout, 1))


def check_passes(passes: Any, shape: tuple[int, ...], dtype: torch.dtype, act: str, layout: str) -> tuple[Tensor, ...]:
    """Each pass alone; returns what they returned."""
    x, skip = (problems.normal(*shape, seed=i).to(dtype) for i in range(2))
    if layout == "channels_last":
        x, skip = last(x), last(skip)
    affine, other, k = problems.rows(3, shape[1]), problems.rows(3, shape[1], 1), problems.rows(4, shape[1])
    u = passes.training_sum(x, affine, skip, other, act)
    da, dbias = passes.training_gradient(skip, x, k, act)
    found, sums = passes.training_moments(x, act), passes.training_sums(skip, x, affine, act)
    for out, function, args, size in (
        (u, reference.sum_reference, (x, affine, skip, other, act), problems.positive_sum(x, affine, skip, other, act)),
        (da, reference.gradient_reference, (skip, x, k, act), problems.positive_gradient(skip, x, k, act)),
    ):
        ref, plain = (function(*problems.to(d, args)) for d in (F64, F32))
        magnitude = function(*size, "none")
        if out is da:
            check(dbias, Expected(ref[1], plain[1], magnitude[1], x.numel() // shape[1], F32), "dbias")
            ref, plain, magnitude = ref[0], plain[0], magnitude[0]
        check(out, Expected(ref, plain, magnitude, 1, dtype))
    check(found, problems.expect_moments(x, act), "moments")
    check(sums, problems.expect_sums(skip, x, affine, act), "sums")
    return u, da, dbias, found, sums
