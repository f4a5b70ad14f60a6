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
from compare import check, check_equal
from torch import Tensor

from cmx_kernels import cost_model, cuda

pytestmark = emulated.needs(emulated_binding.build)
F32, F16, BF16 = torch.float32, torch.float16, torch.bfloat16
OURS = torch.ops.cmx_emulated
LAYOUTS = ("contiguous", "channels_last", "misaligned", "batch_slice", "channel_slice", "column_slice")
ARGUMENTS = ("x", "weight", "bias", "scale", "shift", "act", "residual")
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
