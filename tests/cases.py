"""Shapes, layouts and inputs for the operators, and their formulas in plain torch, independent of the package."""

import functools
import math
import zlib
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from compare import Expected
from torch import Tensor

OPS = ("patch_embed", "depthwise_block", "pointwise_block", "pool_head")
ACTS = ("gelu", "gelu_tanh", "relu", "none")
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
ALL_DTYPES = (*DTYPES, torch.float64)

# One shape of an operator: sizes of x [N, C, H, W], then of its weight.
DEPTHWISE = (  # n, c, h, w, kh, kw
    (1, 1, 1, 1, 1, 1), (2, 3, 1, 5, 3, 3), (1, 5, 4, 1, 2, 2), (3, 16, 7, 7, 7, 7), (2, 17, 7, 7, 9, 9),
    (1, 33, 14, 14, 9, 9), (2, 15, 17, 19, 5, 5), (1, 48, 32, 32, 7, 7), (5, 7, 6, 3, 3, 5), (1, 20, 36, 36, 9, 9),
    (1, 4, 56, 56, 7, 7), (2, 19, 8, 8, 8, 8), (1, 64, 9, 13, 4, 3), (1, 31, 5, 40, 1, 7), (1, 31, 40, 5, 7, 1),
    (1, 6, 20, 23, 31, 31), (2, 3, 4, 4, 31, 31), (1, 18, 16, 12, 5, 13), (1, 10, 11, 37, 2, 6), (1, 9, 2, 2, 30, 30),
    (1, 130, 3, 3, 3, 3), (2, 34, 10, 21, 6, 6), (1, 16, 28, 29, 11, 11), (1, 8, 13, 16, 15, 17), (0, 16, 7, 7, 3, 3),
)  # fmt: skip
POINTWISE = (  # n, cin, cout, h, w
    (1, 1, 1, 1, 1), (2, 3, 5, 1, 7), (1, 16, 16, 7, 7), (3, 17, 33, 7, 7), (2, 64, 48, 14, 14), (1, 100, 77, 5, 9),
    (1, 130, 7, 17, 19), (1, 7, 130, 6, 11), (5, 31, 32, 4, 3), (1, 384, 65, 3, 5), (1, 24, 24, 32, 32),
    (1, 2, 1, 3, 40), (0, 16, 16, 7, 7),
)  # fmt: skip
PATCH = (  # n, cin, cout, h, w, p, q
    (1, 1, 1, 1, 1, 1, 1), (2, 3, 17, 14, 14, 7, 7), (1, 3, 32, 28, 28, 14, 14), (1, 3, 16, 23, 20, 7, 7),
    (3, 1, 5, 9, 11, 2, 2), (1, 4, 33, 17, 19, 4, 3), (1, 3, 48, 32, 32, 1, 2), (2, 3, 7, 8, 8, 8, 8),
    (1, 5, 9, 1, 40, 1, 7), (1, 2, 64, 36, 36, 2, 2), (5, 3, 8, 15, 15, 5, 5), (1, 13, 21, 12, 31, 3, 31),
    (0, 3, 16, 14, 14, 7, 7),
)  # fmt: skip
POOL = (  # n, c, classes, h, w
    (1, 1, 1, 1, 1), (2, 16, 10, 7, 7), (3, 17, 33, 5, 9), (1, 130, 7, 14, 14), (5, 33, 100, 1, 40), (1, 48, 1, 32, 32),
    (2, 31, 64, 17, 19), (0, 16, 10, 7, 7),
)  # fmt: skip
SHAPES = {"depthwise_block": DEPTHWISE, "pointwise_block": POINTWISE, "patch_embed": PATCH, "pool_head": POOL}
NOTHING = (  # no channels or no pixels: torch's convolutions refuse most of these
    ("depthwise_block", (2, 0, 7, 7, 3, 3)),
    ("depthwise_block", (2, 16, 0, 7, 3, 3)),
    ("depthwise_block", (2, 16, 7, 0, 3, 4)),
    ("pointwise_block", (2, 0, 5, 3, 3)),
    ("pointwise_block", (2, 5, 0, 3, 3)),
    ("pointwise_block", (2, 5, 6, 3, 0)),
    ("patch_embed", (1, 3, 0, 14, 14, 7, 7)),
    ("patch_embed", (2, 0, 4, 4, 4, 2, 2)),
    ("pool_head", (2, 16, 0, 3, 3)),
    ("pool_head", (2, 0, 5, 3, 3)),
    ("pool_head", (2, 4, 5, 3, 0)),
)
RAGGED = {  # one shape each for tests that vary something else; no size a multiple of a vector or a tile
    "depthwise_block": (2, 19, 9, 11, 5, 4),
    "pointwise_block": (2, 19, 37, 5, 7),
    "patch_embed": (2, 3, 21, 13, 11, 4, 3),
    "pool_head": (2, 19, 11, 5, 7),
}


