"""Whether the CUDA kernels of ``_C`` run on a device, and if not, why: answered by the CUDA runtime inside ``_C``."""

import ctypes
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from cmx_kernels import _build_info, registry

OPS = (
    *("patch_embed", "depthwise_block", "pointwise_block", "pool_head"),
    *("patch_embed_train", "depthwise_block_train", "pointwise_block_train"),
)
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
MEASURED = ((9, 0),)  # compute capabilities on which they ran, were right, and faster than PyTorch: benchmarks/results


def _load() -> tuple[Any, str | None]:
    """The library, or None and the reason."""
    if registry.C is None:
        return None, registry.WHY_NO_C
    library = ctypes.CDLL(registry.C.__file__)
    if not hasattr(library, "cmx_cuda_why_not"):
        try:
            why = _build_info.read().get("missing", {}).get("CUDA kernels", "there was no nvcc")
        except ValueError:
            why = "the build record is damaged"
        return None, f"the native library was built without CUDA kernels ({why})"
    library.cmx_cuda_why_not.restype = ctypes.c_char_p
    return library, None


_LIBRARY, WHY_NOT_BUILT = _load()


@registry.constant
def why_not(device: int) -> str | None:
    """None where the kernels run on this device, else a sentence. Asked once a device, then remembered.

    With a driver the first call initialises CUDA: only ask for a device that has a tensor.
    """
    if _LIBRARY is None:
        return WHY_NOT_BUILT
    answer = _LIBRARY.cmx_cuda_why_not(device)
    return None if answer is None else answer.decode()


def _untried(device: int) -> str | None:
    return "the operators are not loaded, which would try the kernels"


tried: Callable[[int], str | None] = _untried  # self_check.py puts its own here, which knows the operators


@registry.constant
def why_not_unasked(device: int) -> str | None:
    """None where the kernels may be taken without being asked for, else a sentence.

    They were measured on such a device, and compute on this one what PyTorch does.
    """
    found = torch.cuda.get_device_capability(device)
    if found in MEASURED:
        return tried(device)
    measured = " and ".join("{}.{}".format(*capability) for capability in MEASURED)
    return (
        f"measured on GPUs of compute capability {measured} only, for this one, of {found[0]}.{found[1]}, compiled and "
        "emulated; use('cuda') runs it, tune() checks and measures it"
    )


@contextmanager
def only_product(kernel: int) -> Iterator[None]:
    """One kernel for every product of 16-bit types inside the block, in the whole process, so as to measure it.

    kernel: its place in cost_model.TILES. An operator whose product it does not take raises RuntimeError.
    """
    if _LIBRARY is None:
        raise RuntimeError(WHY_NOT_BUILT)
    before = _LIBRARY.cmx_cuda_only_product(kernel)
    try:
        yield
    finally:
        _LIBRARY.cmx_cuda_only_product(before)
