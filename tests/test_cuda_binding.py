"""The binding of the CUDA kernels, on CPU tensors over emulated kernels: values, layouts, refusals, device, stream."""

import contextlib
import re
from collections.abc import Iterator

import cases
import emulated
import emulated_binding
import emulated_product
import pytest
import torch
import training_cases as problems
from compare import Expected, check, check_equal
from product_checks import check_passes, check_patch_embed, check_pointwise
from torch import Tensor

from cmx_kernels import cost_model, cuda
from cmx_kernels.ops import training

pytestmark = emulated.needs(emulated_binding.build)
F32, F16, BF16 = torch.float32, torch.float16, torch.bfloat16
OURS = torch.ops.cmx_emulated
LAYOUTS = ("contiguous", "channels_last", "misaligned", "batch_slice", "channel_slice", "column_slice")
ARGUMENTS = ("x", "weight", "bias", "scale", "shift", "act", "residual")
TENSOR_CORES = (3, 40, 16, 16, 9, 9)  # for both gradients of 16-bit types, by the cost model of an H200
OF_A_TENSOR, BEFORE = -1, 5  # the current devices, as tests/emulator/binding.cpp numbers them
both_types = pytest.mark.parametrize("dtype", (F32, BF16), ids=cases.name)
every_op = pytest.mark.parametrize("op", cases.OPS)


@pytest.fixture(autouse=True)
def nothing_asked_before() -> Iterator[None]:
    emulated_binding.library().cmx_refuse(None)
    emulated_binding.asked()
    yield
    emulated_binding.library().cmx_refuse(None)


