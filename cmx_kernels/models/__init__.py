"""Models that run on the operators. So far ConvMixer, its published variants, and their fused forms."""

from cmx_kernels.models.convmixer import ConvMixer
from cmx_kernels.models.variants import create_model, list_models

__all__ = ["ConvMixer", "create_model", "list_models"]
