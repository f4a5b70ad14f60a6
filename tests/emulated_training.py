"""Calls the kernels of training, as tests/emulated.py builds them, on torch CPU tensors."""

import ctypes
from collections.abc import Callable

import torch
from emulated import ACTS, DTYPES, Gpu, NoPlan, gpu, library
from torch import Tensor

from cmx_kernels.ops import training_passes

Gradients = tuple[Tensor, Tensor, Tensor, Tensor]
Three = tuple[Tensor, Tensor, Tensor]


class _Backward(ctypes.Structure):
    """struct BackwardCall of tests/emulator/training.cpp"""

    _fields_ = (
        *((n, ctypes.c_void_p) for n in ("grad", "a", "x", "weight", "dx", "coefficients", "affine", "partials")),
        ("shape", ctypes.c_int * 7),
        ("strides", ctypes.c_int64 * 16),
        ("act", ctypes.c_int),
        ("residual", ctypes.c_bool),
        ("need_weight", ctypes.c_bool),
        *((n, ctypes.c_void_p) for n in ("dweight", "dbias", "sums")),
        ("gpu", Gpu),
        ("order", ctypes.c_int),
        ("tensor_cores", ctypes.c_bool),
    )


def _run(function: Callable[..., int], call: ctypes.Structure) -> None:
    message = ctypes.create_string_buffer(1000)
    result = function(ctypes.byref(call), message, ctypes.c_size_t(len(message)))
    if result == -1:
        raise NoPlan
    if result:
        raise RuntimeError(message.value.decode() or f"cudaError {result}")


def _address(t: Tensor | None) -> int | None:
    return None if t is None or not t.numel() else t.data_ptr()


def depthwise_backward(
    grad: Tensor,
    a: Tensor,
    coefficients: Tensor,
    x: Tensor,
    affine: Tensor | None,
    weight: Tensor,
    act: str,
    residual: bool,
    need_input: bool,
    need_weight: bool,
    *,
    kernel: str = "ffma",
    order: int = 0,
    multiprocessors: int = 1,
    dx: Tensor | None = None,
) -> Gradients:
    """As the operator depthwise_block_backward; ``dx`` may have strides of its own."""
    empty, channels = torch.empty(0), x.shape[1]
    dx = torch.full_like(x, torch.nan) if dx is None else dx
    dweight, dbias, sums = (torch.full(s, torch.nan) for s in (weight.shape, (channels,), (2, channels)))
    dx, sums = (dx, sums) if need_input else (empty.to(x.dtype), empty)
    dweight, dbias = (dweight, dbias) if need_weight else (empty, empty)
    sums = empty if affine is None else sums
    strides = [s for t in (grad, a, x, dx if need_input else x) for s in t.stride()]
    call = _Backward(
        *map(_address, (grad, a, x, weight, dx, coefficients, affine)),
        None,
        (*x.shape, *weight.shape[2:], DTYPES.index(x.dtype)),
        tuple(strides),
        ACTS.index(act),
        residual,
        need_weight,
        *map(_address, (dweight, dbias, sums)),
        gpu(multiprocessors),
        order,
        kernel == "mma",
    )
    _run(library().cmx_emulate_backward, call)
    return dx, dweight, dbias, sums


class _Rows(ctypes.Structure):
    """struct Rows of csrc/cuda/training.h"""

    _fields_ = (
        *((n, ctypes.c_void_p) for n in ("in0", "in1", "out", "rows0", "rows1", "partials")),
        ("strides", ctypes.c_int64 * 6),
        ("n", ctypes.c_int64),
        ("pixels", ctypes.c_int64),
        ("c", ctypes.c_int),
        ("dtype", ctypes.c_int),
        ("act", ctypes.c_int),
        ("mode", ctypes.c_int),
    )


class _RowsCall(ctypes.Structure):
    """struct RowsCall of tests/emulator/training.cpp"""

    _fields_ = (
        ("p", _Rows),
        ("result", ctypes.c_void_p),
        ("gpu", Gpu),
        ("order", ctypes.c_int),
    )


