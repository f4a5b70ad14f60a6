"""What PyTorch expects of an operator: opcheck, exact fakes, tags, functorch, profiler."""

import cases
import pytest
import torch
from cases import LAYOUTS, RAGGED
from compare import check_equal
from torch import Tensor
from torch._subclasses import FakeTensorMode

from cmx_kernels import ops, registry
from cmx_kernels.ops import block_stack as stack

F32, BF16 = torch.float32, torch.bfloat16
DENSE = ("contiguous", "channels_last", "every_other_column", "channels_last_channel_slice", "expanded_batch")
STRIDES = {  # sizes of one make strides ambiguous
    "depthwise_block": (RAGGED["depthwise_block"], (2, 1, 4, 5, 3, 3), (2, 5, 1, 1, 3, 3), (0, 5, 4, 3, 3, 3)),
    "pointwise_block": (RAGGED["pointwise_block"], (2, 1, 5, 2, 3), (2, 5, 1, 2, 3), (2, 5, 7, 1, 1), (0, 5, 7, 2, 3)),
    "patch_embed": (RAGGED["patch_embed"], (2, 3, 1, 8, 8, 2, 2), (2, 3, 5, 8, 8, 8, 8), (0, 3, 5, 8, 8, 2, 2)),
    "pool_head": (RAGGED["pool_head"], (2, 19, 1, 5, 7), (2, 1, 5, 1, 1), (0, 4, 5, 2, 2)),
}  # fmt: skip


def _op(name: str) -> torch._ops.OpOverload:
    return getattr(torch.ops.cmx, name).default


@pytest.mark.parametrize("layout", ("contiguous", "channels_last", "channels_last_channel_slice"))
@pytest.mark.parametrize("op", cases.OPS)
def test_opcheck(op: str, layout: str) -> None:
    """Schema, fake, autograd registration and AOT dispatch with dynamic shapes."""
    result = torch.library.opcheck(_op(op), cases.with_layout(op, layout, grad=True))
    assert set(result.values()) == {"SUCCESS"}


@pytest.mark.parametrize("dtype", (torch.float16, BF16, torch.float64), ids=cases.name)
@pytest.mark.parametrize("op", cases.OPS)
def test_opcheck_dtypes(op: str, dtype: torch.dtype) -> None:
    tests = ("test_schema", "test_faketensor")
    for vectors in ((dtype,) * 3, (F32 if dtype != torch.float64 else dtype,) * 3, (None,) * 3):
        args = cases.inputs(op, RAGGED[op], dtype, "gelu", vectors)
        result = torch.library.opcheck(_op(op), args, test_utils=tests)
        assert set(result.values()) == {"SUCCESS"}


@pytest.mark.parametrize(
    "name",
    ("block_stack", "block_stack with a head", "run_blocks", "depthwise_packed", "pack_depthwise", "pack_pointwise"),
)
def test_opcheck_of_the_stack(isa: str, name: str) -> None:
    weights = (torch.randn(19, 1, 3, 3), torch.randn(19, 19, 1, 1))
    blocks = [tuple(stack.ConvParams(w, torch.randn(19), None, None) for w in weights)]
    packed = stack.pack(None, blocks, "gelu", F32)
    head = (torch.randn(7, 19), torch.randn(7))
    args = {
        "block_stack": (torch.randn(2, 19, 5, 7), packed.tensors, 19, [], [3, 3], "gelu", False),
        "block_stack with a head": (torch.randn(2, 19, 5, 7), packed.tensors, 19, [], [3, 3], "gelu", True, *head),
        "run_blocks": (torch.randn(2, 19, 5, 7), weights, torch.randn(2, 3, 19), 2, "gelu", False),
        "depthwise_packed": (torch.randn(2, 19, 5, 7), *packed.tensors[:2], [3, 3], "gelu", True),
        "pack_depthwise": (weights[0],),
        "pack_pointwise": (weights[1].flatten(1),),
    }[name]
    name = name.split()[0]
    result = torch.library.opcheck(_op(name), args, test_utils=("test_schema", "test_autograd_registration"))
    assert set(result.values()) == {"SUCCESS"}
    if not name.startswith("pack"):
        fake = torch.library.opcheck(_op(name), args, test_utils="test_faketensor")
        assert set(fake.values()) == {"SUCCESS"}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("op", cases.OPS)
