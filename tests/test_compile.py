"""torch.compile without graph breaks and within a bound on recompilations, export, and the autocast rule."""

from typing import Any

import cases
import pytest
import torch
from cases import LAYOUTS, RAGGED
from compare import check, check_equal
from plain_models import NATIVE
from torch import Tensor
from torch._dynamo.utils import counters

from cmx_kernels import ops, registry, use

F32, BF16 = torch.float32, torch.bfloat16


def _compiled(op: str, **options: object) -> object:
    torch._dynamo.reset()
    counters.clear()
    return torch.compile(getattr(ops, op), fullgraph=True, backend="aot_eager", **options)


@pytest.mark.parametrize("op", cases.OPS)
def test_compile(op: str) -> None:
    """One graph without breaks, the same bits and strides, no second compilation for the same call."""
    run = _compiled(op)
    for layout in ("contiguous", "channels_last"):
        args = cases.with_layout(op, layout)
        with torch.no_grad():
            eager, out = getattr(ops, op)(*args), run(*args)
            check_equal(out, eager)
            assert out.stride() == eager.stride()
            with torch._dynamo.config.patch(error_on_recompile=True):
                check_equal(run(*args), eager)
    assert counters["stats"]["unique_graphs"] <= 2


@pytest.mark.parametrize("op", cases.OPS)
def test_compile_backward(op: str) -> None:
    args = cases.with_layout(op, "contiguous", grad=True)
    leaves = [a for a in args if isinstance(a, Tensor)]
    grads = []
    for run in (getattr(ops, op), _compiled(op)):
        out = run(*args)
        grads.append(torch.autograd.grad(out, leaves, torch.ones(out.shape)))
    for eager, compiled in zip(*grads, strict=True):
        torch.testing.assert_close(compiled, eager, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("op", cases.OPS)
def test_compile_dynamic(op: str) -> None:
    """Other batches and image sizes run in the graph of the first."""
    run = _compiled(op, dynamic=True)
    x, *rest = cases.inputs(op, RAGGED[op])
    n, c, h, w = x.shape
    with torch.no_grad():
        check_equal(run(x, *rest), getattr(ops, op)(x, *rest))
        with torch._dynamo.config.patch(error_on_recompile=True):
            for size in ((n + 1, c, h, w), (n + 3, c, h + 4, w), (n + 5, c, h + 7, w + 6)):
                x = torch.randn(size)
                check_equal(run(x, *rest), getattr(ops, op)(x, *rest))


@pytest.mark.skipif(registry.C is None, reason=str(registry.WHY_NO_C))
def test_compile_keeps_the_operator() -> None:
    """The graph calls our kernel, not its decomposition."""
    seen: list[str] = []

    def look(graph: torch.fx.GraphModule, example: object) -> object:
        seen.extend(str(node.target) for node in graph.graph.nodes)
        return graph

    torch._dynamo.reset()
    args = cases.inputs("depthwise_block", RAGGED["depthwise_block"])
    torch.compile(ops.depthwise_block, fullgraph=True, backend=look)(*args)
    assert any("cmx.depthwise_block" in target for target in seen), seen


def test_inductor() -> None:
    """A block between operations that Inductor generates itself, with strides it must respect."""
    x, w, *vectors, _, _ = cases.inputs("depthwise_block", RAGGED["depthwise_block"])
    w1 = torch.randn(7, 19, 1, 1)

    def block(x: Tensor) -> Tensor:
        y = ops.depthwise_block(x * 2, w, *vectors)
        return ops.pointwise_block(y.relu(), w1).square() + 1

    torch._dynamo.reset()
    run = torch.compile(block, fullgraph=True)
    for layout in ("contiguous", "channels_last", "transposed_pixels"):
        given = LAYOUTS[layout](x)
        with torch.no_grad():
            torch.testing.assert_close(run(given), block(given), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", (BF16, torch.float16), ids=cases.name)
@pytest.mark.parametrize("op", cases.OPS)
def test_autocast(op: str, dtype: torch.dtype) -> None:
    """x and weight take the autocast dtype, BatchNorm's vectors stay as they are; gradients come back in float32."""
    args = cases.with_layout(op, "contiguous", grad=True)
    x, weight, *rest = args
    with torch.autocast("cpu", dtype=dtype):
        out = getattr(ops, op)(*args)
        with torch.autocast("cpu", enabled=False):
            inner = getattr(ops, op)(*args)
        again = getattr(ops, op)(*args)
    wanted = getattr(ops, op)(x.detach().to(dtype), weight.detach().to(dtype), *rest)
    assert out.dtype == dtype
    assert inner.dtype == F32
    check_equal(out, wanted)
    check_equal(again, wanted)
    check_equal(inner, getattr(ops, op)(*args))
    check_equal(getattr(ops, op)(*args), inner, "after autocast")
    leaves = [a for a in args if isinstance(a, Tensor)]
    for leaf, grad in zip(leaves, torch.autograd.grad(out, leaves, torch.ones_like(out)), strict=True):
        assert grad.dtype == leaf.dtype == F32
        assert torch.isfinite(grad).all()


@pytest.mark.parametrize("op", cases.OPS)
def test_autocast_leaves_float64_alone(op: str) -> None:
    args = cases.inputs(op, RAGGED[op], torch.float64)
    with torch.autocast("cpu", dtype=BF16):
        out = getattr(ops, op)(*args)
    check(out, cases.expect(op, args))


@pytest.mark.parametrize("op", cases.OPS)
def test_autocast_compiled(op: str) -> None:
    args = cases.inputs(op, RAGGED[op])
    run = _compiled(op)
    with torch.no_grad(), torch.autocast("cpu", dtype=BF16):
        check_equal(run(*args), getattr(ops, op)(*args))


class Called(torch.nn.Module):
    """An operator called by hand, as in somebody's own network."""

    def __init__(self, op: str, rest: tuple[Any, ...]) -> None:
        super().__init__()
        self.op, self.rest = op, rest

    def forward(self, x: Tensor) -> Tensor:
        return getattr(ops, self.op)(x, *self.rest)


@pytest.mark.parametrize("op", cases.OPS)
@torch.no_grad()
def test_exported_programs_run_where_this_package_is_not_installed(op: str) -> None:
    """As those of whole models: PyTorch's operators, ours where a backend is forced."""
    x, *rest = cases.inputs(op, RAGGED[op])
    model = Called(op, tuple(rest))
    program = torch.export.export(model, (x,))
    torch.testing.assert_close(program.module()(x), model(x))
    assert not any("cmx" in str(node.target) for node in program.graph.nodes)
    traced = torch.jit.trace(model, (x,))
    torch.testing.assert_close(traced(x), model(x))
    assert not any("cmx" in node.kind() for node in traced.inlined_graph.nodes())
    if NATIVE:
        with use("cpu"):
            program = torch.export.export(model, (x,))
        assert any("cmx" in str(node.target) for node in program.graph.nodes)
        check_equal(program.module()(x), model(x))
