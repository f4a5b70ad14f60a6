"""Networks of timm with random weights."""

import importlib.util
from functools import cache
from pathlib import Path

import torch
from torch import nn


def why_absent() -> str | None:
    found = importlib.util.find_spec("timm") is not None
    return None if found else "timm, which has the rivals, is not installed: pip install timm"


def create(name: str) -> nn.Module:
    _let_torchvision_import()
    import timm

    torch.manual_seed(0)
    return timm.create_model(name).eval().requires_grad_(False)


@cache
def _let_torchvision_import() -> None:
    """timm imports torchvision, whose Python part fails where its library does not fit torch (a CPU torch with the
    CUDA torchvision of PyPI). Its two operators, only declared, are enough.

    tests/conftest.py has the same lines: tests and benchmarks run without each other, and the package needs no timm."""
    spec = importlib.util.find_spec("torchvision")
    if spec is None or spec.origin is None:
        return
    try:
        torch.ops.load_library(next(Path(spec.origin).parent.glob("_C*.so")))
    except (OSError, StopIteration):
        for name in ("nms", "qnms"):
            torch.library.define(f"torchvision::{name}", "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
