"""A new row in the list of activations is right at once, in every operator, forward and backward, on the reference."""

import sys
from collections.abc import Callable, Iterator
from types import SimpleNamespace

import cases
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from cmx_kernels import activations, backends, ops, registry
from cmx_kernels.models.training import TRACEABLE
from cmx_kernels.ops.conv_block import setup_context

OPS = tuple(op for op in cases.OPS if op != "pool_head")  # which has none


@pytest.fixture
def silu(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A row, and nothing else: neither a kernel nor a formula of its derivative."""
    monkeypatch.setattr(backends, "_said", set())
    monkeypatch.setitem(activations.ACTIVATIONS, "silu", F.silu)
    yield "silu"


def problem(op: str) -> tuple[list[Tensor], Callable[..., Tensor]]:
    """Leaves x, weight, and vectors; the convolution and activation in plain torch."""
    x, weight, *vectors = cases.inputs(op, cases.RAGGED[op], torch.float64)[:5]
    leaves = [t.detach().clone().requires_grad_() for t in (x, weight, *vectors)]
    groups = x.shape[1] if op == "depthwise_block" else 1
    stride = weight.shape[2:] if op == "patch_embed" else 1

    def plain(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        kh, kw = weight.shape[2:]
        padding = ((kw - 1) // 2, kw // 2, (kh - 1) // 2, kh // 2) if op == "depthwise_block" else (0, 0, 0, 0)
        return F.silu(F.conv2d(F.pad(x, padding), weight, bias, stride, groups=groups))

    return leaves, plain


def same(out: Tensor, wanted: Tensor, leaves: list[Tensor]) -> None:
    """Values and all gradients."""
    torch.testing.assert_close(out, wanted)
    grad = torch.randn_like(wanted)
    for got, want in zip(*(torch.autograd.grad(y, leaves, grad) for y in (out, wanted)), strict=True):
        torch.testing.assert_close(got, want)


@pytest.mark.parametrize("op", OPS)
def test_inference_form(op: str, silu: str) -> None:
    """The public function; a kernel refuses the row by name."""
    leaves, plain = problem(op)
    x, weight, bias, scale, shift = leaves
    wanted = plain(x, weight, bias) * scale[:, None, None] + shift[:, None, None]
    residual = {"residual": False} if op == "depthwise_block" else {}
    same(getattr(ops, op)(*leaves, act=silu, **residual), wanted, leaves)
    if registry.C is not None:
        with pytest.warns(UserWarning, match="no cpu kernel for the activation 'silu'"):
            getattr(ops, op)(*(t.detach().float() for t in leaves), act=silu)


class Context(SimpleNamespace):
    """What autograd gives to a backward pass, of which every gradient is wanted."""

    needs_input_grad = (True,) * 8

    def save_for_backward(self, *tensors: Tensor) -> None:
        self.saved_tensors = tensors


@pytest.mark.parametrize("op", OPS)
def test_backward_of_the_dispatchers_operator(op: str, silu: str) -> None:
    """torch.ops.cmx runs the row where a device has no kernel of its own."""
    leaves, plain = problem(op)
    x, weight, bias, scale, shift = leaves
    wanted = plain(x, weight, bias) * scale[:, None, None] + shift[:, None, None]
    context, grad = Context(), torch.randn_like(wanted)
    setup_context(context, (*leaves, silu, *([False] if op == "depthwise_block" else [])), wanted)
    with torch.no_grad():
        found = sys.modules[f"cmx_kernels.ops.{op}"]._backward(torch.ops.cmx, context, grad)
    for got, want in zip(found[:5], torch.autograd.grad(wanted, leaves, grad), strict=True):
        torch.testing.assert_close(got, want)


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize(
    "compiled",
    [
        False,
        pytest.param(
            True, marks=pytest.mark.skipif(not TRACEABLE, reason="a graph of torch before 2.13 trains the modules")
        ),
    ],
)
def test_training_form(op: str, compiled: bool, silu: str) -> None:
    """With batch statistics: its backward pass is ours, in a graph too."""
    leaves, plain = problem(op)
    train = getattr(ops, f"{op}_train")

    def run(*args: Tensor) -> Tensor:
        return train(*args, act=silu)[0]

    torch._dynamo.reset()
    out = (torch.compile(run, fullgraph=True, backend="aot_eager") if compiled else run)(*leaves)
    x, weight, bias, gamma, beta = leaves
    wanted = F.batch_norm(plain(x, weight, bias), None, None, gamma, beta, training=True)
    same(out, wanted + x if op == "depthwise_block" else wanted, leaves)


@pytest.mark.parametrize("act", cases.ACTS)
def test_formulas_and_their_absence(act: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each formula is what the row itself gives without one, also where autograd records nothing."""
    x, grad = torch.linspace(-6, 6, 2000, dtype=torch.float64), torch.randn(2000, dtype=torch.float64)
    wanted = activations.activation_backward(act, grad, x)
    monkeypatch.delitem(activations._BACKWARD, act)
    with torch.no_grad():
        torch.testing.assert_close(activations.activation_backward(act, grad, x), wanted)
    with pytest.raises(ValueError, match="act: got 'no such', wanted one of gelu"):
        activations.activation_backward("no such", grad, x)


def test_backward_below_autograd(silu: str) -> None:
    """As the dispatcher calls an operator's Python, with autograd switched off; tracing it gives plain operators."""
    x, grad = torch.randn(7, dtype=torch.float64), torch.randn(7, dtype=torch.float64)
    leaf = x.clone().requires_grad_()
    (wanted,) = torch.autograd.grad(F.silu(leaf), leaf, grad)
    with registry.below_autograd():
        torch.testing.assert_close(activations.activation_backward(silu, grad, x), wanted)
