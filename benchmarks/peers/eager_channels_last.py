"""Plain PyTorch in channels_last: faster or slower than contiguous, by model and machine."""

from pathlib import Path

import torch
from torch import Tensor

from benchmarks.networks import Spec
from benchmarks.peers import Runner, eager


def why_absent() -> str | None:
    return None


def build(spec: Spec, weights: Path, dtype: str, photos: Tensor) -> Runner:
    return eager.build(spec, weights, dtype, photos, torch.channels_last)
