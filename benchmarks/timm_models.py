"""Networks of timm with random weights, and what is published of them."""

import importlib.util
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch
from torch import nn


@dataclass(frozen=True)
class Network:
    """timm's name; top-1 of ``weights`` at 224 x 224 in percent; timm's count of multiply-adds, unless we have one.

    published: images per second of plain PyTorch at 224 x 224, one figure for each of PUBLISHED_ON.
    """

    name: str
    weights: str
    top1: float
    gmac: float = 0.0
    published: tuple[float, ...] = ()


# timm's benchmark-infer-*.csv in https://github.com/huggingface/pytorch-image-models/tree/aa4b5850/results, of which
# results-imagenet.csv has top-1: amp-nchw-pt240-cu124-rtx3090, amp-nhwc-pt240-cu124-rtx3090, amp-nchw-pt291-cu128-4090,
# the same -dynamo, amp-nchw-pt291-cu130-5090, the same -dynamo, fp32-nchw-pt240-cpu-i9_10940x-dynamo
PUBLISHED_ON = (
    *("3090 NCHW", "3090 NHWC", "4090 NCHW", "4090 compiled", "5090 NCHW", "5090 compiled"),
    "i9-10940X compiled",
)
NETWORKS = (
    Network("convmixer_1536_20", "in1k", 81.382, published=(153.83, 76.93, 308.79, 125.49, 401.91, 169.48, 13.52)),
    Network("convmixer_768_32", "in1k", 80.158, published=(341.12, 584.59, 594.88, 1613.6, 745.84, 2218.77, 26.25)),
    Network(
        "convmixer_1024_20_ks9_p14",
        "in1k",
        76.944,
        published=(1004.68, 504.12, 1967.37, 1048.67, 2582.99, 1224.0, 63.5),
    ),
    Network("resnet152", "tv_in1k", 78.330, 11.56, (1373.51, 1606.24, 1976.86, 3542.09, 2945.65, 5330.92, 27.96)),
    Network(
        "deit_base_patch16_224", "fb_in1k", 81.980, 17.58, (1564.98, 1579.88, 2989.27, 3365.59, 3924.33, 4395.76, 31.84)
    ),
    Network(
        "mixer_b16_224",
        "goog_in21k_ft_in1k",
        76.616,
        12.62,
        (1632.43, 1768.46, 2635.16, 3640.78, 3627.48, 5105.51, 44.95),
    ),
    Network("convnext_base", "fb_in1k", 83.838, 15.38, (1301.11, 1309.55, 2101.67, 2688.67, 2617.98, 3723.63, 24.1)),
    Network("resmlp_big_24_224", "fb_in1k", 81.034, 100.23, (215.29, 242.5, 356.15, 530.74, 454.62, 675.28, 7.43)),
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
