"""Beyond ordinary numbers: inf and NaN as eager has them, rounding, denormals, overflow, GELU, cancellation."""

import itertools
from typing import Any

import cases
import pytest
import torch
import torch.nn.functional as F
from compare import Expected, check, check_equal, check_nonfinite
from conftest import Runner
from torch import Tensor

from cmx_kernels import ops
from cmx_kernels.activations import activation

BLOCKS = ("patch_embed", "depthwise_block", "pointwise_block")
SPECIAL = (torch.inf, -torch.inf, torch.nan)
F32 = torch.float32
NONE3 = (None, None, None)


def _eager(op: str, args: tuple[object, ...]) -> Tensor:
    """Torch in float32, rounded once: what an operator promises."""
    return cases.formula(F32, op, *args).to(args[0].dtype)


def _eager64(op: str, args: tuple[object, ...]) -> Tensor:
    """The same in float64. oneDNN's float32 GELU says gelu(inf) = NaN; float64 says inf. Both are eager's answers."""
    return cases.formula(torch.float64, op, *args).to(cases.compute_dtype(args[0].dtype)).to(args[0].dtype)


def _plant(t: Tensor, *values: float) -> Tensor:
    """A few special values at random places, the last element among them."""
    t = t.clone()
    places = torch.randperm(t.numel())[: 2 * len(values)].tolist()
    flat = t.view(-1)
    for i, place in enumerate([*places, t.numel() - 1]):
        flat[place] = values[i % len(values)]
    return t


@pytest.mark.parametrize("values", ((torch.inf,), (-torch.inf,), (torch.nan,), SPECIAL), ids=str)
@pytest.mark.parametrize("dtype", cases.ALL_DTYPES, ids=cases.name)
@pytest.mark.parametrize(("op", "act"), [*itertools.product(BLOCKS, cases.ACTS), ("pool_head", "none")])
def test_nonfinite_pixels(backend: Runner, op: str, act: str, dtype: torch.dtype, values: tuple[float, ...]) -> None:
    """Kind and place of every non-finite output are eager's; the finite rest is as right as ever."""
    if backend.name in ("cuda", "triton") and op == "depthwise_block" and dtype.itemsize == 2:
        pytest.skip("tensor cores multiply it by the zeros of a banded matrix, too: csrc/cuda/README.md says how far")
    x, *rest = cases.inputs(op, cases.RAGGED[op], dtype, act)
    for layout in ("contiguous", "channels_last"):
        args = (cases.LAYOUTS[layout](_plant(x, *values)), *rest)
        out, eager = backend(op, *args), _eager64(op, args)
        check_nonfinite(out, eager, _eager(op, args), layout)
        finite = torch.isfinite(eager)
        with_specials, without = cases.expect(op, args), cases.expect(op, (x, *rest))
        ref, plain = (
            with_specials.ref[finite],
            with_specials.plain[finite],
        )  # relu(-inf) is finite, its magnitude is not
        magnitude = without.magnitude.max().expand(ref.shape)  # relu(-inf) is finite, its magnitude is not
        check(out[finite], Expected(ref, plain, magnitude, without.terms, dtype), f"the finite part, {layout}")


@pytest.mark.parametrize("where", ("bias", "scale", "shift"))
@pytest.mark.parametrize("act", cases.ACTS)
@pytest.mark.parametrize("op", BLOCKS)
def test_nonfinite_vectors(backend: Runner, op: str, act: str, where: str) -> None:
    """inf and NaN in one channel's constants stay in that channel."""
    args = list(cases.inputs(op, cases.RAGGED[op], F32, act))
    index = ("x", "weight", "bias", "scale", "shift").index(where)
    args[index] = _plant(args[index], *SPECIAL)
    check_nonfinite(backend(op, *args), _eager64(op, tuple(args)), _eager(op, tuple(args)))


@pytest.mark.parametrize("dtype", cases.DTYPES, ids=cases.name)
@pytest.mark.parametrize("op", ("patch_embed", "pointwise_block", "pool_head"))
def test_nonfinite_weight(backend: Runner, op: str, dtype: torch.dtype) -> None:
    """A zero pixel times an infinite weight is NaN, not skipped."""
    x, weight, *rest = cases.inputs(op, cases.RAGGED[op], dtype, "none")
    args = (_plant(x, 0.0), _plant(weight, *SPECIAL), *rest)
    check_nonfinite(backend(op, *args), _eager(op, args))


