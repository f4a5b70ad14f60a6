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


SHIPPED = Path(__file__).parent / "data" / "convmixer_cifar10.safetensors"


def load_shipped() -> ConvMixer:
    """The small ConvMixer that comes with the package, trained on CIFAR-10, in eval mode.

    Raises:
        ValueError: this copy of the package holds none. ImportError: safetensors is missing.
    """
    if not SHIPPED.is_file():
        raise ValueError(
            "--model: got none, and this copy of the package ships no trained weights; name a model, with --checkpoint "
            "FILE or --pretrained"
        )
    weights = load_checkpoint(SHIPPED)
    stem, depthwise = weights["stem.0.weight"], weights["blocks.0.0.fn.0.weight"]
    depth = 1 + max(int(key.split(".")[1]) for key in weights if key.startswith("blocks."))
    dim, _, *patch = stem.shape
    kernel = depthwise.shape[2:]
    model = ConvMixer(dim, depth, (kernel[0], kernel[1]), (patch[0], patch[1]), len(weights["head.weight"]))
    model.load_state_dict(weights)
    return model.eval()


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
    image: str | Path,
    name: str | None = None,
    checkpoint: str | Path | None = None,
    pretrained: bool = False,
    top: int = 5,
) -> list[tuple[str, float]]:
    """The most probable classes of an image, with their probabilities.

    Without a name by the model that comes with the package; a named one has random weights without a checkpoint.
    """
    if name is None:
        if checkpoint is not None or pretrained:
            raise ValueError("--model: got none, wanted the name of the model that the weights are for")
        x, model, names = read_image(image, CIFAR), load_shipped(), CIFAR10
    else:
        variant = find_variant(name)
        x = read_image(image, CIFAR if variant.dataset == "CIFAR-10" else IMAGENET)
        model = load_model(variant, checkpoint, pretrained)
        names = class_names(variant, model.num_classes)
    with torch.inference_mode():
        probabilities = model(x)[0].softmax(0)
    best = probabilities.topk(min(top, len(probabilities)))
    return [(names[i], p) for i, p in zip(best.indices.tolist(), best.values.tolist(), strict=True)]