def test_fake_strides(op: str, layout: str) -> None:
    """Shape, dtype and every stride of the fake are those of the operator, for sizes of one and empty batches too."""
    for shape in STRIDES[op]:
        for dtype in (F32, BF16):
            x, *rest = cases.inputs(op, shape, dtype)
            x = LAYOUTS[layout](x)
            real = _op(op)(x, *rest)
            with FakeTensorMode() as mode:
                fake = _op(op)(*(mode.from_tensor(a) if isinstance(a, Tensor) else a for a in (x, *rest)))
            assert (fake.shape, fake.dtype) == (real.shape, real.dtype)
            assert fake.stride() == real.stride(), (
                f"{shape}, x {x.stride()}: fake {fake.stride()}, real {real.stride()}"
            )


@pytest.mark.parametrize("op", cases.OPS)
def test_fallback_has_the_strides_of_the_kernel(op: str) -> None:
    """The reference answers with the same strides: a compiled graph may meet either."""
    for layout in DENSE:
        for shape in STRIDES[op]:
            x, *rest = cases.inputs(op, shape)
            x = LAYOUTS[layout](x)
            with torch.no_grad():
                kernel = _op(op)(x, *rest)
            module = __import__(f"cmx_kernels.ops.{op}", fromlist=["reference"])
            reference = module.reference(x, *rest)
            assert reference.stride() == kernel.stride(), f"{layout} {shape}"


@pytest.mark.parametrize("op", cases.OPS)
def test_channels_last_stays(op: str) -> None:
    args = cases.with_layout(op, "channels_last")
    out = getattr(ops, op)(*args)
    if op != "pool_head":
        assert out.is_contiguous(memory_format=torch.channels_last)
        assert not out.is_contiguous()
    assert getattr(ops, op)(args[0].contiguous(), *args[1:]).is_contiguous()


@pytest.mark.parametrize("op", cases.OPS)
def test_fake_cuda_tensors(op: str) -> None:
    """Shapes and strides of the CUDA path, on a machine without CUDA."""
    args = cases.inputs(op, RAGGED[op], BF16)
    with FakeTensorMode():
        moved = [torch.empty(a.shape, dtype=BF16, device="cuda") if isinstance(a, Tensor) else a for a in args]
        out = _op(op)(*moved)
    assert out.device.type == "cuda"
    assert out.shape == cases.expect(op, args).ref.shape


@pytest.mark.parametrize("op", cases.OPS)
def test_vmap(op: str) -> None:
    """vmap over x gives what a loop gives."""
    x, *rest = cases.inputs(op, RAGGED[op])
    several = torch.stack([x, 2 * x, -x])
    out = torch.func.vmap(lambda v: getattr(torch.ops.cmx, op)(v, *rest))(several)
    for one, v in zip(out, several, strict=True):
        check_equal(one, getattr(torch.ops.cmx, op)(v, *rest))


@pytest.mark.parametrize("op", cases.OPS)
def test_functional_grad(op: str) -> None:
    """torch.func.grad gives autograd's gradient, or says that it cannot; it is never wrong."""
    x, *rest = cases.inputs(op, RAGGED[op])

    def loss(v: Tensor) -> Tensor:
        return getattr(ops, op)(v, *rest).square().sum()

    leaf = x.clone().requires_grad_()
    wanted = torch.autograd.grad(loss(leaf), leaf)[0]
    try:
        got = torch.func.grad(loss)(x)
    except RuntimeError as error:
        assert "functorch" in str(error) or "setup_context" in str(error)
    else:
        torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-5)


def test_tags_and_schemas() -> None:
    """Functional schemas, exact strides, one kernel for every device without one."""
    for op in cases.OPS:
        overload = _op(op)
        assert torch.Tag.pt2_compliant_tag in overload.tags
        assert torch.Tag.needs_exact_strides in overload.tags
        assert not overload._schema.is_mutable
        assert torch._C._dispatch_has_kernel_for_dispatch_key(overload.name(), "CompositeExplicitAutograd")
        assert torch._C._dispatch_has_kernel_for_dispatch_key(overload.name(), "CPU") == (registry.C is not None)


def test_profiler_shows_the_operator() -> None:
    args = cases.inputs("pointwise_block", RAGGED["pointwise_block"])
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        torch.ops.cmx.pointwise_block(*args)
    assert "cmx::pointwise_block" in {event.key for event in profile.key_averages()}