@pytest.mark.parametrize("kernel", ((3, 3), (7, 7), (9, 9), (8, 8), (4, 6)), ids=cases.name)
@pytest.mark.parametrize("dtype", cases.DTYPES, ids=cases.name)
def test_nonfinite_depthwise_weight(backend: Runner, dtype: torch.dtype, kernel: tuple[int, int]) -> None:
    """The same inside the image; at its edges eager itself may multiply a padding zero by inf or leave the tap out."""
    kh, kw = kernel
    x, weight, *rest = cases.inputs("depthwise_block", (2, 19, 15, 26, kh, kw), dtype, "none")
    args = (x, _plant(weight, *SPECIAL), *rest)
    inside = (..., slice(kh, -kh), slice(kw, -kw))
    out, eager = backend("depthwise_block", *args), _eager("depthwise_block", args)
    check_nonfinite(out[inside], eager[inside])
    good = torch.isfinite(weight.float() + args[1].float()).flatten(1).all(1)
    assert torch.isfinite(out[:, good]).all(), "channels with finite weights"


@pytest.mark.parametrize("op", cases.OPS)
def test_no_trace_of_the_last_call(backend: Runner, op: str) -> None:
    """A call full of NaN leaves nothing in scratch memory that the next one could read."""
    for shape in (cases.RAGGED[op], cases.SHAPES[op][3]):
        args, expected = cases.problem(op, shape)
        backend(op, torch.full_like(args[0], torch.nan), *args[1:])
        check(backend(op, *args), expected)


def _rounding_cases(dtype: torch.dtype) -> Tensor:
    """float32 values at, just below and just above numbers of ``dtype`` and the ties between them."""
    dropped = 16 if dtype == torch.bfloat16 else 13
    tie = 1 << (dropped - 1)
    exact = torch.randint(-(2**15), 2**15, (600,), dtype=torch.int16).view(dtype).float().view(torch.int32)
    near = torch.tensor([0, 1, tie - 1, tie, tie + 1, 2 * tie - 1], dtype=torch.int32)
    values = (exact[:, None] + near).flatten().view(F32)
    largest = torch.finfo(dtype).max
    half_ulp = largest * torch.finfo(dtype).eps / 4  # beyond it, overflow
    edge = torch.tensor([largest, largest + half_ulp * 0.99, largest + half_ulp, largest + 2 * half_ulp, 3e38])
    small = torch.tensor([2.0**-24, 2.0**-25, 1.5 * 2.0**-25, 2.0**-14, 2.0**-14 - 2.0**-26, 6e-5, 5.9e-8, 0.0])
    return torch.cat([values, edge, -edge, small, -small, torch.tensor(SPECIAL)])


@pytest.mark.parametrize("layout", ("contiguous", "channels_last"))
@pytest.mark.parametrize("dtype", (torch.float16, torch.bfloat16), ids=cases.name)
@pytest.mark.parametrize("op", cases.OPS)
def test_rounding(backend: Runner, op: str, dtype: torch.dtype, layout: str) -> None:
    """Round to nearest, ties to even, overflow to inf: float32 values brought in as shift (bias) reach the output."""
    values = _rounding_cases(dtype)
    c = len(values)
    if op == "pool_head":
        args = (torch.zeros(2, 1, 3, 3, dtype=dtype), torch.ones(c, 1, dtype=dtype), values)
    else:
        channels = c if op == "depthwise_block" else 1
        x = torch.zeros(2, channels, 2, 3, dtype=dtype)
        args = (x, torch.ones(c, 1, 1, 1, dtype=dtype), None, None, values, "none")
        args = (*args, True) if op == "depthwise_block" else args
    args = (cases.LAYOUTS[layout](args[0]), *args[1:])
    out = backend(op, *args).transpose(0, 1).reshape(c, -1)
    wanted = values.to(dtype)[:, None].expand(out.shape)
    if dtype == torch.bfloat16:  # hardware may flush its denormals
        denormal = values.abs() < torch.finfo(dtype).tiny
        assert (out[denormal].abs() <= torch.finfo(dtype).tiny).all()
        out, wanted = out[~denormal], wanted[~denormal]
    check_equal(out, wanted)