def launches() -> int:
    """Kernels launched since the last question, on the device of their tensors, which is current while a call lasts."""
    asked = emulated_binding.asked()
    streams = [line for line in asked if line.startswith("stream")]
    assert streams == [f"stream {OF_A_TENSOR}"] * len(streams)
    changes = [line for line in asked if line not in streams]
    assert changes == [f"device {OF_A_TENSOR}", f"device {BEFORE}"] * (len(changes) // 2)
    assert not streams or (asked[0], asked[-1]) == (changes[0], changes[-1])
    return len(streams)


def promised(op: str, args: tuple) -> Tensor:
    """What the fake of the operator says its output is."""
    return getattr(torch.ops.cmx, op)(*(a.to("meta") if isinstance(a, Tensor) else a for a in args))


@both_types
@pytest.mark.parametrize("layout", LAYOUTS)
@every_op
def test_values(op: str, layout: str, dtype: torch.dtype) -> None:
    """Also the strides of the output: those that the fake tensors promise."""
    for shape in (cases.RAGGED[op], cases.SHAPES[op][3]):
        args = cases.inputs(op, shape, dtype)  # vectors in x's dtype
        x = cases.LAYOUTS[layout](args[0])
        weight = cases.LAYOUTS["column_slice"](args[1]) if args[1].dim() == 4 else args[1].mT.contiguous().mT
        before, args = x.clone(), (x, weight, *args[2:])
        out = getattr(OURS, op)(*args)
        assert launches()
        check(out, cases.expect(op, args), f"{shape}")
        check_equal(x, before, "x after the call")
        assert out.stride() == promised(op, args).stride()


@every_op
def test_float16_and_no_vectors(op: str) -> None:
    for act in ("relu", "none"):
        args = cases.inputs(op, cases.RAGGED[op], F16, act, (None,) * 3)
        check(getattr(OURS, op)(*args), cases.expect(op, args), act)


@both_types
@every_op
def test_nothing(op: str, dtype: torch.dtype) -> None:
    """No images, channels or pixels: nothing is launched, unless there are outputs, which sum nothing."""
    for shape in [s for o, s in cases.NOTHING if o == op] + [s for s in cases.SHAPES[op] if not s[0]]:
        if op == "pool_head" and 0 in shape[3:]:
            continue  # a mean of nothing is refused
        args = cases.inputs(op, shape, dtype, vectors=(F32,) * 3)
        out = getattr(OURS, op)(*args)
        assert launches() == 0 or out.numel()
        if out.numel():
            check(out, cases.expect(op, args), f"{shape}")


def refused(op: str, message: str, **changes: object) -> None:
    """The call raises this, launches nothing, and leaves the current device as it was."""
    args = dict(zip(ARGUMENTS, cases.inputs(op, cases.RAGGED[op], BF16), strict=False)) | changes
    before = [a.clone() for a in args.values() if isinstance(a, Tensor)]
    with pytest.raises(RuntimeError, match=message):
        getattr(OURS, op)(*args.values())
    assert launches() == 0
    for a, b in zip((a for a in args.values() if isinstance(a, Tensor)), before, strict=True):
        check_equal(a, b)


@every_op
def test_refusals(op: str) -> None:
    x, weight, bias = cases.inputs(op, cases.RAGGED[op], BF16)[:3]
    refused(op, r"x: got shape .*, wanted 4 dimensions", x=x[0])
    refused(op, "x: wanted float32, float16 or bfloat16", x=x.double(), weight=weight.double())
    for dtype in (F32, F16):
        refused(op, "weight: wanted a tensor on x's device, in x's dtype", weight=weight.to(dtype))
        refused(op, "weight: wanted a tensor on x's device, in x's dtype", x=x.to(dtype))
    wider = torch.cat([weight, weight], 1)
    for bad in (weight[0], weight[None], wider, weight[:, :0]):
        refused(op, rf"weight: got shape {re.escape(str(list(bad.shape)))} with x of", weight=bad)
    refused(op, "with x of", x=x[:, 1:])
    for bad in (bias[1:], bias[None], torch.cat([bias, bias])):
        refused(op, r"bias: got shape .*, wanted \[\d+\] on x's device", bias=bad)
    if op == "pool_head":
        refused(op, "wanted at least one pixel", x=x[:, :, :0])
        return
    for vector in ("scale", "shift"):
        refused(op, rf"{vector}: got shape .*, wanted \[\d+\]", **{vector: bias[1:]})
    refused(op, "act: got 'silu'", act="silu")
    if op == "patch_embed":
        refused(op, "wanted at least one patch", x=x[:, :, :3])
    elif op == "pointwise_block":
        refused(op, r"wanted \[C, Cin, 1, 1\]", weight=weight.expand(-1, -1, 3, 3))
    else:
        refused(op, "got a 32x2 kernel, wanted 1 to 31", weight=weight[:, :, :1, :1].expand(-1, -1, 32, 2))
        refused(op, r"wanted \[C, 1, kh, kw\]", weight=weight[1:])


@every_op
def test_a_device_without_kernels(op: str) -> None:
    emulated_binding.library().cmx_refuse(b"the driver is asleep")
    refused(op, "no CUDA kernel runs here: the driver is asleep")


@pytest.mark.parametrize("kernel", range(len(cost_model.TILES)), ids=cost_model.TILES)
def test_one_product(kernel: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """What it computes; what it does not take is refused, and nothing else runs instead."""
    monkeypatch.setattr(cuda, "_LIBRARY", emulated_binding.library())
    with cuda.only_product(kernel):
        for op, shape in (("pointwise_block", (2, 72, 136, 4, 8)), ("patch_embed", cases.RAGGED["patch_embed"])):
            args = cases.inputs(op, shape, BF16)
            takes = op == "pointwise_block" or cost_model.TILES[kernel] == "64x64"  # the one that gathers
            with contextlib.nullcontext() if takes else pytest.raises(RuntimeError, match=f"{op}: CUDA says"):
                check(getattr(OURS, op)(*args), cases.expect(op, args))
    args = cases.inputs("patch_embed", cases.RAGGED["patch_embed"], BF16)
    check(OURS.patch_embed(*args), cases.expect("patch_embed", args))


def test_vectors_of_16_bits_are_converted_in_one_launch() -> None:
    kernels, (x, weight, *vectors) = emulated_product.library(), cases.inputs("pointwise_block", (2, 8, 16, 4, 4), BF16)
    for given, launched in ((vectors, 1), ([vectors[0], vectors[1].float(), None, "gelu"], 1), ([None] * 3, 0)):
        emulated.launched(kernels)
        OURS.pointwise_block(x, weight, *given[:3], "gelu")
        assert sum(v for k, v in emulated.launched(kernels).items() if k.startswith("widen")) == launched


@pytest.mark.parametrize("layout", LAYOUTS)
def test_unfolded_patches(layout: str) -> None:
    """Where the cost model says so, of every layout; with a weight that is made longer, and one that is not."""
    kernels = emulated_product.library()
    for shape, dtype, unfolds in (
        ((3, 3, 40, 64, 56, 7, 7), BF16, True),
        ((2, 4, 24, 37, 70, 4, 8), F16, True),
        ((2, 3, 40, 21, 21, 7, 7), BF16, layout == "channels_last"),  # planes of 9 pixels: no 16 bytes anywhere
        ((3, 3, 40, 64, 56, 7, 7), F32, False),
    ):
        args = cases.inputs("patch_embed", shape, dtype)
        args = (cases.LAYOUTS[layout](args[0]), *args[1:])
        emulated.launched(kernels)
        out = OURS.patch_embed(*args)
        assert any(v for k, v in emulated.launched(kernels).items() if k.startswith("unfold")) == unfolds
        check(out, cases.expect("patch_embed", args), f"{shape}")
        assert out.stride() == promised("patch_embed", args).stride()
    assert launches()


# ---- training


@pytest.mark.parametrize("layout", ("contiguous", "channels_last", "channel_slice"))
@both_types
def test_depthwise_training(dtype: torch.dtype, layout: str) -> None:
    halves = dtype != F32  # what tensor cores take: they round x' behind an affine
    gradients = halves and layout != "channels_last"  # and of the gradients
    for shape in ((2, 3, 9, 11, 5, 4), TENSOR_CORES):
        x, *rest = problems.depthwise_inputs(shape, dtype, affine=not halves)
        args = (cases.LAYOUTS[layout](x), *rest)
        a, moments = OURS.depthwise_block_train(*args)
        assert launches()
        check(a, problems.expect_pre_activation(args), f"{shape}")
        check(moments, problems.expect_moments(a, args[-1]), f"moments of {shape}")
        back = problems.backward_inputs(args, a)
        for out, *expected in zip(
            OURS.depthwise_block_backward(*back)[:3],
            problems.expect_gradients(back, rounded=gradients and shape == TENSOR_CORES),
            ("dx", "dweight", "dbias"),
            strict=True,
        ):
            check(out, *expected)
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
