"""The binding of the CUDA kernels of training, as test_cuda_binding.py: values, layouts, refusals, on CPU tensors."""

import cases
import emulated_binding
import pytest
import torch
import training_cases as problems
from compare import Expected, check, check_equal
from product_checks import check_passes, check_patch_embed, check_pointwise
from test_cuda_binding import (
    BF16,
    F32,
    LAYOUTS,
    OURS,
    both_types,
    launches,
    nothing_asked_before,
    pytestmark,
)
from torch import Tensor

from cmx_kernels.ops import training

TENSOR_CORES = (3, 40, 16, 16, 9, 9)  # for both gradients of 16-bit types, by the cost model of an H200
IN_PLANES = (1, 24, 34, 40, 31, 27)  # whose gradients are copied from channels_last to NCHW for them, and back
__all__ = ["nothing_asked_before", "pytestmark"]  # for every test here too


@pytest.mark.parametrize("layout", ("contiguous", "channels_last", "channel_slice"))
@both_types
def test_depthwise_training(dtype: torch.dtype, layout: str) -> None:
    halves = dtype != F32  # what tensor cores take: they round x' behind an affine
    for shape in ((2, 3, 9, 11, 5, 4), TENSOR_CORES, IN_PLANES):
        last = layout == "channels_last"
        tensor_cores = shape == IN_PLANES or (shape == TENSOR_CORES and not last)  # for the gradients
        x, *rest = problems.depthwise_inputs(shape, dtype, affine=not halves)
        args = (cases.LAYOUTS[layout](x), *rest)
        a, moments = OURS.depthwise_block_train(*args)
        assert launches()
        check(a, problems.expect_pre_activation(args), f"{shape}")
        check(moments, problems.expect_moments(a, args[-1]), f"moments of {shape}")
        back = problems.backward_inputs(args, a)
        found = OURS.depthwise_block_backward(*back)
        assert found[0].is_contiguous(memory_format=torch.channels_last if last else torch.contiguous_format)
        for out, *expected in zip(
            found[:3],
            problems.expect_gradients(back, rounded=halves and tensor_cores),
            ("dx", "dweight", "dbias"),
            strict=True,
        ):
            check(out, *expected)
        assert launches()


@pytest.mark.parametrize("affine", (True, False))
def test_gradients_in_planes_that_are_not_needed(affine: bool) -> None:
    args = problems.depthwise_inputs(IN_PLANES, torch.bfloat16, affine=affine)
    a = problems.expect_pre_activation(args).ref.to(torch.bfloat16)
    back = problems.backward_inputs(args, a)
    back = [cases.LAYOUTS["channels_last"](t) if isinstance(t, Tensor) and t.shape == a.shape else t for t in back[:8]]
    everything = OURS.depthwise_block_backward(*back, True, True)
    for need_input, need_weight in ((True, False), (False, True), (False, False)):
        found = OURS.depthwise_block_backward(*back, need_input, need_weight)
        for out, same, wanted in zip(
            found, everything, (need_input, need_weight, need_weight, need_input), strict=True
        ):
            check_equal(out, same if wanted else same.new_empty(0))
    assert launches()


@pytest.mark.parametrize("layout", ("contiguous", "channels_last"))
@both_types
def test_passes_of_training(dtype: torch.dtype, layout: str) -> None:
    emulated_binding.library()
    check_passes(OURS, (3, 5, 7, 9), dtype, "gelu", layout)
    check_pointwise(OURS, (2, 5, 7, 9, 11), 2, dtype, layout)
    check_patch_embed(OURS, (1, 2, 5, 9, 11, 2, 3), dtype, layout)
    assert launches()


@pytest.mark.parametrize("last", (False, True))
def test_product_of_training(last: bool) -> None:
    """From every layout into the one that is asked for, in which the fake promises it; patches; nothing at all."""
    for layout in (*LAYOUTS, "product"):
        x, weight = problems.normal(3, 16, 8, 6).to(BF16), (problems.normal(5, 16, 2, 3) / 8).to(BF16)
        x = x.transpose(0, 1).contiguous().transpose(0, 1) if layout == "product" else cases.LAYOUTS[layout](x)
        for w in (weight, weight[:, :, :1, 1:2]):
            args = (x, w, problems.rows(1, 5)[0].to(BF16), "gelu")
            ref, plain = (training.patch_embed_reference(*problems.to(d, args))[0] for d in (torch.float64, F32))
            magnitude = training.patch_embed_reference(*(t.double().abs() for t in args[:3]), "none")[0]
            a, moments = OURS.training_product(*args, last)
            assert launches()
            check(a, Expected(ref, plain, magnitude, w[0].numel(), BF16), layout)
            check(moments, problems.expect_moments(a, "gelu"), layout)
            promise = torch.ops.cmx.training_product(*(t.to("meta") for t in args[:3]), "gelu", last)
            assert a.stride() == promise[0].stride()
    for n, c_in, c_out in ((0, 3, 5), (2, 3, 0)):
        args = (x.new_empty(n, c_in, 4, 4), x.new_empty(c_out, c_in, 1, 1), None, "relu")
        a, moments = OURS.training_product(*args, last)
        assert (a.shape, moments.shape) == ((n, c_out, 4, 4), (2, c_out))
        assert moments.isnan().all()
    a, _ = OURS.training_product(x.new_empty(2, 0, 4, 4), x.new_empty(5, 0, 1, 1), torch.ones(5), "relu", last)
    assert (a == 1).all()