@pytest.mark.parametrize("op", cases.OPS)
def test_overflow(backend: Runner, op: str) -> None:
    """float16 results beyond 65504 become inf exactly where eager's do; a float32 sum in between does not overflow."""
    x, weight, *rest = cases.inputs(op, cases.RAGGED[op], torch.float16, "none")
    args = ((x * 10000).clamp(-60000, 60000), weight * 4, *rest)
    eager = _eager(op, args)
    assert torch.isinf(eager).any() and torch.isfinite(eager).any()
    check_nonfinite(backend(op, *args), eager)


@pytest.mark.parametrize("act", cases.ACTS)
def test_huge(backend: Runner, act: str) -> None:
    """Squares and cubes inside an activation may overflow, its value does not."""
    magnitudes = torch.logspace(2, 37, 200)
    x = torch.cat([magnitudes, -magnitudes]).view(1, 1, 20, 20)
    out = backend("depthwise_block", x, torch.ones(1, 1, 1, 1), *NONE3, act, False)
    ref = cases.formula(torch.float64, "depthwise_block", x, torch.ones(1, 1, 1, 1), *NONE3, act, False)
    error, allowed = (out.double() - ref).abs(), 4 * 2.0**-24 * x.abs().double()
    assert torch.isfinite(out).all()
    assert (error <= allowed).all(), f"worst at x = {x.flatten()[(error / allowed).argmax()]}"
    if act != "none":
        assert (out[x < 0] == 0).all(), f"{act} of large negative numbers is 0, got {out[x < 0].min()}"


@pytest.mark.parametrize("act", cases.ACTS)
@pytest.mark.parametrize("op", BLOCKS)
def test_denormals(backend: Runner, op: str, act: str) -> None:
    """Inputs below the smallest normal number: kept or flushed to zero, never anything else."""
    x, weight, *_ = cases.inputs(op, cases.RAGGED[op])
    args = (x * 1e-39, weight, *NONE3, act, *((True,) if op == "depthwise_block" else ()))
    assert ((args[0] != 0) & (args[0].abs() < torch.finfo(F32).tiny)).any()
    out = backend(op, *args)
    assert (out.abs() <= torch.finfo(F32).tiny * 8).all()
    check(out, cases.expect(op, args))


EDGES = (-40, -14, -8, -6, -5, -4, -3, -2, -1, -0.1, -1e-3, 0, 1e-3, 0.1, 1, 2, 3, 4, 6, 8, 14, 40)


@pytest.mark.parametrize("act", ("gelu", "gelu_tanh"))
def test_gelu_accuracy(backend: Runner, act: str) -> None:
    """Interval by interval, so that large errors of torch elsewhere excuse nothing: at most twice torch's largest."""
    one = torch.ones(1, 1, 1, 1)
    for low, high in itertools.pairwise(EDGES):
        x = torch.linspace(low, high, 40_001).view(1, 1, 1, -1)
        args = (x, one, *NONE3, act, False)
        check(backend("depthwise_block", *args), cases.expect("depthwise_block", args), f"{act} in {low} .. {high}")


@pytest.mark.parametrize("dtype", (torch.float16, torch.bfloat16), ids=cases.name)
@pytest.mark.parametrize("act", ("gelu", "gelu_tanh"))
def test_gelu_of_every_number(backend: Runner, act: str, dtype: torch.dtype) -> None:
    """Every finite float16 or bfloat16: the right one, or its neighbour where the exact value is close to a tie."""
    x = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
    x = x[torch.isfinite(x)].view(1, 1, 1, -1)
    args = (x, torch.ones(1, 1, 1, 1, dtype=dtype), *NONE3, act, False)
    check(backend("depthwise_block", *args), cases.expect("depthwise_block", args))


