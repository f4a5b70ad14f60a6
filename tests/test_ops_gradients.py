"""Gradients through the dispatcher: exact in float64, by the error rule in narrower dtypes, for any layout of grad."""

import cases
import pytest
import torch
from called import Called
from cases import LAYOUTS, RAGGED
from compare import check, check_equal
from gradient_cases import expected_gradients, leaves_of
from plain_models import needs_kernels
from torch import Tensor
from torch.utils.checkpoint import checkpoint

BLOCKS = ("patch_embed", "depthwise_block", "pointwise_block")
SMALL = {
    "depthwise_block": (2, 3, 4, 5, 3, 2),
    "pointwise_block": (2, 3, 4, 2, 3),
    "patch_embed": (2, 2, 3, 5, 4, 2, 3),
    "pool_head": (2, 3, 4, 3, 2),
}
PRESENT = [(b, s, t) for b in (True, False) for s in (True, False) for t in (True, False)]
F32, F64 = torch.float32, torch.float64


def _call(op: str, args: tuple[object, ...]) -> Tensor:
    return getattr(torch.ops.cmx, op)(*args)


def _small(op: str, act: str, present: tuple[bool, bool, bool]) -> tuple[object, ...]:
    """float64 inputs, away from the kink of ReLU, where a difference quotient is wrong."""
    args = cases.inputs(op, SMALL[op], F64, act, tuple(F64 if p else None for p in present))
    if act == "relu":
        pre = cases.conv(op, args[0], args[1], args[2])
        assert pre.abs().min() > 1e-4
    return args


@pytest.mark.parametrize("present", PRESENT, ids=lambda p: "".join("bst"[i] for i in range(3) if p[i]) or "none")
@pytest.mark.parametrize("act", cases.ACTS)
@pytest.mark.parametrize("op", BLOCKS)
def test_gradcheck(op: str, act: str, present: tuple[bool, bool, bool]) -> None:
    args = _small(op, act, present)
    leaves = [i for i, a in enumerate(args) if isinstance(a, Tensor)]

    def call(*values: Tensor) -> Tensor:
        filled = list(args)
        for i, value in zip(leaves, values, strict=True):
            filled[i] = value
        return _call(op, filled)

    assert torch.autograd.gradcheck(call, leaves_of(args), fast_mode=present != (True, True, True))


@pytest.mark.parametrize("bias", (True, False))
def test_gradcheck_pool_head(bias: bool) -> None:
    x, weight, b = cases.inputs("pool_head", SMALL["pool_head"], F64)
    args = (x, weight, b) if bias else (x, weight)
    assert torch.autograd.gradcheck(lambda x, w, b=None: torch.ops.cmx.pool_head(x, w, b), leaves_of(args))


@pytest.mark.parametrize("act", cases.ACTS)
@pytest.mark.parametrize("op", BLOCKS)
def test_second_derivative(op: str, act: str) -> None:
    """Double backward works: where a gradient is to have one, backward is PyTorch's operations."""
    x, weight, bias, scale, shift, *rest = _small(op, act, (True, True, True))
    leaves = leaves_of((x, weight, bias, scale, shift))
    assert torch.autograd.gradgradcheck(lambda *v: _call(op, (*v, *rest)), leaves, fast_mode=True)


def _check_gradients(op: str, args: tuple[object, ...], grad: Tensor) -> None:
    leaves = leaves_of(args)
    got = torch.autograd.grad(_call(op, args), leaves, grad)
    expected = expected_gradients(op, args, grad)
    for name, g, want in zip(("x", "weight", "bias", "scale", "shift"), got, expected, strict=False):
        check(g, want, f"gradient of {name}")


@pytest.mark.parametrize("dtype", cases.DTYPES, ids=cases.name)
@pytest.mark.parametrize("act", cases.ACTS)
@pytest.mark.parametrize("op", cases.OPS)
def test_gradients(op: str, act: str, dtype: torch.dtype) -> None:
    """Vectors in float32 as BatchNorm folds them, and in x's dtype; the gradient has the leaf's dtype."""
    for vectors in ((dtype, F32, F32), (dtype, dtype, dtype)):
        args = cases.inputs(op, RAGGED[op], dtype, act, vectors)
        grad = torch.randn(_call(op, args).shape).to(dtype)
        _check_gradients(op, args, grad)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("op", BLOCKS)
def test_layouts_of_grad(op: str, layout: str) -> None:
    """.sum() expands its gradient, .split() and .flatten() slice and permute it."""
    args = cases.inputs(op, RAGGED[op])
    grad = LAYOUTS[layout](torch.randn(_call(op, args).shape))
    _check_gradients(op, args, grad)


