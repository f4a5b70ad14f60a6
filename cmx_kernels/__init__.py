"""Fused kernels for ConvMixer and large depthwise convolutions, for training-compatible PyTorch modules."""

from cmx_kernels import ops

__version__ = "0.1.0"
__all__ = ["ops"]