@pytest.mark.parametrize("dtype", cases.DTYPES, ids=cases.name)
@pytest.mark.parametrize("op", cases.OPS)
def test_cancellation(backend: Runner, op: str, dtype: torch.dtype) -> None:
    """Large terms that cancel: pixels around 1000, weights that sum to zero, a shift that takes the scale back."""
    x, weight, *rest = cases.inputs(op, cases.RAGGED[op], dtype, "none")
    weight = (weight - weight.float().flatten(1).mean(1).view(-1, *[1] * (weight.dim() - 1))).to(dtype)
    args = (x + 1000, weight, *rest)
    check(backend(op, *args), cases.expect(op, args))


def test_mean_of_many(backend: Runner) -> None:
    """The pool sums 200 x 200 pixels of mean 10000 without losing their spread."""
    x = 10_000 + torch.randn(1, 5, 200, 200)
    args = (x, torch.eye(5), None)
    check(backend("pool_head", *args), cases.expect("pool_head", args))


@pytest.mark.parametrize("dtype", (torch.float16, torch.bfloat16), ids=cases.name)
def test_long_sums_are_float32(backend: Runner, dtype: torch.dtype) -> None:
    """A sum of 3000 ones is 3000, where a narrow accumulator stops at 2048 or 256."""
    ones = torch.ones(1, 3000, 2, 2, dtype=dtype)
    weight = torch.ones(3, 3000, 1, 1, dtype=dtype)
    out = backend("pointwise_block", ones, weight, *NONE3, "none")
    check_equal(out, torch.full_like(out, 3000.0))
    out = backend("pool_head", ones, weight.flatten(1), None)
    check_equal(out, torch.full_like(out, 3000.0))
    ones, weight = torch.ones(1, 3, 70, 70, dtype=dtype), torch.ones(3, 1, 31, 31, dtype=dtype)
    out = backend("depthwise_block", ones, weight, *NONE3, "none", False)
    check_equal(out[..., 15:-15, 15:-15], torch.full_like(out[..., 15:-15, 15:-15], 961.0))


def test_bias_is_not_rounded(backend: Runner) -> None:
    """A float32 vector on a bfloat16 image keeps its bits until the result is rounded."""
    x = torch.full((1, 1, 1, 1), 1.0, dtype=torch.bfloat16)
    bias, scale = torch.tensor([2.0**-12]), torch.tensor([4096.0])
    out = backend("depthwise_block", x, x, bias, scale, torch.tensor([-4096.0]), "none", False)
    assert out.item() == 1.0  # (1 + 2^-12) 4096 - 4096; a rounded bias would give 0


def test_public_functions_are_covered() -> None:
    assert {op for op in ops.__all__ if not op.endswith("_train")} == set(cases.OPS)


def _layer_by_layer(op: str, x: Tensor, weight: Tensor, bias: Tensor, *rest: Any) -> Tensor:
    """PyTorch's own layers in x's dtype, each of which rounds."""
    if op == "pool_head":
        return F.linear(F.adaptive_avg_pool2d(x, 1).flatten(1), weight, bias)
    scale, shift, act, *residual = rest
    conv = F.conv2d(x, weight, bias) if op == "pointwise_block" else cases.conv(op, x, weight, bias)
    a = activation(act)(conv)
    y = F.batch_norm(a, torch.zeros_like(scale), torch.ones_like(scale), scale, shift, False, 0.0, 1e-12)
    return y + x if residual == [True] else y


@pytest.mark.parametrize("act", ("gelu", "relu"))
@pytest.mark.parametrize("op", cases.OPS)
def test_bfloat16_is_closer_than_layer_by_layer(backend: Runner, op: str, act: str) -> None:
    """The mean error against float64 is smaller than that of PyTorch's layers with the same parameters."""
    for images in (8, 9, 10):  # from which the seed follows
        shape = (images, *cases.RAGGED[op][1:])
        args = cases.inputs(op, shape, torch.bfloat16, act)
        ref = cases.formula(torch.float64, op, *args)
        ours, plain = ((y.double() - ref).abs().mean() for y in (backend(op, *args), _layer_by_layer(op, *args)))
        assert ours < plain, f"{shape}: {ours:.3g}, layer by layer {plain:.3g}"
