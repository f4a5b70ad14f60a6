"""Calls the CUDA kernels of pointwise_block, patch_embed and pool_head on torch CPU tensors (tests/emulator)."""

import contextlib
import ctypes
from typing import Any

import ahead
import torch
from emulated import ACTS, DTYPES, NoPlan, build
from torch import Tensor

LAYOUTS = ("pixels", "channels_last", "gather")
TILES = range(3)  # of product_mma
WGMMA = 3
SOURCES = (
    "csrc/cuda/product_mma.cu",
    "csrc/cuda/product_wgmma.cu",
    "csrc/cuda/pool_head.cu",
    "csrc/cuda/epilogue_inplace.cu",
    "csrc/cuda/recast.cu",
    "csrc/cuda/fold.cu",
    "csrc/cuda/unfold.cu",
    "csrc/cuda/training_final.cu",
    "tests/emulator/product.cpp",
)
Int, Long, Pointer = ctypes.c_int, ctypes.c_int64, ctypes.c_void_p


class _Forward(ctypes.Structure):
    """ProductForward of csrc/cuda/product.h"""

    _fields_ = (
        *((name, Pointer) for name in ("x", "weight", "y", "bias", "scale", "shift")),
        ("shape", Int * 8),
        ("strides", Long * 8),
        ("act", Int),
        *((name, Pointer) for name in ("partials", "like", "mean")),
    )


class _PoolHead(ctypes.Structure):
    """PoolHeadForward of csrc/cuda/product.h"""

    _fields_ = (
        *((name, Pointer) for name in ("x", "weight", "bias", "pooled", "y")),
        ("sizes", Int * 6),
        ("strides", Long * 4),
        ("vector_loads", ctypes.c_bool),
    )


class _Epilogue(ctypes.Structure):
    """EpilogueInplace of csrc/cuda/product.h"""

    _fields_ = (
        *((name, Pointer) for name in ("y", "bias", "scale", "shift")),
        *((name, Long) for name in ("rows", "columns", "channels")),
        ("act", Int),
        ("channels_last", ctypes.c_bool),
    )


class _Kept(ctypes.Structure):
    """KeptWeight of csrc/cuda/recast.h"""

    _fields_ = (*((name, Pointer) for name in ("from", "to", "samples")), ("count", Long))


class _Run(ctypes.Structure):
    """struct Run of tests/emulator/product.cpp"""

    _fields_ = (("order", Int), ("seed", ctypes.c_uint), ("message", ctypes.c_char_p))


@ahead.once
def library() -> ctypes.CDLL:
    return ctypes.CDLL(str(build("library", *SOURCES)))


def _call(function: str, order: int, *arguments: object) -> None:
    message = ctypes.create_string_buffer(1000)
    run = _Run(order, order + 1, ctypes.cast(message, ctypes.c_char_p))
    result = getattr(library(), function)(*arguments, ctypes.byref(run))
    if result == -1:
        raise NoPlan
    if result:
        raise RuntimeError(message.value.decode() or f"cudaError {result}")


def _pointers(*tensors: Tensor | None) -> list[int | None]:
    return [None if t is None else t.data_ptr() for t in tensors]


