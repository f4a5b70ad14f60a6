"""Values of every operator against float64: shapes, dtypes, activations, vectors, layouts, on every backend."""

import cases
import pytest
import torch
from cases import LAYOUTS, MATRIX_LAYOUTS, RAGGED, VECTOR_LAYOUTS
from compare import check, check_equal
from conftest import Runner

from cmx_kernels import ops

BLOCKS = ("patch_embed", "depthwise_block", "pointwise_block")
BF16, F32 = torch.bfloat16, torch.float32


@pytest.mark.parametrize("dtype", cases.ALL_DTYPES, ids=cases.name)
@pytest.mark.parametrize(("op", "shape"), cases.EVERY_SHAPE, ids=cases.name)
def test_shapes(backend: Runner, op: str, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    """Both dense layouts of every shape."""
    args, expected = cases.problem(op, shape, dtype)
    check(backend(op, *args), expected)
    last = args[0].contiguous(memory_format=torch.channels_last)
    check(backend(op, last, *args[1:]), expected, "channels_last")


@pytest.mark.parametrize("dtype", cases.ALL_DTYPES, ids=cases.name)
@pytest.mark.parametrize(("op", "shape"), cases.EVERY_SHAPE, ids=cases.name)
def test_integers_are_exact(backend: Runner, op: str, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    """Sums of small integers are exact in any order, so the one rounding at the end is all that is allowed."""
    x_size, weight_size = cases.sizes(op, shape)
    x, weight = torch.randint(-3, 4, x_size).to(dtype), torch.randint(-2, 3, weight_size).to(dtype)
    if op == "pool_head":  # a mean over a power of two pixels
        x = x[:, :, :1, :1].repeat(1, 1, 4, 2)
        args = (x, weight, torch.randint(-9, 9, weight_size[:1]).to(dtype))
    else:
        bias, scale, shift = (torch.randint(-9, 9, weight_size[:1]).to(torch.float32) for _ in range(3))
        if dtype == torch.float64:
            bias, scale, shift = bias.double(), scale.double(), shift.double()
        args = (x, weight, bias, scale / 4, shift, "relu", *((True,) if op == "depthwise_block" else ()))
    check_equal(backend(op, *args), cases.formula(torch.float64, op, *args).to(dtype))


@pytest.mark.parametrize("dtype", (F32, BF16), ids=cases.name)
@pytest.mark.parametrize("k", range(1, 32))
def test_every_kernel_size(backend: Runner, k: int, dtype: torch.dtype) -> None:
    """Squares, and a rectangle with the other parity."""
    for kernel in ((k, k), (k, 32 - k), (k, 31 - (k - 1) // 2)):
        args, expected = cases.problem("depthwise_block", (1, 18, 9, 14, *kernel), dtype)
        check(backend("depthwise_block", *args), expected, f"kernel {kernel}")


@pytest.mark.parametrize("width", range(1, 41))
def test_every_width(backend: Runner, width: int) -> None:
    """Tile edges: each width through a 7x7 kernel, a patch of 3x2 and a 1x1 convolution, and as a channel count."""
    for op, shape in (
        ("depthwise_block", (1, 5, 4, width, 7, 7)),
        ("depthwise_block", (1, width, 3, 5, 9, 9)),
        ("pointwise_block", (1, 9, 6, 2, width)),
        ("pointwise_block", (1, width, 5, 3, 3)),
        ("pointwise_block", (1, 5, width, 3, 3)),
        ("patch_embed", (1, 3, 4, 6, width + 1, 3, 2)),
        ("pool_head", (1, width, width + 1, 3, 3)),
    ):
        args, expected = cases.problem(op, shape)
        check(backend(op, *args), expected, f"{op} {shape}")


@pytest.mark.parametrize("dtype", cases.ALL_DTYPES, ids=cases.name)
@pytest.mark.parametrize("act", cases.ACTS)
@pytest.mark.parametrize(("op", "residual"), ((*((op, False) for op in BLOCKS), ("depthwise_block", True))))
def test_activations(backend: Runner, op: str, act: str, dtype: torch.dtype, residual: bool) -> None:
    args, expected = cases.problem(op, RAGGED[op], dtype, act, None, residual)
    check(backend(op, *args), expected)


@pytest.mark.parametrize("dtype", cases.DTYPES, ids=cases.name)
@pytest.mark.parametrize("op", cases.OPS)
def test_vectors(backend: Runner, op: str, dtype: torch.dtype) -> None:
    """bias, scale and shift each absent, in x's dtype or in float32."""
    kinds = (None, dtype, torch.float32)
    combinations = [(b, s, t) for b in kinds for s in kinds for t in kinds]
    for vectors in combinations:
        if op == "pool_head" and (vectors[1] is not None or vectors[2] is not None):
            continue
        args, expected = cases.problem(op, RAGGED[op], dtype, "relu", vectors)
        check(backend(op, *args), expected, f"bias, scale, shift in {vectors}")


@pytest.mark.parametrize("op", cases.OPS)
def test_defaults(op: str) -> None:
    """The public functions need x and weight only: GELU, with the residual."""
    x, weight, *_ = cases.inputs(op, RAGGED[op])
    args = (x, weight, None) if op == "pool_head" else (x, weight, None, None, None, "gelu")
    args = (*args, True) if op == "depthwise_block" else args
    check(getattr(ops, op)(x, weight), cases.expect(op, args))


@pytest.mark.parametrize("dtype", (F32, BF16), ids=cases.name)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("op", cases.OPS)
def test_layouts_of_x(backend: Runner, op: str, layout: str, dtype: torch.dtype) -> None:
    """Any strides, with NaN all around the view: neither read past it nor write into it."""
    for shape in (RAGGED[op], cases.SHAPES[op][3]):
        args = cases.inputs(op, shape, dtype)
        x = LAYOUTS[layout](args[0])
        before = x.clone()
        check(backend(op, x, *args[1:]), cases.expect(op, (x, *args[1:])), f"{shape}")
        check_equal(x, before, "x after the call")


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("op", BLOCKS)
def test_layouts_of_the_weight(backend: Runner, op: str, layout: str) -> None:
    x, weight, *rest = cases.inputs(op, RAGGED[op])
    args = (x, LAYOUTS[layout](weight), *rest)
    check(backend(op, *args), cases.expect(op, args))


@pytest.mark.parametrize("layout", MATRIX_LAYOUTS)
def test_layouts_of_the_classifier(backend: Runner, layout: str) -> None:
    x, weight, bias = cases.inputs("pool_head", RAGGED["pool_head"])
    args = (x, MATRIX_LAYOUTS[layout](weight), bias)
    check(backend("pool_head", *args), cases.expect("pool_head", args))


@pytest.mark.parametrize("dtype", (F32, BF16), ids=cases.name)
@pytest.mark.parametrize("layout", VECTOR_LAYOUTS)
@pytest.mark.parametrize("op", cases.OPS)
def test_layouts_of_the_vectors(backend: Runner, op: str, layout: str, dtype: torch.dtype) -> None:
    args = cases.inputs(op, RAGGED[op], dtype, "gelu", (dtype, F32, dtype))
    args = tuple(VECTOR_LAYOUTS[layout](v) if isinstance(v, torch.Tensor) and v.dim() == 1 else v for v in args)
    check(backend(op, *args), cases.expect(op, args))


def test_one_tensor_as_several_arguments(backend: Runner) -> None:
    """Aliased arguments are only read."""
    v = torch.randn(6)
    weight = torch.randn(6, 6, 1, 1)
    for op, args in (
        ("pointwise_block", (weight, weight, v, v, v, "gelu")),
        ("depthwise_block", (torch.randn(1, 6, 5, 5), weight[:, :1], v, v, v, "gelu", True)),
        ("pool_head", (weight, weight.flatten(1), v)),
    ):
        check(backend(op, *args), cases.expect(op, args), op)


@pytest.mark.parametrize("op", cases.OPS)
def test_negative_views(backend: Runner, op: str) -> None:
    """A lazy negation (the imaginary part of a conjugate) is resolved, not ignored."""
    args = cases.inputs(op, RAGGED[op])
    x = torch.complex(args[0], -args[0]).conj().imag
    assert x.is_neg()
    check(backend(op, x, *args[1:]), cases.expect(op, (args[0], *args[1:])))


@pytest.mark.parametrize("op", cases.OPS)
def test_result_is_new_memory(backend: Runner, op: str) -> None:
    """Functional: no output shares memory with an input, no input changes."""
    args = cases.inputs(op, RAGGED[op], F32, "none")
    tensors = [a for a in args if isinstance(a, torch.Tensor)]
    before = [t.clone() for t in tensors]
    out = backend(op, *args)
    out.zero_()
    for tensor, value in zip(tensors, before, strict=True):
        check_equal(tensor, value, "an input after the call")


@pytest.mark.parametrize("op", BLOCKS)
def test_parameter_subclass(backend: Runner, op: str) -> None:
    """nn.Parameter weights without a gradient mode are plain tensors to a kernel."""
    args, expected = cases.problem(op, RAGGED[op])
    x, weight, *rest = args
    with torch.inference_mode():
        check(backend(op, x, torch.nn.Parameter(weight), *rest).clone(), expected)