ORDER = 0  # of the threads in the passes below


def _pixel_strides(t: Tensor | None) -> tuple[int, int, int]:
    return (0, 0, 0) if t is None else (t.stride(0), t.stride(1), t.stride(3))


def _pass(mode: int, inputs: tuple, rows: tuple, out: Tensor | None, result: Tensor | None, act: str) -> None:
    first, second = inputs
    strides = [s for t in (first, out) for s in _pixel_strides(t)]  # second lies as first does
    n, c, h, w = first.shape
    size = (n, h * w, c, DTYPES.index(first.dtype), ACTS.index(act), mode)
    p = _Rows(*map(_address, (first, second, out, *rows)), None, tuple(strides), *size)
    _run(library().cmx_emulate_rows, _RowsCall(p, _address(result), gpu(2), ORDER))


def _like(x: Tensor) -> Tensor:
    return training_passes.product_layout(torch.full_like(x, torch.nan), training_passes.is_last(x))


def form_sum(x: Tensor, affine: Tensor | None, skip: Tensor | None, skip_affine: Tensor | None, act: str) -> Tensor:
    """As the operator training_sum; the next three likewise."""
    out = _like(x)
    _pass(0, (x, skip), (affine, skip_affine), out, None, act)
    return out


def form_gradient(grad: Tensor, a: Tensor, coefficients: Tensor, act: str) -> tuple[Tensor, Tensor]:
    da, dbias = _like(a), torch.full((a.shape[1],), torch.nan)
    _pass(1, (grad, a), (coefficients, None), da, dbias, act)
    return da, dbias


def moments(a: Tensor, act: str) -> Tensor:
    found = torch.full((2, a.shape[1]), torch.nan)
    _pass(2, (a, None), (None, None), None, found, act)
    return found


def sums(grad: Tensor, x: Tensor, affine: Tensor, act: str) -> Tensor:
    found = torch.full((2, x.shape[1]), torch.nan)
    _pass(3, (grad, x), (None, affine), None, found, act)
    return found


class _BatchNormRows(ctypes.Structure):
    """As csrc/batchnorm.h has it; the next one too"""

    _fields_ = (
        *((n, ctypes.c_void_p) for n in ("moments", "gamma", "beta", "rows", "rstd", "statistics")),
        ("c", ctypes.c_int64),
        ("eps", ctypes.c_float),
        ("unbiased", ctypes.c_float),
    )


class _BatchNormGradients(ctypes.Structure):
    _fields_ = (
        *((n, ctypes.c_void_p) for n in ("sums", "rows", "rstd", "coefficients", "dgamma", "dbeta")),
        ("c", ctypes.c_int64),
        ("count", ctypes.c_float),
        ("fixed", ctypes.c_bool),
    )


def batchnorm_rows(moments: Tensor, gamma: Tensor | None, beta: Tensor | None, eps: float, count: int) -> Three:
    """As the operator of this name; the next one too."""
    c = moments.shape[1]
    out = torch.full((3, c), torch.nan), torch.full((c,), torch.nan), torch.full((2, c), torch.nan)
    p = _BatchNormRows(*map(_address, (moments, gamma, beta, *out)), c, eps, count / max(1, count - 1))
    _run(lambda *call: library().cmx_emulate_batchnorm_rows(call[0], ORDER, *call[1:]), p)
    return out


def batchnorm_gradients(sums: Tensor, rows: Tensor, rstd: Tensor, count: int, fixed: bool) -> Three:
    c = sums.shape[1]
    out = torch.full((4, c), torch.nan), torch.full((c,), torch.nan), torch.full((c,), torch.nan)
    p = _BatchNormGradients(*map(_address, (sums, rows, rstd, *out)), c, count, fixed)
    _run(lambda *call: library().cmx_emulate_batchnorm_gradients(call[0], ORDER, *call[1:]), p)
    return out