def product(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    act: str = "none",
    *,
    tile: int = 0,
    out: Tensor | None = None,
    found: Tensor | None = None,
    like: Tensor | None = None,
    mean: Tensor | None = None,
    order: int = 0,
    multiprocessors: int = 1,
) -> tuple[Tensor, str]:
    """patch_embed (pointwise_block where the patch is 1x1) with one tile, and the layout that was read.

    tile: of TILES, or WGMMA, whose blocks are at most ``multiprocessors``.
    found [2, C]: of training, becomes the moments of act(y) or, beside ``like`` with its ``mean``, sums of y.
    """
    n, c_in, height, width = x.shape
    c_out, _, ph, pw = weight.shape
    y = x.new_full((n, c_out, height // ph, width // pw), torch.nan) if out is None else out
    shape = (n, c_in, c_out, height // ph, width // pw, ph, pw, DTYPES.index(x.dtype))
    p = _Forward(*_pointers(x, weight, y, bias, scale, shift), shape, (*x.stride(), *y.stride()), ACTS.index(act))
    p.like, p.mean = _pointers(like, mean)
    layout, result = Int(), Pointer(*_pointers(found))
    _call("cmx_emulate_product", order, ctypes.byref(p), tile, multiprocessors, ctypes.byref(layout), result)
    return y, LAYOUTS[layout.value]


def training_product(
    x: Tensor, weight: Tensor, bias: Tensor | None, act: str, channels_last: bool
) -> tuple[Tensor, Tensor]:
    """As the operator of this name, by the first of the kernels that takes it."""
    n, _, height, width = x.shape
    c, _, ph, pw = weight.shape
    layout = torch.channels_last if channels_last else torch.contiguous_format
    y = torch.empty((n, c, height // ph, width // pw), dtype=x.dtype, memory_format=layout).fill_(torch.nan)
    found = torch.full((2, c), torch.nan)
    return _by_the_first(x, weight, bias, act=act, out=y, found=found), found


def training_product_sums(da: Tensor, weight: Tensor, x: Tensor, affine: Tensor, act: str) -> tuple[Tensor, Tensor]:
    """As the operator of this name, by the first of the kernels that takes it."""
    dx, found = torch.full_like(x, torch.nan), torch.full((2, x.shape[1]), torch.nan)
    given = {"like": x, "mean": affine[0].contiguous(), "out": dx, "found": found}
    return _by_the_first(da, weight.transpose(0, 1).contiguous(), act=act, **given), found


def _by_the_first(*args: Tensor | None, **options: Any) -> Tensor:
    for tile in (WGMMA, 0, 1):
        with contextlib.suppress(NoPlan):
            return product(*args, tile=tile, **options)[0]
    raise NoPlan


def pool_head(x: Tensor, weight: Tensor, bias: Tensor | None = None, *, order: int = 0) -> Tensor:
    n, c, h, w = x.shape
    y, pooled = x.new_full((n, len(weight)), torch.nan), torch.full((n, c), torch.nan)
    sizes = (n, c, h, w, len(weight), DTYPES.index(x.dtype))
    p = _PoolHead(*_pointers(x, weight, bias, pooled, y), sizes, x.stride(), False)
    _call("cmx_emulate_pool_head", order, ctypes.byref(p))
    return y


def epilogue(
    y: Tensor, bias: Tensor | None, scale: Tensor | None, shift: Tensor | None, act: str, *, order: int = 0
) -> Tensor:
    """In place on a dense float32 y."""
    n, c, h, w = y.shape
    last = not y.is_contiguous()
    rows, columns = (n * h * w, c) if last else (n * c, h * w)
    p = _Epilogue(*_pointers(y, bias, scale, shift), rows, columns, c, ACTS.index(act), last)
    _call("cmx_emulate_epilogue", order, ctypes.byref(p))
    return y


def recast(weight: Tensor, copy: Tensor, samples: Tensor, every: bool, *, order: int = 0) -> Tensor:
    """``copy`` of a weight, brought up to date; with ``every`` whatever the samples say."""
    kept = _Kept(*_pointers(weight, copy, samples), weight.numel())
    _call("cmx_emulate_recast", order, ctypes.byref(kept), DTYPES.index(copy.dtype), ctypes.c_bool(every))
    return copy


def unfold(x: Tensor, weight: Tensor, last: bool, *, order: int = 0, multiprocessors: int = 1) -> tuple[Tensor, Tensor]:
    """The patches of an image, [N, K, H, W] as planes or channels_last, and its weight [C, K] as rows as long."""
    n, c, height, width = x.shape
    c_out, _, ph, pw = weight.shape
    h, w, k = height // ph, width // pw, -(-c * ph * pw // 8) * 8
    layout = torch.channels_last if last else torch.contiguous_format
    patches = torch.empty((n, k, h, w), dtype=x.dtype, memory_format=layout).fill_(torch.nan)
    rows = torch.full((c_out, k), torch.nan, dtype=x.dtype)
    numbers = (Int * 7)(n, c, c_out, h, w, ph, pw), (Long * 4)(*x.stride()), (Long * 4)(*weight.stride())
    _call(
        "cmx_emulate_unfold", order, *map(Pointer, _pointers(x, patches, weight, rows)), *numbers, last, multiprocessors
    )
    return patches, rows


def widen(vectors: tuple[Tensor, ...], *, order: int = 0) -> Tensor:
    """Vectors of 16 bits as float32, [vectors, C]."""
    rows = torch.full((len(vectors), len(vectors[0])), torch.nan)
    places = (Pointer * len(vectors))(*_pointers(*vectors))
    numbers = len(vectors[0]), DTYPES.index(vectors[0].dtype)
    _call("cmx_emulate_widen", order, places, len(vectors), Pointer(rows.data_ptr()), *numbers)
    return rows


def fold(vectors: tuple[Tensor, ...], eps: float, *, order: int = 0) -> Tensor:
    """[3, C] bias, scale and shift of bias, mean, variance, gamma and beta."""
    rows = torch.full((3, len(vectors[0])), torch.nan)
    places = (Pointer * 5)(*_pointers(*vectors))
    numbers = len(vectors[0]), ctypes.c_float(eps), DTYPES.index(vectors[0].dtype)
    _call("cmx_emulate_fold", order, places, Pointer(rows.data_ptr()), *numbers)
    return rows
