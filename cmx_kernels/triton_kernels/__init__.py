"""The Triton backend: torch.ops.cmx_triton.<op>, one kernel file an operator. See README.md in this folder.

Triton is imported by ``load()``, the first time that this backend is asked about a tensor it could take, never before.
With TRITON_INTERPRET=1 set before the start, Triton's interpreter runs the kernels, on CPU tensors too: as repaired by
tests/triton_simulator.py. As shipped it multiplies bfloat16 by its bits and takes no mask that is broadcast.
"""

import functools
import importlib
import importlib.util
import os

import torch

from cmx_kernels import registry

_FILES = ("patch_embed", "depthwise_block", "pointwise_block", "pool_head", "training_passes", "depthwise_training")
OPS = (*_FILES[:4], "patch_embed_train", "depthwise_block_train", "pointwise_block_train")
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
ACTS = ("gelu", "gelu_tanh", "relu", "none")
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
OLDEST = (3, 6)  # the first Triton these kernels were compiled with
_INSTALLED = importlib.util.find_spec("triton") is not None


@functools.cache
def load() -> str | None:
    """Import Triton and define torch.ops.cmx_triton; None, or why that cannot be."""
    if not _INSTALLED:
        return "triton is not installed: pip install triton, in the version that fits this torch"
    try:
        version = importlib.import_module("triton").__version__
    except Exception as error:
        return f"the installed triton does not load: {type(error).__name__}: {error}"
    if tuple(int(n) for n in version.split(".")[:2]) < OLDEST:
        return f"triton {version} is too old: these kernels want {OLDEST[0]}.{OLDEST[1]} or newer"
    for file in _FILES:
        importlib.import_module(f"cmx_kernels.triton_kernels.{file}")
    registry.implement_compositions()
    return None


@functools.cache
def why_not_arch(arch: int) -> str | None:
    """None where the installed Triton compiles for sm_<arch>, else why not. Found out by compiling an empty kernel."""
    if (reason := load()) is not None or INTERPRETED:
        return reason
    if arch < 80:
        return f"the GPU is an sm_{arch}, the Triton kernels want sm_80 or newer"
    return str(importlib.import_module("cmx_kernels.triton_kernels.launch").why_not_compiled(arch) or "") or None


@registry.constant
def why_not(device: int) -> str | None:
    """None where the kernels run on this CUDA device, else a sentence."""
    if torch.version.hip is not None:
        return "this is a ROCm build of torch: the Triton kernels were written and compiled for NVIDIA GPUs only"
    if not torch.cuda.is_available():  # a fake CUDA tensor
        return load()
    major, minor = torch.cuda.get_device_capability(device)
    reason = why_not_arch(10 * major + minor)
    if reason is not None or INTERPRETED or torch.cuda.is_current_stream_capturing():
        return reason
    return str(importlib.import_module("cmx_kernels.triton_kernels.launch").why_not_launched(device) or "") or None
