"""What the launches of all kernels share: widths of offsets, strides, precision, the GPU they run on."""

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn import Parameter
from torch.utils._python_dispatch import _disable_current_modes
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from cmx_kernels.triton_kernels import INTERPRETED

cdiv = triton.cdiv


def wrap_triton(kernel: Any) -> Any:
    """torch.library.wrap_triton, which in torch 2.11 refuses kernels that are interpreted."""
    return kernel if INTERPRETED else torch.library.wrap_triton(kernel)


@triton.jit
def empty_kernel(x, BLOCK: tl.constexpr):
    tl.store(x + tl.arange(0, BLOCK), tl.zeros([BLOCK], tl.float32))


@triton.jit
def begin_chained(CHAINED: tl.constexpr):
    """Before a program touches memory: waits for all that the kernel before this one on the stream writes, and lets the
    next be launched ("programmatic dependent launch"). Does nothing in a launch that is not chained."""
    if CHAINED:
        gdc_wait()
        gdc_launch_dependents()


def _last_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[-1]


def why_not_compiled(arch: int) -> str | None:
    try:
        source = ASTSource(empty_kernel, {"x": "*fp32", "BLOCK": "constexpr"}, {(1,): 32})
        triton.compile(source, target=GPUTarget("cuda", arch, 32))
    except Exception as error:  # whatever the compiler and ptxas raise
        return f"triton {triton.__version__} does not compile for sm_{arch}: {_last_line(error)}"
    return None


@functools.cache
def why_not_launched(device: int) -> str | None:
    """A launch wants more than compilation: a C compiler, Python's headers, the driver's library."""
    try:
        with _disable_current_modes(), torch.cuda.device(device):
            empty_kernel[(1,)](torch.empty(32, device="cuda"), BLOCK=32)
    except Exception as error:  # whatever Triton and what it calls raise
        return f"triton {triton.__version__} does not launch a kernel here: {_last_line(error)}"
    return None


def is_plain(x: Tensor) -> bool:
    """A tensor with memory, and not one that is being traced."""
    return type(x) in (Tensor, Parameter)


def arch(x: Tensor) -> int:
    """10 * compute capability; 0 in the interpreter."""
    if INTERPRETED:
        return 0
    if not torch.cuda.is_available():
        return 80  # a fake tensor on a machine without a GPU
    major, minor = torch.cuda.get_device_capability(x.device)
    return 10 * major + minor


@functools.cache
def _driver_captures_chains() -> bool:
    """Graphs capture such launches from CUDA 12.3 on; without a GPU it is only compiled."""
    driver = getattr(torch._C, "_cuda_getDriverVersion", lambda: 0)  # 1000 * major + 10 * minor
    return not torch.cuda.is_available() or driver() >= 12030


def chain(x: Tensor) -> dict[str, bool]:
    """Arguments of a kernel that says begin_chained: from compute capability 9.0 on it is launched while the one before
    it still runs. Not in torch.compile's graphs, whose launches have no such option."""
    if INTERPRETED or arch(x) < 90 or not is_plain(x) or not _driver_captures_chains():
        return {"CHAINED": False}
    return {"CHAINED": True, "launch_pdl": True}


def multiprocessors(x: Tensor) -> int:
    if not x.is_cuda or not torch.cuda.is_available():
        return 3  # interpreted: few programs, several tiles each
    return int(torch.cuda.get_device_properties(x.device).multi_processor_count)


@contextmanager
def on_device(x: Tensor) -> Iterator[None]:
    """Kernels launch on x's GPU, whatever the current one is."""
    if not (x.is_cuda or INTERPRETED):
        raise RuntimeError(
            f"x: got a tensor on {x.device}, torch.ops.cmx_triton wants a CUDA tensor; move it with .cuda(), "
            f"or set TRITON_INTERPRET=1 to run on the CPU for debugging"
        )
    if x.is_cuda and is_plain(x):
        with torch.cuda.device(x.device):
            yield
    else:
        yield


def needs_wide_offsets(*tensors: Tensor) -> bool:
    """Whether an element lies 2^31 elements or more behind the first, or a launch could count that far."""
    return any(sum((s - 1) * d for s, d in zip(t.shape, t.stride(), strict=True)) >= 2**31 - 2**20 for t in tensors)


def pixel_stride(x: Tensor) -> int | None:
    """The one distance between neighbouring pixels of x [N, C, H, W], None where rows are apart."""
    height, width = x.shape[2:]
    if width == 1:
        return x.stride(2)
    return x.stride(3) if height == 1 or x.stride(2) == width * x.stride(3) else None


def is_channels_last(x: Tensor) -> bool:
    """Neighbouring channels are neighbours in memory, neighbouring pixels are not."""
    return x.stride(1) == 1 and x.shape[1] > 1 and x.stride(3) != 1


def dense(x: Tensor, last: bool) -> Tensor:
    """x itself where it is contiguous, or with ``last`` channels_last; else a copy that is."""
    return x.contiguous(memory_format=torch.channels_last if last else torch.contiguous_format)


def strides(*vectors: Tensor | None) -> tuple[int, ...]:
    return tuple(0 if v is None else v.stride(0) for v in vectors)


def precision(x: Tensor, convolution: bool = True) -> str:
    """How float32 products are taken: as torch's own convolutions (or products) on this GPU would."""
    if x.dtype != torch.float32:
        return "ieee"  # nothing to choose
    kind: Any = torch.backends.cudnn.conv if convolution else torch.backends.cuda.matmul  # type: ignore[attr-defined]
    return "tf32" if kind.fp32_precision == "tf32" else "ieee"
