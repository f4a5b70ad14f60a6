"""Eval-mode BatchNorm in float32: scale * a + shift, scale = gamma / sqrt(var + eps), shift = beta - mean * scale."""

import torch
from torch import Tensor, nn


def why_not_fold(bn: nn.Module) -> str | None:
    """A sentence if this BatchNorm uses the statistics of its batch, or is not a plain BatchNorm2d."""
    if type(bn) is not nn.BatchNorm2d:
        return f"the normalisation is a {type(bn).__name__}, not nn.BatchNorm2d"
    if bn.training:
        return "BatchNorm is in training mode: batch statistics are not fused in this release"
    if bn.running_mean is None or bn.running_var is None:
        return "BatchNorm keeps no running statistics (track_running_stats=False)"
    return None


def fold(bn: nn.BatchNorm2d) -> tuple[Tensor, Tensor]:
    """(scale, shift) [C] in float32 (float64 for a float64 module); differentiable in gamma and beta."""
    if bn.running_mean is None or bn.running_var is None:
        raise ValueError(
            "running_mean: got None, wanted the running statistics of a BatchNorm in eval mode; "
            "build it with track_running_stats=True, or call .train()"
        )
    dtype = torch.promote_types(bn.running_var.dtype, torch.float32)
    mean = bn.running_mean.to(dtype)
    scale = torch.rsqrt(bn.running_var.to(dtype) + bn.eps)
    if bn.weight is not None:
        scale = scale * bn.weight.to(dtype)
    shift = -mean * scale
    if bn.bias is not None:
        shift = shift + bn.bias.to(dtype)
    return scale, shift
