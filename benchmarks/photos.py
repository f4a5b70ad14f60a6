"""Real photographs, prepared as timm prepares them: those that come inside scikit-image's wheel (no download)."""

import importlib.util
import random
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

NAMES = ("astronaut", "chelsea", "coffee", "rocket", "motorcycle_left", "hubble_deep_field", "retina", "camera")
_CROP_PCT = 0.96  # of the released ConvMixers
_MEAN, _STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # ImageNet


def why_absent() -> str | None:
    if importlib.util.find_spec("skimage") is None:
        return "scikit-image, whose photographs are used, is not installed"
    missing = [name for name in NAMES if not list(_folder().glob(f"{name}.*"))]
    return f"this scikit-image comes without the photographs {', '.join(missing)}" if missing else None


def photographs(size: int) -> Tensor:
    """[8, 3, size, size]: shorter side to size / 0.96 (bicubic), the middle, ImageNet's mean and deviation."""
    return torch.stack([_normalised(_middle(_open(name), size)) for name in NAMES])


def random_crops(size: int, count: int, seed: int = 0) -> Tensor:
    """[count, 3, size, size]: squares of 40 to 100 % of the shorter side, half of them mirrored."""
    rng = random.Random(seed)
    crops = []
    for i in range(count):
        photo = _open(NAMES[i % len(NAMES)])
        side = int(min(photo.size) * rng.uniform(0.4, 1))
        left, top = (rng.randint(0, length - side) for length in photo.size)
        crop = photo.resize((size, size), Image.Resampling.BICUBIC, box=(left, top, left + side, top + side))
        if rng.random() < 0.5:
            crop = crop.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        crops.append(_normalised(crop))
    return torch.stack(crops)


def _folder() -> Path:
    spec = importlib.util.find_spec("skimage")
    assert spec is not None and spec.origin is not None
    return Path(spec.origin).parent / "data"


def _open(name: str) -> Image.Image:
    return Image.open(next(_folder().glob(f"{name}.*"))).convert("RGB")


def _middle(photo: Image.Image, size: int) -> Image.Image:
    scale = int(size / _CROP_PCT) / min(photo.size)
    width, height = (round(length * scale) for length in photo.size)
    photo = photo.resize((width, height), Image.Resampling.BICUBIC)
    left, top = (width - size) // 2, (height - size) // 2
    return photo.crop((left, top, left + size, top + size))


def _normalised(photo: Image.Image) -> Tensor:
    x = torch.from_numpy(np.asarray(photo, np.float32) / 255)  # [H, W, 3]
    return ((x - torch.tensor(_MEAN)) / torch.tensor(_STD)).permute(2, 0, 1).contiguous()
