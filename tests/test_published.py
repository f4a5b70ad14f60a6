"""The released models and 512/16, whose even kernel pads unevenly: whole, at full depth, fused against plain ones."""

import copy
from collections.abc import Callable

import pytest
import torch
from compare import Expected, check
from plain_models import NATIVE
from torch import Tensor, nn

from cmx_kernels import create_model, explain, fuse

# name -> pixels: float64 takes a second or two, and patches are as many as the kernel is wide, or more
PIXELS = {
    "convmixer_1536_20": 70,
    "convmixer_768_32": 70,
    "convmixer_1024_20_ks9_p14": 140,
    "convmixer_512_16_ks8_p7": 84,
}


def plain_model(name: str) -> nn.Module:
    """timm's where it has the model; BatchNorm has the statistics of some images, so that logits are of their size."""
    timm = pytest.importorskip("timm")
    make: Callable[..., nn.Module] = timm.create_model if timm.is_model(name) else create_model
    model = make(name) if make is timm.create_model else make(name, fused=False)
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    for norm in norms:
        norm.momentum = None  # the mean over batches, of which there is one
        nn.init.uniform_(norm.weight, 0.5, 1.5)
        nn.init.uniform_(norm.bias, -0.5, 0.5)
    model.train()(images(name, 4))
    return model.eval()


def images(name: str, count: int) -> Tensor:
    """Smooth, as photographs are, and of different contrast."""
    coarse = torch.randn(count, 3, 9, 9) * torch.linspace(0.5, 1.5, count)[:, None, None, None]
    return nn.functional.interpolate(coarse, (PIXELS[name], PIXELS[name]), mode="bicubic")


@pytest.mark.parametrize("name", PIXELS)
@torch.no_grad()
def test_logits_at_full_depth(name: str) -> None:
    """Under the error rule, against float64, in float32 and bfloat16, and without a refusal."""
    plain, x = plain_model(name), images(name, 2)
    for dtype in (torch.float32, torch.bfloat16):
        fused, x = fuse(copy.deepcopy(plain.to(dtype)), strict=True), x.to(dtype)
        out, eager = fused(x), plain(x)
        ref = copy.deepcopy(plain).double()(x.double())
        # half an ulp beside the error of eager PyTorch, which makes the same sums
        check(out, Expected(ref, eager, torch.zeros_like(ref), 0, dtype), f"{name} in {dtype}")
        assert (out[0] - out[1]).float().std() > 0.05 * out.float().std(), "the images make no difference"
        report = explain(fused, x)
        assert not NATIVE or not report.refusals
        assert {row.kernel for row in report if row.part.startswith("blocks")} == {"block_stack"} or not NATIVE
