"""pointwise_block and patch_embed of training as CUDA runs them: the passes emulated, the products torch's on the CPU.

By the error rule. For 16-bit types `plain` is torch in the same dtype: X, da and the bias are rounded, as eager's.
"""

from collections.abc import Callable

import cases
import emulated_training
import pytest
import torch
import training_cases as problems
from compare import Expected, check, check_equal
from torch import Tensor

from cmx_kernels.ops import training
from cmx_kernels.ops import training_products as products

F32, BF16, F64 = torch.float32, torch.bfloat16, torch.float64
POINTWISE = ((2, 5, 7, 9, 11), (3, 16, 8, 4, 4), (1, 130, 3, 5, 8), (2, 1, 1, 3, 2), (4, 3, 70, 1, 1))
PATCH = ((2, 3, 10, 14, 14, 7, 7), (1, 2, 5, 9, 11, 2, 3))


PASSES = ("form_sum", "form_gradient", "moments", "sums")


@pytest.fixture
def plain_of(monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple]:
    """The passes are emulated, except inside a call of what this returns: the operator on plain torch."""
    references = {name: getattr(products, name) for name in PASSES}
    for name in PASSES:
        monkeypatch.setattr(products, name, getattr(emulated_training, name))

    def run(operator: Callable[..., tuple], *args: object) -> tuple:
        with monkeypatch.context() as inside:
            for name, reference in references.items():
                inside.setattr(products, name, reference)
            return operator(*args)

    return run


def compare(got: tuple, ref: tuple, plain: tuple, magnitude: tuple, terms: tuple[int, ...]) -> None:
    for i, (out, *expected, count) in enumerate(zip(got, ref, plain, magnitude, terms, strict=False)):
        if out.numel():
            assert out.stride() == expected[1].stride(), f"result {i}"
            check(out, Expected(expected[0], expected[1].float(), expected[2], count, expected[1].dtype), f"result {i}")
        else:
            assert out.shape == expected[1].shape


def last(t: Tensor | None) -> Tensor | None:
    return None if t is None else t.contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("layout", ("contiguous", "channels_last"))
@pytest.mark.parametrize("dtype", cases.DTYPES, ids=cases.name)
@pytest.mark.parametrize("skips", (2, 1, 0))
def test_pointwise(skips: int, dtype: torch.dtype, layout: str, plain_of: Callable[..., tuple]) -> None:
    """skips: with an affine on both, on a plain skip, nothing but x"""
    for shape in POINTWISE:
        n, cin, cout, h, w = shape
        x, skip = (problems.normal(n, cin, h, w, seed=i).to(dtype) for i in range(2))
        affine, other = (problems.rows(3, cin, seed=i) for i in (2, 3))
        weight = (problems.normal(cout, cin, 1, 1) * cin**-0.5).to(dtype)
        given = [x, affine if skips else None, skip if skips else None, other if skips == 2 else None]
        if layout == "channels_last":
            given[0], given[2] = last(given[0]), last(given[2])
        args = (*given, weight, problems.rows(1, cout)[0], "gelu")
        a, found = products.pointwise_train(*args)
        ref = training.pointwise_reference(*problems.to(F64, args))
        positive = problems.positive_sum(*given, act="gelu")
        magnitude = training.pointwise_reference(*positive, weight.double().abs(), args[5].double().abs(), "none")
        plain = plain_of(products.pointwise_train, *args)
        compare((a,), ref, plain, magnitude, (cin,))
        if n * h * w > 1:
            check(found, problems.expect_moments(a, "gelu"), "moments")

        grad = problems.normal(*a.shape, seed=5).to(dtype)
        k = problems.rows(4, cout, seed=6)
        back = (last(grad) if layout == "channels_last" else grad, plain[0], k, *given, weight, "gelu")
        for need in ((True, True), (True, False), (False, True)):
            got = products.pointwise_backward(*back, *need)
            ref = training.pointwise_backward_reference(*problems.to(F64, (*back, *need)))
            plain_back = plain_of(products.pointwise_backward, *back, *need)
            magnitude = training.pointwise_backward_reference(*problems.positive_pointwise_backward((*back, *need)))
            compare(got[:3], ref, plain_back, magnitude, (cout, n * h * w, n * h * w))
            if got[3].numel():
                check(got[3], problems.expect_sums(got[0], given[0], affine, "gelu"), "sums")
            else:
                assert plain_back[3].shape == got[3].shape


