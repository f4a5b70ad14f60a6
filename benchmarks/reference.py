"""The truth an output is held against, once a model: |out - ref| <= 2 max|plain in the same dtype - ref| + eps.

``ref`` is the plain model in float64, which is slow (two images take longer than a race): so on few photographs.
"""

from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from benchmarks import photos
from benchmarks.networks import DTYPES, SPECS, calibrated, plain_with


def rule(exact: Tensor, plain: Tensor, out: Tensor, roundings: int = 16) -> tuple[float, float]:
    """The largest error of ``out``, and what is allowed: twice that of ``plain`` in the same dtype, and eps.

    eps: rounding the largest element so many times. plain may be right by luck, and sums have another order.
    """
    of_plain, error = ((y.double() - exact).abs().max().item() for y in (plain, out))
    eps = torch.finfo(plain.dtype).eps / 2 * exact.abs().max().item()
    return error, 2 * of_plain + roundings * eps


@dataclass
class Reference:
    model: str
    weights: Path
    photos: Tensor  # [8, 3, H, W]
    ref: Tensor = field(default_factory=lambda: torch.empty(0))  # [n <= 8, classes], float64, once it is known
    plain: dict[str, Tensor] = field(default_factory=dict)  # dtype -> [8, classes] of plain eager PyTorch

    def learn_plain(self, dtype: str, logits: Tensor) -> None:
        """Keep the outputs of plain eager PyTorch for the most photographs seen."""
        if len(logits) > len(self.plain.get(dtype, ())):
            self.plain[dtype] = logits

    def error(self, logits: Tensor, dtype: str) -> float:
        """The largest one on the photographs that have a float64 reference, and an output of plain PyTorch."""
        n = min(len(logits), len(self.ref), len(self.plain[dtype]))
        return (logits[:n].double() - self.ref[:n]).abs().max().item()

    def allowed(self, dtype: str) -> float:
        """eps: rounding the largest logit 16 times. plain may be right by luck, and sums have another order."""
        eps = 16 * torch.finfo(DTYPES[dtype]).eps / 2 * self.ref.abs().max().item()
        return 2 * self.error(self.plain[dtype], dtype) + eps

    def agreement(self, logits: Tensor) -> tuple[int, int]:
        """On how many photographs the class is that of plain float32, and how many there are."""
        n = min(len(logits), len(self.plain["fp32"]))
        return int((logits[:n].argmax(1) == self.plain["fp32"][:n].argmax(1)).sum()), n

    def wrong(self, logits: Tensor, dtype: str) -> str | None:
        """Why these logits are wrong, if they are."""
        if logits.shape[1:] != self.ref.shape[1:]:
            return f"{list(logits.shape[1:])} logits, wanted {list(self.ref.shape[1:])}"
        if not torch.isfinite(logits).all():
            return "the logits are not finite"
        error, allowed = self.error(logits, dtype), self.allowed(dtype)
        return None if error <= allowed else f"error {error:.2g} against float64, allowed are {allowed:.2g}"


_CROPS = 4  # 4096 pixels for the statistics of a network with the least patches


@torch.no_grad()
def make(model: str, folder: Path) -> Reference:
    """Calibrate the model and write its weights into ``folder``."""
    spec = SPECS[model]
    network = calibrated(spec, photos.random_crops(spec.image_size, _CROPS))
    weights = folder / f"{model}.pt"
    torch.save(network.state_dict(), weights)
    return Reference(model, weights, photos.photographs(spec.image_size))


@torch.no_grad()
def exact_logits(model: str, weights: Path, images: Tensor) -> Tensor:
    """Of the plain model in float64, one photograph after the other."""
    network = plain_with(SPECS[model], weights).double()
    return torch.cat([network(image[None]) for image in images.double()])


@torch.no_grad()
def plain_logits(reference: Reference, dtype: str) -> Tensor:
    """Of the plain model on all photographs, one after the other; for runs without an eager provider.

    In float16 on one of them: a call can take minutes.
    """
    model = plain_with(SPECS[reference.model], reference.weights).to(DTYPES[dtype])
    photos = reference.photos[:1] if dtype == "fp16" else reference.photos
    return torch.cat([model(image[None].to(DTYPES[dtype])).float() for image in photos])
