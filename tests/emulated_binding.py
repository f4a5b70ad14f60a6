"""csrc/bind_cuda*.cpp as operators of torch.ops.cmx_emulated, on CPU tensors, with emulated kernels below."""

import ctypes
from pathlib import Path

import ahead
import emulated
import emulated_product
import torch

from cmx_kernels import ops

SOURCES = ("tests/emulator/binding.cpp", "csrc/cuda/product.cu")
TRAINING = ("depthwise_block_train", "depthwise_block_backward")
PASSES = ("training_sum", "training_gradient", "training_moments", "training_sums")
WEIGHTS = ("recast", "fold_rows")
BATCHNORM = ("batchnorm_rows", "batchnorm_gradients")
PRODUCTS = ("training_product", "training_product_sums")
OPERATORS = (
    *("patch_embed", "depthwise_block", "pointwise_block", "pool_head", "run_blocks"),
    *(*WEIGHTS, *TRAINING, *PASSES, *BATCHNORM, *PRODUCTS),
)
_definitions = torch.library.Library("cmx_emulated", "DEF")


@ahead.once
def build() -> Path:
    folder = Path(torch.__file__).parent
    kernels = [emulated.build("library", *s) for s in (emulated.SOURCES, emulated_product.SOURCES)]
    return emulated.link(
        (*SOURCES, "csrc/*.h", "csrc/bind_cuda*.cpp", "csrc/cuda/*.h"),
        *("-isystem", f"{folder}/include", "-x", "c++", *SOURCES, "-x", "none", *map(str, kernels)),
        *(f"-L{folder}/lib", "-Wl,--no-as-needed", "-ltorch_cpu"),
    )


@ahead.once
def library() -> ctypes.CDLL:
    """Loaded, with the operators in torch.ops.cmx_emulated."""
    assert ops.__all__  # whose schemas they have
    for name in OPERATORS:
        schema = str(getattr(torch.ops.cmx, name).default._schema)
        _definitions.define(schema.removeprefix("cmx::"))
    path = str(build())
    torch.ops.load_library(path)
    found = ctypes.CDLL(path)
    found.cmx_asked.restype = ctypes.c_char_p
    return found


def asked() -> list[str]:
    """What the binding asked of CUDA since the last question: "device N" was made the current one, "stream N"."""
    return library().cmx_asked().decode().split("\n")[:-1]