@pytest.mark.parametrize("layout", ("contiguous", "channels_last"))
@pytest.mark.parametrize("dtype", (F32, BF16), ids=cases.name)
def test_patch_embed(dtype: torch.dtype, layout: str, plain_of: Callable[..., tuple]) -> None:
    for shape in PATCH:
        n, cin, cout, h, w, p, q = shape
        x = problems.normal(n, cin, h, w).to(dtype)
        x = last(x) if layout == "channels_last" else x
        weight = (problems.normal(cout, cin, p, q) * (cin * p * q) ** -0.5).to(dtype)
        args = (x, weight, problems.rows(1, cout)[0], "gelu_tanh")
        a, found = products.patch_embed_train(*args)
        plain = plain_of(products.patch_embed_train, *args)
        sizes = [t.double().abs() for t in args[:3]]
        magnitude = training.patch_embed_reference(*sizes, "none")
        compare((a,), training.patch_embed_reference(*problems.to(F64, args)), plain, magnitude, (cin * p * q,))
        check(found, problems.expect_moments(a, "gelu_tanh"), "moments")
        grad = problems.normal(*a.shape, seed=5).to(dtype)
        back = (grad, plain[0], problems.rows(4, cout), x, weight, "gelu_tanh")
        for need in ((True, True), (False, True)):
            got = products.patch_embed_backward(*back, *need)
            ref = training.patch_embed_backward_reference(*problems.to(F64, (*back, *need)))
            plain_back = plain_of(products.patch_embed_backward, *back, *need)
            size = (*problems.positive_gradient(*back[:3], "gelu_tanh"), *sizes[:2], "none", *need)
            magnitude = training.patch_embed_backward_reference(*size)
            compare(got, ref, plain_back, magnitude, (cout, a.numel() // cout, a.numel() // cout, 1))


ROWS = (((3, 5, 7, 9), "gelu"), ((2, 70, 4, 8), "relu"), ((300, 2, 2, 2), "gelu_tanh"), ((1, 6, 3, 3), "none"))


@pytest.mark.parametrize(("shape", "act"), ROWS, ids=cases.name)
@pytest.mark.parametrize("dtype", (F32, BF16), ids=cases.name)
@pytest.mark.parametrize("layout", ("contiguous", "channels_last"))
def test_passes(
    layout: str, dtype: torch.dtype, shape: tuple[int, ...], act: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each pass alone, sizes around four; any order of threads gives the same bits."""
    e = emulated_training
    x, skip = (problems.normal(*shape, seed=i).to(dtype) for i in range(2))
    if layout == "channels_last":
        x, skip = last(x), last(skip)
    affine, other, k = problems.rows(3, shape[1]), problems.rows(3, shape[1], 1), problems.rows(4, shape[1])

    def everything() -> tuple[Tensor, ...]:
        u, m, s = e.form_sum(x, affine, skip, other, act), e.moments(x, act), e.sums(skip, x, affine, act)
        return (u, *e.form_gradient(skip, x, k, act), m, s)

    u, da, dbias, found, sums = first = everything()
    for out, function, args, size in (
        (u, products._sum_reference, (x, affine, skip, other, act), problems.positive_sum(x, affine, skip, other, act)),
        (da, products._gradient_reference, (skip, x, k, act), problems.positive_gradient(skip, x, k, act)),
    ):
        ref, plain = (function(*problems.to(d, args)) for d in (F64, F32))
        magnitude = function(*size, "none")
        if out is da:
            check(dbias, Expected(ref[1], plain[1], magnitude[1], x.numel() // shape[1], F32), "dbias")
            ref, plain, magnitude = ref[0], plain[0], magnitude[0]
        check(out, Expected(ref, plain, magnitude, 1, dtype))
    check(found, problems.expect_moments(x, act), "moments")
    check(sums, problems.expect_sums(skip, x, affine, act), "sums")
    for order in (1, 2):
        monkeypatch.setattr(e, "ORDER", order)
        for out, same in zip(everything(), first, strict=True):
            check_equal(out, same)


@pytest.mark.parametrize("layout", ("contiguous", "channels_last"))
def test_opcheck(layout: str) -> None:
    x, affine = problems.normal(2, 3, 4, 5).float(), problems.rows(3, 3)
    x = last(x) if layout == "channels_last" else x
    for name, args in (
        ("training_sum", (x, affine, x, None, "gelu")),
        ("training_gradient", (x, x, problems.rows(4, 3), "gelu")),
        ("training_moments", (x, "relu")),
        ("training_sums", (x, x, affine, "none")),
    ):
        operator = getattr(torch.ops.cmx, name).default
        found = torch.library.opcheck(operator, args, test_utils=("test_schema", "test_faketensor"))
        assert set(found.values()) == {"SUCCESS"}, name
