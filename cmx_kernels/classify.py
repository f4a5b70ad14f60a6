"""From an image file to the five most probable classes; Pillow and torch only, with the preprocessing of timm."""

import math
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from cmx_kernels.checkpoints import convert_state_dict, layout, load_checkpoint
from cmx_kernels.models import ConvMixer, create_model
from cmx_kernels.models.variants import CIFAR10, Variant, find_variant


class Preprocessing(NamedTuple):
    size: int
    crop: float  # how much of the resized image the crop keeps
    mean: tuple[float, float, float]
    std: tuple[float, float, float]


IMAGENET = Preprocessing(224, 0.96, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
CIFAR = Preprocessing(32, 1.0, (0.4914, 0.4822, 0.4465), (0.2471, 0.2435, 0.2616))


def read_image(path: str | Path, how: Preprocessing) -> Tensor:
    """[1, 3, size, size]: shorter side to size / crop, bicubic; centre crop; normalised.

    Raises:
        ImportError: Pillow is missing. ValueError: the file is missing, no image, or damaged.
    """
    try:
        from PIL import Image
    except ImportError as error:
        raise ImportError("classify needs Pillow: pip install pillow") from error
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"image: {path} is {'a folder' if path.is_dir() else 'missing'}, wanted an image file")
    try:
        with Image.open(path) as file:
            image = file.convert("RGB")
    except (OSError, ValueError, SyntaxError, EOFError, Image.DecompressionBombError) as error:
        raise ValueError(f"image: {path} is damaged, or no image that Pillow reads ({error})") from error
    short = math.floor(how.size / how.crop)
    width, height = (short if side == min(image.size) else int(short * side / min(image.size)) for side in image.size)
    image = image.resize((width, height), Image.Resampling.BICUBIC)
    left, top = round((width - how.size) / 2), round((height - how.size) / 2)
    image = image.crop((left, top, left + how.size, top + how.size))
    pixels = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8).reshape(how.size, how.size, 3)
    x = pixels.permute(2, 0, 1).float() / 255
    return ((x - torch.tensor(how.mean)[:, None, None]) / torch.tensor(how.std)[:, None, None])[None]


def load_model(variant: Variant, checkpoint: str | Path | None, pretrained: bool) -> ConvMixer:
    """The model in eval mode, with as many classes as the checkpoint has."""
    classes = variant.num_classes
    weights = None
    if checkpoint is not None:
        weights = load_checkpoint(checkpoint)
        if layout(weights) is not None:
            weights = convert_state_dict(weights, "timm")
            classes = len(weights["head.weight"]) if "head.weight" in weights else classes
    model = create_model(variant.name, pretrained=pretrained, num_classes=classes)
    if weights is not None:
        model.load_state_dict(weights)
    return model.eval()


def class_names(variant: Variant, classes: int) -> list[str]:
    """CIFAR-10's; timm's for the 1000 of ImageNet, if timm is there; else numbers."""
    if variant.dataset == "CIFAR-10" and classes == len(CIFAR10):
        return CIFAR10
    if classes == 1000:
        try:
            from timm.data import ImageNetInfo

            return list(ImageNetInfo().label_descriptions())
        except Exception:  # timm is missing, too old, or cannot import its own dependencies
            pass
    return [f"class {i}" for i in range(classes)]


def classify(
    image: str | Path, name: str, checkpoint: str | Path | None = None, pretrained: bool = False, top: int = 5
) -> list[tuple[str, float]]:
    """The most probable classes of an image, with their probabilities. Random weights without a checkpoint."""
    variant = find_variant(name)
    x = read_image(image, CIFAR if variant.dataset == "CIFAR-10" else IMAGENET)
    model = load_model(variant, checkpoint, pretrained)
    with torch.inference_mode():
        probabilities = model(x)[0].softmax(0)
    best = probabilities.topk(min(top, len(probabilities)))
    names = class_names(variant, len(probabilities))
    return [(names[i], p) for i, p in zip(best.indices.tolist(), best.values.tolist(), strict=True)]
