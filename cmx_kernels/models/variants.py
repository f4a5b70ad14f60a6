"""Every published ConvMixer, by name.

Names are timm's for the three with released weights, and convmixer_<dim>_<depth>_ks<kernel>_p<patch> for the others.
Parts may be left out where one variant remains: "512/16" and "ConvMixer-512/16" are convmixer_512_16_ks8_p7.
"""

import difflib
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from cmx_kernels import checkpoints
from cmx_kernels.models.convmixer import ConvMixer

CIFAR10 = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]


@dataclass(frozen=True)
class Variant:
    """One row of the published results. ``top1`` in percent, None where we could not check the figure."""

    name: str
    dim: int
    depth: int
    kernel_size: int
    patch_size: int
    act_layer: type[nn.Module]
    top1: float | None
    source: str
    dataset: str = "ImageNet-1k"
    hub: str | None = None  # repository on the Hugging Face hub, for released weights

    @property
    def num_classes(self) -> int:
        return 10 if self.dataset == "CIFAR-10" else 1000

    @property
    def image_size(self) -> int:
        return 32 if self.dataset == "CIFAR-10" else 224


_TIMM = "timm results-imagenet.csv"
_PAPER = "arXiv 2201.09792, table of ImageNet results"
_ABLATION = "arXiv 2201.09792, CIFAR-10 ablations"
_REPOSITORY = "README of the authors' convmixer-cifar10 repository, 25 epochs"

VARIANTS = {
    v.name: v
    for v in (
        Variant("convmixer_1536_20", 1536, 20, 9, 7, nn.GELU, 81.38, _TIMM, hub="timm/convmixer_1536_20.in1k"),
        Variant("convmixer_768_32", 768, 32, 7, 7, nn.ReLU, 80.16, _TIMM, hub="timm/convmixer_768_32.in1k"),
        Variant(
            "convmixer_1024_20_ks9_p14",
            1024,
            20,
            9,
            14,
            nn.GELU,
            76.94,
            _TIMM,
            hub="timm/convmixer_1024_20_ks9_p14.in1k",
        ),
        Variant("convmixer_1536_20_ks3_p7", 1536, 20, 3, 7, nn.GELU, None, _PAPER),
        Variant("convmixer_1536_20_ks9_p14", 1536, 20, 9, 14, nn.GELU, None, _PAPER),
        Variant("convmixer_1536_24_ks9_p14", 1536, 24, 9, 14, nn.GELU, None, _PAPER),
        Variant("convmixer_768_32_ks3_p14", 768, 32, 3, 14, nn.ReLU, None, _PAPER),
        Variant("convmixer_1024_16_ks9_p7", 1024, 16, 9, 7, nn.GELU, None, _PAPER),
        Variant("convmixer_1024_12_ks8_p7", 1024, 12, 8, 7, nn.GELU, 77.8, _PAPER),
        Variant("convmixer_512_16_ks8_p7", 512, 16, 8, 7, nn.GELU, 73.8, _PAPER),
        Variant("convmixer_512_12_ks8_p7", 512, 12, 8, 7, nn.GELU, None, _PAPER),
        Variant("convmixer_256_8_ks9_p1", 256, 8, 9, 1, nn.GELU, 95.88, _ABLATION, "CIFAR-10"),
        Variant("convmixer_256_8_ks5_p2", 256, 8, 5, 2, nn.GELU, 92.60, _REPOSITORY, "CIFAR-10"),
    )
}


def list_models() -> list[str]:
    """The names that create_model takes."""
    return sorted(VARIANTS)


