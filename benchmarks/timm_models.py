"""Networks of timm with random weights, and what is published of them."""

import importlib.util
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch
from torch import nn


@dataclass(frozen=True)
class Network:
    """timm's name; top-1 of ``weights`` at 224 x 224 in percent; timm's count of multiply-adds, unless we have one."""

    name: str
    weights: str
    top1: float
    gmac: float = 0.0


NETWORKS = (
    Network("convmixer_1536_20", "in1k", 81.382),
    Network("convmixer_768_32", "in1k", 80.158),
    Network("convmixer_1024_20_ks9_p14", "in1k", 76.944),
    Network("resnet152", "tv_in1k", 78.330, 11.56),
    Network("deit_base_patch16_224", "fb_in1k", 81.980, 17.58),
    Network("mixer_b16_224", "goog_in21k_ft_in1k", 76.616, 12.62),
    Network("convnext_base", "fb_in1k", 83.838, 15.38),
    Network("resmlp_big_24_224", "fb_in1k", 81.034, 100.23),
)


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