@pytest.mark.parametrize("layout", ("contiguous", "channels_last", "misaligned"))
def test_product_of_a_gradient(layout: str) -> None:
    """The input's gradient, laid out as x and as the fake promises, and its sums; nothing at all."""
    x, weight = problems.normal(3, 16, 8, 6).to(BF16), (problems.normal(40, 16, 1, 1) / 8).to(BF16)
    x, affine, da = cases.LAYOUTS[layout](x), problems.rows(3, 16), problems.normal(3, 40, 8, 6).to(BF16)
    channels_first = da.transpose(0, 1).contiguous().transpose(0, 1)  # in memory
    for placed in (da, da.contiguous(memory_format=torch.channels_last), channels_first):
        args = (placed, weight, x, affine, "gelu")
        dx, sums = OURS.training_product_sums(*args)
        assert launches()
        ref, plain = (torch.ops.cmx.training_product_sums(*problems.to(d, args))[0] for d in (torch.float64, F32))
        size = (*(t.double().abs() for t in args[:2]), *problems.to(torch.float64, args[2:]))
        magnitude = torch.ops.cmx.training_product_sums(*size)[0]
        check(dx, Expected(ref, plain, magnitude, 40, BF16), layout)
        check(sums, problems.expect_sums(dx, x, affine, "gelu"), layout)
        promise = torch.ops.cmx.training_product_sums(*(t.to("meta") for t in args[:4]), "gelu")
        assert dx.stride() == promise[0].stride()
    dx, sums = OURS.training_product_sums(da[:0], weight, x[:0].contiguous(), affine, "gelu")
    assert dx.shape == (0, 16, 8, 6)
    check_equal(sums, torch.zeros(2, 16))


def test_refusals_of_training() -> None:
    args = problems.depthwise_inputs((2, 3, 9, 11, 5, 4), BF16)
    x, affine, weight, bias, act = args
    back = problems.backward_inputs(args, x)
    train, backward = OURS.depthwise_block_train, OURS.depthwise_block_backward
    square, five = problems.normal(5, 3, 1, 1).to(BF16), problems.normal(2, 5, 9, 11).to(BF16)
    for message, op, given in (
        ("x: got shape", train, (x[0], affine, weight, bias, act)),
        ("weight: wanted a tensor on x's device, in x's dtype", train, (x, affine, weight.float(), bias, act)),
        ("weight: got shape", train, (x, affine, weight[1:], bias, act)),
        (r"affine: got shape \[2, 3\], wanted \[3, 3\]", train, (x, affine[1:], weight, bias, act)),
        ("bias: got shape", train, (x, affine, weight, bias[1:], act)),
        ("act: got 'silu'", train, (x, affine, weight, bias, "silu")),
        ("grad: got shape", backward, (back[0][:, 1:], *back[1:])),
        ("a: got shape .* in x's dtype", backward, (back[0], back[1].float(), *back[2:])),
        ("coefficients: got shape", backward, (*back[:2], back[2][1:], *back[3:])),
        ("x: got float32, wanted float16", OURS.training_product, (x.float(), square.float(), bias, act, False)),
        ("weight: wanted a tensor", OURS.training_product, (x, square.float(), bias, act, False)),
        ("weight: got shape", OURS.training_product, (x, square[:, 1:], bias, act, False)),
        (r"bias: got shape .* \[1, 5\]", OURS.training_product, (x, square, bias, act, False)),
        ("da: got shape", OURS.training_product_sums, (x[1:], square, x, affine, act)),
        ("da: got shape", OURS.training_product_sums, (x, square, x, affine, act)),
        (r"wanted \[C, Cin, 1, 1\]", OURS.training_product_sums, (x, square.expand(-1, -1, 3, 3), x, affine, act)),
        ("affine: got shape", OURS.training_product_sums, (five, square, x, affine[1:], act)),
        (
            "x: wanted a contiguous tensor",
            OURS.training_product_sums,
            (five, square, x.mT.contiguous().mT, affine, act),
        ),
        ("skip: got shape", OURS.training_sum, (x, affine, x[1:], None, act)),
        ("skip: wanted a contiguous tensor", OURS.training_sum, (x, affine, x.mT.contiguous().mT, None, act)),
    ):
        with pytest.raises(RuntimeError, match=message):
            op(*given)
        assert launches() == 0, message


def test_batchnorm() -> None:
    """A launch each; the bits of the CPU's operators, vectors of any dtype; wrong shapes are refused."""
    moments, gamma, beta, sums = torch.rand(2, 5), torch.rand(5).to(BF16), torch.rand(10)[::2], torch.rand(2, 5)
    for given in ((moments, gamma, beta, 1e-5, 40), (moments, None, None, 1e-3, 1)):
        rows = OURS.batchnorm_rows(*given)
        assert launches() == 1
        gradients = OURS.batchnorm_gradients(sums, rows[0], rows[1], 40, given[1] is None)
        assert launches() == 1
        wanted = (*torch.ops.cmx.batchnorm_rows(*given),)
        wanted += torch.ops.cmx.batchnorm_gradients(sums, wanted[0], wanted[1], 40, given[1] is None)
        for out, same in zip((*rows, *gradients), wanted, strict=True):
            check_equal(out, same)
    for wrong in ((moments[0], None, None), (moments.double(), None, None), (moments, gamma[1:], None)):
        with pytest.raises(RuntimeError, match=r"moments: got|gamma: got"):
            OURS.batchnorm_rows(*wrong, 1e-5, 40)
    with pytest.raises(RuntimeError, match="rstd: got"):
        OURS.batchnorm_gradients(sums, rows[0], moments, 40, False)
