"""Fused kernels for ConvMixer and large depthwise convolutions, for training-compatible PyTorch modules."""

from cmx_kernels import (
    ops,
    self_check,  # noqa: F401  (cuda.py asks it)
)
from cmx_kernels.backends import use
from cmx_kernels.checkpoints import convert_state_dict, load_checkpoint
from cmx_kernels.explain import Report, explain
from cmx_kernels.fuse import fuse, unfuse
from cmx_kernels.info import build_info
from cmx_kernels.layers import LargeKernelDepthwiseConv2d
from cmx_kernels.models import ConvMixer, create_model, list_models
from cmx_kernels.tune import tune

__version__ = "0.1.0"
__all__ = [
    "ConvMixer",
    "LargeKernelDepthwiseConv2d",
    "Report",
    "build_info",
    "convert_state_dict",
    "create_model",
    "explain",
    "fuse",
    "list_models",
    "load_checkpoint",
    "ops",
    "tune",
    "unfuse",
    "use",
]
