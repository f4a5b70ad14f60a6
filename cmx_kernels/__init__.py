"""Fused kernels for ConvMixer and large depthwise convolutions, for training-compatible PyTorch modules."""

from cmx_kernels import ops
from cmx_kernels.backends import use
from cmx_kernels.checkpoints import convert_state_dict, load_checkpoint
from cmx_kernels.fuse import fuse, unfuse
from cmx_kernels.models import ConvMixer, create_model, list_models

__version__ = "0.1.0"
__all__ = [
    "ConvMixer",
    "convert_state_dict",
    "create_model",
    "fuse",
    "list_models",
    "load_checkpoint",
    "ops",
    "unfuse",
    "use",
]
