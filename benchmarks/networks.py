"""The networks that are timed: sizes, arithmetic, and a plain PyTorch ConvMixer that shares no line with cmx_kernels.

The plain model has timm's state_dict keys, so that one file of weights serves every provider.
"""

from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from benchmarks.fields import Work

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
LAYOUTS = {"NCHW": torch.contiguous_format, "NHWC": torch.channels_last}
QUICK_DTYPES = ("fp32", "bf16")  # plain PyTorch takes seconds to minutes for a float16 convolution on a CPU


@dataclass(frozen=True)
class Spec:
    """A ConvMixer by its numbers."""

    name: str
    dim: int
    depth: int
    kernel_size: int
    patch_size: int
    act: type[nn.Module]
    image_size: int = 224
    classes: int = 1000

    @property
    def pixels(self) -> int:
        return (self.image_size // self.patch_size) ** 2

    @property
    def depthwise_flop(self) -> int:
        """Of one image, padding counted, two a multiply-add. Common counters leave these out (padding="same")."""
        return 2 * self.pixels * self.dim * self.kernel_size**2 * self.depth

    @property
    def matrix_flop(self) -> int:
        """Of one image: patches, pointwise, head."""
        stem = self.pixels * self.dim * 3 * self.patch_size**2
        return 2 * (stem + self.pixels * self.dim**2 * self.depth + self.dim * self.classes)

    @property
    def flop(self) -> int:
        return self.depthwise_flop + self.matrix_flop

    @property
    def parameters(self) -> int:
        block = self.dim * (self.kernel_size**2 + self.dim + 6)  # two biases, two pairs of BatchNorm
        stem = self.dim * (3 * self.patch_size**2 + 3)
        return stem + block * self.depth + (self.dim + 1) * self.classes

    @property
    def activations(self) -> int:
        """Elements that the convolutions of one image put out."""
        return self.pixels * self.dim * (1 + 2 * self.depth)

    def bytes(self, batch: int, itemsize: int) -> int:
        """If every operator (stem, two a block, pool) moved its input, output and weight once."""
        image = 3 * self.image_size**2
        return itemsize * (batch * (image + 2 * self.activations) + self.parameters)

    def work(self, batch: int, itemsize: int, times: int = 1) -> Work:
        """times: 3 for a training step, whose backward has two products for each of the forward."""
        flop = (times * batch * flop for flop in (self.depthwise_flop, self.matrix_flop))
        return Work(batch, *flop, times * self.bytes(batch, itemsize))


SPECS = {
    spec.name: spec
    for spec in (
        Spec("convmixer_768_32", 768, 32, 7, 7, nn.ReLU),
        Spec("convmixer_1024_20_ks9_p14", 1024, 20, 9, 14, nn.GELU),
        Spec("convmixer_1536_20", 1536, 20, 9, 7, nn.GELU),
        Spec("convmixer_512_16_ks8_p7", 512, 16, 8, 7, nn.GELU),
        Spec("convmixer_256_8_ks5_p2", 256, 8, 5, 2, nn.GELU, image_size=32, classes=10),
        Spec("tiny", 64, 2, 5, 14, nn.GELU),  # to try the benchmark itself
    )
}
RELEASED = ("convmixer_768_32", "convmixer_1024_20_ks9_p14", "convmixer_1536_20")


class _Residual(nn.Module):
    def __init__(self, fn: nn.Module) -> None:
        super().__init__()
        self.fn = fn

    def forward(self, x: Tensor) -> Tensor:
        return self.fn(x) + x


def plain(spec: Spec) -> nn.Module:
    """Convolution, activation, BatchNorm, as in the paper; timm's keys."""
    h, k, p, act = spec.dim, spec.kernel_size, spec.patch_size, spec.act

    def block() -> nn.Module:
        depthwise = nn.Conv2d(h, h, k, groups=h, padding="same")
        mixer = _Residual(nn.Sequential(depthwise, act(), nn.BatchNorm2d(h)))
        return nn.Sequential(mixer, nn.Conv2d(h, h, 1), act(), nn.BatchNorm2d(h))

    parts = {
        "stem": nn.Sequential(nn.Conv2d(3, h, p, stride=p), act(), nn.BatchNorm2d(h)),
        "blocks": nn.Sequential(*(block() for _ in range(spec.depth))),
        "pool": nn.AdaptiveAvgPool2d(1),
        "flatten": nn.Flatten(),
        "head": nn.Linear(h, spec.classes),
    }
    return nn.Sequential(OrderedDict(parts)).eval()


def plain_with(spec: Spec, weights: Path) -> nn.Module:
    """The plain model with the weights of a file, mapped and not copied."""
    with torch.device("meta"):
        model = plain(spec)
    model.load_state_dict(torch.load(weights, weights_only=True, mmap=True), assign=True)
    return model.eval().requires_grad_(False)


@torch.no_grad()
def calibrated(spec: Spec, crops: Tensor) -> nn.Module:
    """Random weights, then what training would also have brought: sane activations and a head that knows its classes.

    Convolutions get the bias that puts their outputs one to two deviations above zero. At zero, depth alone makes a
    random network amplify rounding errors a thousandfold, and a check against float64 would let anything pass.
    BatchNorm gets random scale and shift, and the statistics of ``crops``. Head: crop i is class i (least squares), so
    that agreement on the class means something.
    """
    torch.manual_seed(0)
    model = plain(spec)
    features: list[Tensor] = []
    hooks = [model.flatten.register_forward_hook(lambda _, inputs, out: features.append(out.double()))]
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            hooks.append(module.register_forward_hook(_centre))
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, std=0.3)
            module.momentum = None  # the average over all batches seen, which is one
    model.train()(crops)
    for hook in hooks:
        hook.remove()
    mean, n = features[0].mean(0), len(crops)
    known = (torch.linalg.pinv(features[0] - mean) @ (torch.eye(n).double() - 1 / n)).T
    model.head.weight[:n] = known
    model.head.bias.copy_(-model.head.weight.double() @ mean)
    model.head.bias[:n] += 1 / n
    return model.eval()


def _centre(conv: nn.Conv2d, _: object, out: Tensor) -> Tensor:
    std, mean = torch.std_mean(out, (0, 2, 3))
    move = std * torch.empty_like(std).uniform_(1, 2) - mean
    conv.bias += move
    return out + move[:, None, None]