@pytest.mark.parametrize("layout", ("channels_last", "channel_slice", "every_other_row", "transposed_pixels"))
@pytest.mark.parametrize("op", cases.OPS)
def test_layouts_of_x(op: str, layout: str) -> None:
    args = cases.inputs(op, RAGGED[op])
    x = LAYOUTS[layout](args[0]).detach()
    _check_gradients(op, (x, *args[1:]), torch.randn(_call(op, args).shape))


@pytest.mark.parametrize("op", cases.OPS)
def test_grad_for_some_only(op: str) -> None:
    """Each leaf alone gets the gradient it gets among all; the others get none."""
    args = cases.inputs(op, RAGGED[op])
    tensors = [i for i, a in enumerate(args) if isinstance(a, Tensor)]
    grad = torch.randn(_call(op, args).shape)
    leaves = leaves_of(args)
    together = torch.autograd.grad(_call(op, args), leaves, grad)
    for i, wanted in zip(tensors, together, strict=True):
        alone = [a.detach() if isinstance(a, Tensor) else a for a in args]
        alone[i].requires_grad_()
        _call(op, alone).backward(grad)
        check_equal(alone[i].grad, wanted, f"gradient of argument {i} alone")
        assert all(alone[j].grad is None for j in tensors if j != i)


@pytest.mark.parametrize("op", cases.OPS)
def test_empty_batch(op: str) -> None:
    """No image: zero gradients for the parameters, an empty one for x."""
    args = cases.inputs(op, (0, *RAGGED[op][1:]))
    leaves = leaves_of(args)
    out = _call(op, args)
    x_grad, *others = torch.autograd.grad(out, leaves, torch.randn(out.shape))
    assert x_grad.shape == args[0].shape
    for leaf, g in zip(leaves[1:], others, strict=True):
        check_equal(g, torch.zeros_like(leaf), "gradient of a parameter")


@pytest.mark.parametrize("op", cases.OPS)
def test_no_graph_is_kept_without_need(op: str) -> None:
    args = cases.inputs(op, RAGGED[op])
    assert _call(op, args).grad_fn is None
    leaves = leaves_of(args)
    assert _call(op, args).grad_fn is not None
    with torch.no_grad():
        assert _call(op, args).grad_fn is None
    with torch.inference_mode():
        assert _call(op, args).is_inference()
    assert all(leaf.grad is None for leaf in leaves)


@pytest.mark.parametrize("op", cases.OPS)
def test_changed_input_is_noticed(op: str) -> None:
    """A saved tensor changed in place before backward is an error, not a wrong gradient."""
    args = cases.inputs(op, RAGGED[op])
    weight = args[1].requires_grad_()
    x = args[0].clone()
    out = _call(op, (x, *args[1:]))
    x.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        torch.autograd.grad(out, weight, torch.ones(out.shape))


@pytest.mark.parametrize("op", cases.OPS)
def test_under_checkpoints(op: str) -> None:
    """What was saved is computed again, and can be had once."""
    args = cases.inputs(op, RAGGED[op])
    leaves = leaves_of(args)
    grad = torch.randn(_call(op, args).shape)
    wanted = torch.autograd.grad(_call(op, args), leaves, grad)
    found = torch.autograd.grad(checkpoint(lambda: _call(op, args), use_reentrant=False), leaves, grad)
    for got, want in zip(found, wanted, strict=True):
        check_equal(got, want)


@pytest.mark.parametrize("act", cases.ACTS)
@pytest.mark.parametrize("op", BLOCKS)
def test_pre_activations_beyond_float16(op: str, act: str) -> None:
    """They are infinite to a layer that stores them; gradients stay finite, as the output does."""
    x, weight, *_ = cases.inputs(op, RAGGED[op], torch.float16)
    x, weight = x.abs() * 1000 + 100, weight.abs() * 1000 + 100
    scale = torch.full((len(weight),), 1e-7)
    args = (x, weight, None, scale, None, act, *([False] if op == "depthwise_block" else []))
    x.requires_grad_(), weight.requires_grad_()
    out = _call(op, args)
    assert torch.isfinite(out).all() and out.max() / 1e-7 > 65504
    for found in torch.autograd.grad(out, (x, weight), torch.ones_like(out)):
        assert torch.isfinite(found).all()


@needs_kernels
@pytest.mark.parametrize("twice", (False, True), ids=("once", "with a gradient of its own"))
@pytest.mark.parametrize("op", BLOCKS)
def test_which_operators_backward_calls(op: str, twice: bool) -> None:
    """The kernels of training, unless the gradient is to have one: kernels have none."""
    args = cases.inputs(op, RAGGED[op])
    leaves = leaves_of(args)
    out = _call(op, args)
    with Called() as called:
        torch.autograd.grad(out, leaves, torch.ones_like(out), create_graph=twice)
    assert (f"cmx.{op}_backward.default" in called.names) != twice
    assert ("aten.convolution_backward.default" in called.names) == twice
