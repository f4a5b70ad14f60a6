"""Plain PyTorch, contiguous: what a user has who does nothing."""

from pathlib import Path

import torch
from torch import Tensor

from benchmarks.networks import DTYPES, Spec, plain_with
from benchmarks.peers import Runner


def why_absent() -> str | None:
    return None


def build(
    spec: Spec, weights: Path, dtype: str, photos: Tensor, layout: torch.memory_format = torch.contiguous_format
) -> Runner:
    model = plain_with(spec, weights).to(DTYPES[dtype], memory_format=layout)
    return Runner(
        feed=lambda x: x.to(DTYPES[dtype], memory_format=layout),
        run=model,
        settings={"layout": "NCHW" if layout == torch.contiguous_format else "NHWC"},
        model=model,
    )
