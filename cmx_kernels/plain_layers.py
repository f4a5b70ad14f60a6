"""Where PyTorch's own depthwise convolution, with nothing behind it, is faster than the CPU kernels: thresholds.

Measured with benchmarks/bench_ops.py, see csrc/cpu/NOTES.md.
"""

from math import prod

import torch
from torch import Tensor

from cmx_kernels import backends, registry, tuned

# Without gradients, in channels_last: values at least, taps at most, and more of them by pairs (see _plain_taps)
_PLAIN_ELEMENTS, _PLAIN_TAPS, _MORE_TAPS = 1 << 18, 9, 25
_LARGE, _LARGER, _SMALL = 1 << 20, 1 << 21, 64
_MAPPED = 32 << 20  # bytes of a result from which on glibc's has new pages in every call; ours are kept (bind_memory.h)
# With gradients, _PLAIN_TAPS are PyTorch's below so many pixels of a plane, or values (see _few_values)
_TRAINED_PIXELS, _TRAINED_ELEMENTS = 640, 1 << 21
_FLOAT32, _STRIDED = torch.float32, torch.strided
_PAIRS = "avx512bf16"
# Without these instructions PyTorch's bfloat16 takes twice as long as ours, without AVX-512 66 times
_FAST_BF16 = registry.C is not None and _PAIRS in registry.C.isa_levels()
_PLAIN_DTYPES = (_FLOAT32, torch.bfloat16) if _FAST_BF16 else (_FLOAT32,)
_is_compiling, _is_autocast_enabled = torch.compiler.is_compiling, torch.is_autocast_enabled


def is_faster(x: Tensor, weight: Tensor, trains: bool = False) -> bool:
    """Whether PyTorch's own depthwise convolution, with nothing behind it, is faster than the CPU kernels.

    Asked in every call of a layer, whose data has taken the place of our code in the caches: as few functions and
    objects as can be, and the question that most often says no first.

    trains: with its gradients.
    """
    if trains:
        return _trains_faster(x, weight)
    if _is_compiling() or not isinstance(x, Tensor):
        return False  # a size asked for in a graph would bind it to that size
    try:
        shape = x.shape
    except RuntimeError:  # of a nested tensor
        return False
    if len(shape) != 4:
        return False
    images, channels, rows, columns = shape
    values = images * channels * rows * columns
    if values < _PLAIN_ELEMENTS:
        return False
    _, _, kh, kw = weight.shape
    if kh * kw > _PLAIN_TAPS and (kh * kw > _MORE_TAPS or kh * kw > _plain_taps(x)):
        return False
    if not x.is_cpu or x.dtype not in _PLAIN_DTYPES or x.layout is not _STRIDED or x.stride(1) != 1:
        return False
    if values * x.itemsize >= _MAPPED:
        return False
    if backends._forced not in (None, "reference") or _is_autocast_enabled("cpu"):  # whose dtype x is to take first
        return False  # below, tune() knows better
    return not tuned.choices or backends.measured("depthwise_block", x, "none", weight.shape) is None


def _trains_faster(x: Tensor, weight: Tensor) -> bool:
    if torch.compiler.is_compiling() or not isinstance(x, Tensor) or x.dim() != 4 or x.layout is not _STRIDED:
        return False
    small = x.numel() > 0 and (x.size(2) * x.size(3) < _TRAINED_PIXELS or x.numel() < _few_values(x))
    if not (small and x.is_cpu and x.dtype in _PLAIN_DTYPES and weight.size(2) * weight.size(3) <= _PLAIN_TAPS):
        return False
    if torch.is_autocast_enabled("cpu") and torch.get_autocast_dtype("cpu") not in _PLAIN_DTYPES:
        return False
    return not backends.kernels_are_forced()


def _few_values(x: Tensor) -> int:
    """Twice as many in channels_last of bfloat16, where PyTorch's gradients are the least slow."""
    return _TRAINED_ELEMENTS << (x.dtype != _FLOAT32 and x.stride(1) == 1)


def _plain_taps(x: Tensor) -> int:
    images, channels, rows, columns = x.shape
    many = images * channels * rows * columns > (_LARGE if rows * columns < _SMALL else _LARGER)
    return _MORE_TAPS if many and x.dtype != _FLOAT32 and registry.isa_level() == _PAIRS else _PLAIN_TAPS


def why_faster(x: Tensor, weight: Tensor, trains: bool) -> str:
    if trains:
        return (
            f"PyTorch's own is faster with its gradients, with {_PLAIN_TAPS} taps or fewer, on planes of less than "
            f"{_TRAINED_PIXELS} pixels, or of less than {_few_values(x)} values; x has shape {list(x.shape)}"
        )
    return (
        f"PyTorch's own is faster for a convolution alone, with {_plain_taps(x)} taps or fewer, on {_PLAIN_ELEMENTS} "
        f"channels_last values or more; x has {x.numel()}, the kernel {prod(weight.shape[2:])} taps"
    )