def find_variant(name: str) -> Variant:
    """The row that ``name`` means; ValueError with close matches where there is none, or more than one."""
    if not isinstance(name, str):
        raise TypeError(f"name: got {type(name).__name__}, wanted a str; cmx_kernels.list_models() has them")
    plain = re.sub(r"^hf[-_]hub:", "", name.lower()).removeprefix("timm/").removesuffix(".in1k")
    plain = re.sub(r"[-/ ]+", "_", plain)
    plain = plain if plain.startswith("convmixer") else f"convmixer_{plain}"
    if plain in VARIANTS:
        return VARIANTS[plain]
    parts = set(plain.split("_"))
    found = [
        v
        for v in VARIANTS.values()
        if parts <= {"convmixer", *_parts(v)} and plain.startswith(f"convmixer_{v.dim}_{v.depth}")
    ]
    if len(found) == 1:
        return found[0]
    if found:
        raise ValueError(f"name: {name!r} may be any of {', '.join(v.name for v in found)}; give the whole name")
    close = difflib.get_close_matches(plain, VARIANTS, n=3, cutoff=0.5) or list(VARIANTS)
    raise ValueError(f"name: got {name!r}, which is no published ConvMixer; the closest are {', '.join(close)}")


def _parts(v: Variant) -> list[str]:
    return [str(v.dim), str(v.depth), f"ks{v.kernel_size}", f"p{v.patch_size}"]


def create_model(
    name: str, *, fused: bool = True, pretrained: bool = False, checkpoint_path: str | Path | None = None, **kw: Any
) -> ConvMixer:
    """A published ConvMixer, with the activation it was trained with.

    Args:
        name: one of list_models(), or enough of it to leave one.
        pretrained: load the released ImageNet weights from the Hugging Face hub; needs huggingface_hub and the network.
        checkpoint_path: load this file instead, .safetensors or PyTorch.
        kw: more arguments for ConvMixer, such as num_classes, in_chans, drop_rate, device, dtype.

    Raises:
        ValueError: an unknown name, no released weights, a file that is no checkpoint. RuntimeError: the hub cannot be
        reached, or the weights belong to another model. ImportError: huggingface_hub or safetensors is missing.
    """
    v = find_variant(name)
    if pretrained and checkpoint_path is not None:
        raise ValueError("checkpoint_path: got a file and pretrained=True, wanted one of the two")
    if pretrained and v.hub is None:
        released = ", ".join(v.name for v in VARIANTS.values() if v.hub)
        raise ValueError(
            f"pretrained: {v.name} has no released weights, only {released} have; train it, or take one of those"
        )
    if not {"n_classes", "num_classes"} & kw.keys():
        kw["num_classes"] = v.num_classes
    kw = {"kernel_size": v.kernel_size, "patch_size": v.patch_size, "act_layer": v.act_layer, **kw}
    model = ConvMixer(v.dim, v.depth, fused=fused, **kw)
    if checkpoint_path is not None:
        model.load_state_dict(checkpoints.load_checkpoint(checkpoint_path))
    elif pretrained and v.hub is not None:
        _load_released(model, v.hub)
    return model


def _load_released(model: ConvMixer, hub: str) -> None:
    """A head of another size stays as it was initialised; other numbers of input channels share the trained weights."""
    weights = dict(checkpoints.load_checkpoint(_download(hub)))
    if model.num_classes != len(weights["head.weight"]) or model.head_hidden_size != weights["head.weight"].shape[1]:
        weights = {key: value for key, value in weights.items() if not key.startswith("head.")}
        weights |= {key: value for key, value in model.state_dict().items() if key.startswith("head.")}
    weights["stem.0.weight"] = _adapt(weights["stem.0.weight"], model.in_chans)
    model.load_state_dict(weights)


def _adapt(weight: Tensor, channels: int) -> Tensor:
    """As timm does: grey takes the sum over RGB; other numbers repeat RGB at the same overall scale."""
    given = weight.shape[1]
    if channels == given:
        return weight
    if channels == 1:
        return weight.sum(1, keepdim=True)
    return weight.repeat(1, -(-channels // given), 1, 1)[:, :channels] * (given / channels)


def _download(hub: str) -> str:
    way_out = f"download model.safetensors of {hub} elsewhere, and pass its path as checkpoint_path="
    try:
        from huggingface_hub import hf_hub_download
    except ImportError as error:
        raise ImportError(
            f"pretrained: needs huggingface_hub: pip install huggingface_hub safetensors; or {way_out}"
        ) from error
    try:
        return hf_hub_download(hub, "model.safetensors")
    except Exception as error:  # the hub's own errors, and those of three HTTP libraries
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise RuntimeError(f"pretrained: the weights of {hub} cannot be fetched ({reason}); {way_out}") from error