def name(value: object) -> str | None:
    """A short test id for a shape, a dtype or a callable."""
    if isinstance(value, tuple):
        return "x".join(str(v) for v in value)
    if isinstance(value, torch.dtype):
        return str(value).removeprefix("torch.")
    return value.__name__ if callable(value) else None


EVERY_SHAPE = [(op, shape) for op in OPS for shape in SHAPES[op]]


def sizes(op: str, shape: tuple[int, ...]) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The shapes of x and of the weight."""
    if op == "depthwise_block":
        n, c, h, w, kh, kw = shape
        return (n, c, h, w), (c, 1, kh, kw)
    n, cin, cout, h, w, *patch = shape
    return (n, cin, h, w), (cout, cin) if op == "pool_head" else (cout, cin, *(patch or (1, 1)))


def inputs(
    op: str,
    shape: tuple[int, ...],
    dtype: torch.dtype = torch.float32,
    act: str = "gelu",
    vectors: tuple[torch.dtype | None, ...] | None = None,
    residual: bool = True,
) -> tuple[Any, ...]:
    """Positional arguments of an operator, outputs of order one. ``vectors``: dtypes of bias, scale, shift, or None."""
    generator = torch.Generator().manual_seed(zlib.crc32(f"{op}{shape}{act}".encode()))

    def normal(size: tuple[int, ...], dtype: torch.dtype, factor: float = 1.0) -> Tensor:
        return (torch.randn(size, generator=generator, dtype=torch.float64) * factor).to(dtype)

    x_size, weight_size = sizes(op, shape)
    fan_in = max(1, math.prod(weight_size[1:]))
    x, weight = normal(x_size, dtype), normal(weight_size, dtype, fan_in**-0.5)
    kinds = (dtype,) * 3 if vectors is None else vectors
    bias, scale, shift = (None if kind is None else normal(weight_size[:1], kind) for kind in kinds)
    if op == "pool_head":
        return x * 3, weight, bias
    rest = (act, residual) if op == "depthwise_block" else (act,)
    return (x, weight, bias, scale, shift, *rest)


def _act(act: str, a: Tensor) -> Tensor:
    """Activations by their definitions in float64, as torch has them in the other dtypes."""
    if a.dtype == torch.float64 and act == "gelu":
        return 0.5 * a * torch.erfc(-a / math.sqrt(2))
    if a.dtype == torch.float64 and act == "gelu_tanh":
        return 0.5 * a * (1 + torch.tanh(math.sqrt(2 / math.pi) * (a + 0.044715 * a**3)))
    return {
        "gelu": F.gelu,
        "gelu_tanh": functools.partial(F.gelu, approximate="tanh"),
        "relu": F.relu,
        "none": torch.clone,
    }[act](a)


def conv(op: str, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    if op == "depthwise_block":
        return F.conv2d(x, weight, bias, padding="same", groups=len(weight)) if x.numel() else x
    if op == "patch_embed":
        return F.conv2d(x, weight, bias, stride=weight.shape[2:]) if x.numel() else _empty_sum(x, weight, bias)
    y = torch.einsum("nchw,oc->nohw", x, weight.flatten(1)).contiguous()
    return y if bias is None else y + bias[:, None, None]


def _empty_sum(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """A convolution over no images or no channels, which F.conv2d refuses."""
    size = (x.shape[0], len(weight), *(s // k for s, k in zip(x.shape[2:], weight.shape[2:], strict=True)))
    zero = torch.zeros(size, dtype=x.dtype)
    return zero if bias is None else zero + bias[:, None, None]


def formula(
    dtype: torch.dtype, op: str, x: Tensor, weight: Tensor, *rest: Any, keep: Callable[[Tensor], Tensor] | None = None
) -> Tensor:
    """The operator in torch, every tensor in ``dtype``; keep: what becomes of the pre-activation."""
    x, weight, *rest = (v.to(dtype) if isinstance(v, Tensor) else v for v in (x, weight, *rest))
    if op == "pool_head":
        return F.linear(x.mean((2, 3)), weight, rest[0])
    bias, scale, shift, act, *residual = rest
    a = conv(op, x, weight, bias)
    y = _act(act, a if keep is None else keep(a))
    y = y if scale is None else y * scale[:, None, None]
    y = y if shift is None else y + shift[:, None, None]
    return y + x if residual and residual[0] else y


def magnitude(op: str, x: Tensor, weight: Tensor, *rest: Any) -> Tensor:
    """The formula on absolute values in float64: no number the result is summed from is larger."""
    x, weight, *rest = (v.detach().double().abs() if isinstance(v, Tensor) else v for v in (x, weight, *rest))
    if op == "pool_head":
        return formula(torch.float64, op, x, weight, rest[0])
    return formula(torch.float64, op, x, weight, *rest[:3], "none", *rest[4:])


def terms(op: str, x: Tensor, weight: Tensor) -> int:
    """How many products one element of the output sums."""
    if op == "pool_head":  # the mean first; in float64 one plain sum, whose errors all have one sign on a flat image
        pixels = x.shape[2] * x.shape[3]
        return (x.shape[1] * pixels) ** 2 if x.dtype == torch.float64 else x.shape[1] + pixels
    return math.prod(weight.shape[1:])


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def expect(op: str, args: tuple[Any, ...]) -> Expected:
    dtype = args[0].dtype
    with torch.no_grad():
        plain = formula(compute_dtype(dtype), op, *args)
        return Expected(formula(torch.float64, op, *args), plain, magnitude(op, *args), terms(op, *args[:2]), dtype)


@functools.cache
def problem(op: str, shape: tuple[int, ...], *rest: Any) -> tuple[tuple[Any, ...], Expected]:
    """Inputs and expectation; cached, because every backend is asked the same."""
    args = inputs(op, shape, *rest)
    return args, expect(op, args)


# ---- layouts: each returns a tensor of x's shape; what is not part of it reads as NaN ----


def _inside(x: Tensor, size: list[int], index: tuple[slice, ...]) -> Tensor:
    outer = torch.full(size, torch.nan, dtype=x.dtype, device=x.device)
    outer[index] = x
    return outer[index]


def _slice(dim: int) -> Callable[[Tensor], Tensor]:
    def apply(x: Tensor) -> Tensor:
        size, index = list(x.shape), [slice(None)] * x.dim()
        size[dim], index[dim] = size[dim] + 5, slice(3, 3 + x.shape[dim])
        return _inside(x, size, tuple(index))

    return apply


def _step(dim: int) -> Callable[[Tensor], Tensor]:
    def apply(x: Tensor) -> Tensor:
        size, index = list(x.shape), [slice(None)] * x.dim()
        size[dim], index[dim] = 2 * size[dim], slice(None, None, 2)
        return _inside(x, size, tuple(index))

    return apply


def _expand(*dims: int) -> Callable[[Tensor], Tensor]:
    def apply(x: Tensor) -> Tensor:
        index = tuple(slice(0, 1) if d in dims else slice(None) for d in range(x.dim()))
        return x[index].clone().expand(x.shape)

    return apply


def _permuted(*order: int) -> Callable[[Tensor], Tensor]:
    """Stored in another order of dimensions."""

    def apply(x: Tensor) -> Tensor:
        back = [order.index(d) for d in range(len(order))]
        return x.permute(order).contiguous().permute(back)

    return apply


def _misaligned(x: Tensor) -> Tensor:
    """One element past the start of its memory, so on no vector boundary."""
    flat = torch.full((x.numel() + 2,), torch.nan, dtype=x.dtype, device=x.device)
    flat[1:-1] = x.flatten()
    return flat[1:-1].view(x.shape)


def _of_channels_last(inner: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """``inner`` applied to memory in channels_last order."""
    return lambda x: inner(x.permute(0, 2, 3, 1).contiguous()).permute(0, 3, 1, 2)


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": torch.Tensor.contiguous,
    "channels_last": lambda x: x.contiguous(memory_format=torch.channels_last),
    "misaligned": _misaligned,
    "channels_last_misaligned": _of_channels_last(_misaligned),
    "batch_slice": _slice(0),
    "channel_slice": _slice(1),
    "row_slice": _slice(2),
    "column_slice": _slice(3),
    "every_other_image": _step(0),
    "every_other_channel": _step(1),
    "every_other_row": _step(2),
    "every_other_column": _step(3),
    "channels_last_channel_slice": _of_channels_last(_slice(3)),
    "channels_last_row_slice": _of_channels_last(_slice(1)),
    "channels_last_column_slice": _of_channels_last(_slice(2)),
    "channels_last_every_other_channel": _of_channels_last(_step(3)),
    "transposed_pixels": _permuted(0, 1, 3, 2),
    "channels_outside_batch": _permuted(1, 0, 2, 3),
    "batch_inside": _permuted(1, 2, 3, 0),
    "expanded_batch": _expand(0),
    "expanded_channels": _expand(1),
    "expanded_rows": _expand(2),
    "expanded_pixels": _expand(2, 3),
    "expanded_everywhere": _expand(0, 1, 2, 3),
}
MATRIX_LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": torch.Tensor.contiguous,
    "transposed": lambda w: w.t().contiguous().t(),
    "misaligned": _misaligned,
    "row_slice": _slice(0),
    "column_slice": _slice(1),
    "every_other_column": _step(1),
    "expanded_rows": _expand(0),
    "expanded_columns": _expand(1),
}
VECTOR_LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "misaligned": _misaligned,
    "every_other": _step(0),
    "expanded": _expand(0),
}


def with_layout(op: str, layout: str, grad: bool = False) -> tuple[Any, ...]:
    """Inputs of ragged sizes with x in a layout; leaves that want a gradient, if ``grad``."""
    x, *rest = inputs(op, RAGGED[op])
    args = (LAYOUTS[layout](x), *rest)
    return tuple(a.requires_grad_() if grad and isinstance(a, Tensor) else a for a in args)
