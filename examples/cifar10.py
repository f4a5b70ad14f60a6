"""CIFAR-10 in memory: three ways to read it, and batches whose random numbers depend on their position alone."""

import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import Dataset

CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
MEAN, STD = (0.4914, 0.4822, 0.4465), (0.2471, 0.2435, 0.2616)
SIZE = 32
BATCHES = {"train": [f"data_batch_{i}" for i in range(1, 6)], "test": ["test_batch"]}
IMAGES = (".jpg", ".jpeg", ".png")
WANTED = (
    "wanted a folder with train/<class>/*.jpg|png and test/<class>/..., the python batches "
    "(data_batch_1 ... test_batch, as cifar-10-python.tar.gz unpacks), or 'torchvision' to let torchvision download it"
)


class Images(NamedTuple):
    pixels: Tensor  # [N, 3, 32, 32] uint8
    labels: Tensor  # [N] int64


def load(data: str, part: str) -> Images:
    """Part "train" or "test" of the CIFAR-10 at ``data``.

    Raises:
        ValueError: there is no CIFAR-10, or a file of it is damaged. ImportError: torchvision or Pillow is missing.
    """
    if data == "torchvision":
        return _from_torchvision(part)
    root = Path(data)
    for place in (root, root / "cifar-10-batches-py"):
        if (place / BATCHES[part][0]).is_file():
            return _join([_from_batch(place / name) for name in BATCHES[part]])
    if (root / part).is_dir():
        return _from_folder(root / part)
    state = "is no folder" if not root.is_dir() else f"holds neither {part}/ nor {BATCHES[part][0]}"
    raise ValueError(f"--data: {root} {state}; {WANTED}")


def _join(parts: list[Images]) -> Images:
    return Images(torch.cat([p.pixels for p in parts]), torch.cat([p.labels for p in parts]))


def _from_folder(folder: Path) -> Images:
    try:
        from PIL import Image
    except ImportError as error:
        raise ImportError("--data: images need Pillow: pip install pillow") from error
    pixels, labels = bytearray(), []
    for label, name in enumerate(CLASSES):
        paths = sorted(path for path in (folder / name).glob("*") if path.suffix.lower() in IMAGES)
        if not paths:
            raise ValueError(f"--data: {folder / name} holds no {' or '.join(IMAGES)}; {WANTED}")
        for path in paths:
            try:
                with Image.open(path) as file:
                    image = file.convert("RGB")
            except (OSError, ValueError, SyntaxError) as error:
                raise ValueError(f"--data: {path} is damaged, or no image ({error})") from error
            if image.size != (SIZE, SIZE):
                raise ValueError(f"--data: {path} is {image.width} x {image.height}, wanted {SIZE} x {SIZE} pixels")
            pixels += image.tobytes()
        labels += [label] * len(paths)
    found = torch.frombuffer(pixels, dtype=torch.uint8).view(-1, SIZE, SIZE, 3)
    return Images(found.permute(0, 3, 1, 2).contiguous(), torch.tensor(labels))


class _ArraysOnly(pickle.Unpickler):
    """Reads dicts, lists, numbers, strings and NumPy arrays; a pickle that names anything else is refused."""

    _KNOWN = {(f"numpy.{core}.multiarray", "_reconstruct") for core in ("core", "_core")} | {
        ("numpy", "ndarray"),
        ("numpy", "dtype"),
        ("_codecs", "encode"),
    }

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in self._KNOWN:
            return super().find_class(module.replace("numpy.core", "numpy._core"), name)
        raise ValueError(f"it wants to load {module}.{name}, which no CIFAR-10 batch does")


def _from_batch(path: Path) -> Images:
    """A file of cifar-10-batches-py: {b"data": uint8 [N, 3072], b"labels": [N]}."""
    try:
        with path.open("rb") as file:
            batch = _ArraysOnly(file, encoding="bytes").load()
        found = {key.decode() if isinstance(key, bytes) else key: value for key, value in batch.items()}
        pixels = torch.from_numpy(found["data"].copy()).view(-1, 3, SIZE, SIZE)
        labels = torch.tensor(found["labels"], dtype=torch.int64)
        if (
            pixels.dtype != torch.uint8
            or labels.shape != pixels.shape[:1]
            or not 0 <= labels.min() <= labels.max() < 10
        ):
            raise ValueError(f"{len(labels)} labels, {len(pixels)} images of {pixels.dtype}")
    except Exception as error:  # whatever a damaged pickle makes Python say
        raise ValueError(
            f"--data: {path} is damaged, or no CIFAR-10 batch ({type(error).__name__}: {error})"
        ) from error
    return Images(pixels, labels)


def _from_torchvision(part: str) -> Images:
    try:
        from torchvision.datasets import CIFAR10
    except (ImportError, RuntimeError) as error:  # RuntimeError: a torchvision that was built for another torch
        raise ImportError(f"--data torchvision: torchvision does not import ({error}); {WANTED}") from error
    found = CIFAR10("data", train=part == "train", download=True)
    return Images(torch.from_numpy(found.data).permute(0, 3, 1, 2).contiguous(), torch.tensor(found.targets))


# ---- augmentation: uint8 [B, 3, 32, 32] -> uint8 [B, 3, 32, 32], from torch's default generator


def light(pixels: Tensor) -> Tensor:
    """Shift by up to 4 pixels, flip, a grey square of 8 x 8: a few operations a batch, for a CPU."""
    count, pad, hole = len(pixels), 4, 8
    shift = torch.randint(0, 2 * pad + 1, (2, count, 1))
    at = torch.arange(SIZE)
    columns = torch.where(torch.rand(count, 1) < 0.5, at, at.flip(0)) + shift[1]
    padded = torch.nn.functional.pad(pixels, [pad] * 4, value=128).permute(0, 2, 3, 1)
    found = padded[torch.arange(count)[:, None, None], (at + shift[0])[:, :, None], columns[:, None, :]]
    corner = torch.randint(1 - hole, SIZE, (2, count, 1))
    inside = [(at >= c) & (at < c + hole) for c in corner]
    found[inside[0][:, :, None] & inside[1][:, None, :]] = 128
    return found.permute(0, 3, 1, 2)


def authors(scale: float, ra_n: int, ra_m: int, jitter: float) -> Callable[[Tensor], Tensor]:
    """The chain of the authors' train.py up to normalisation, by torchvision's transforms of Pillow images, as theirs:
    they are also twice as fast as those of tensors, one by one."""
    try:
        from PIL import Image
        from torchvision.transforms import v2
    except (ImportError, RuntimeError) as error:
        raise ImportError(
            f"--augment authors: torchvision does not import ({error}); install the one of your torch, "
            "or take --augment light"
        ) from error
    chain = v2.Compose(
        [
            v2.RandomResizedCrop(SIZE, scale=(scale, 1.0), ratio=(1.0, 1.0), antialias=True),
            v2.RandomHorizontalFlip(),
            v2.RandAugment(ra_n, ra_m),
            *([v2.ColorJitter(jitter, jitter, jitter)] if jitter else []),
        ]
    )

    def augment(pixels: Tensor) -> Tensor:
        images = (chain(Image.fromarray(image)) for image in pixels.permute(0, 2, 3, 1).contiguous().numpy())
        return torch.stack([v2.functional.pil_to_tensor(image) for image in images])

    return augment


def normalised(pixels: Tensor) -> Tensor:
    mean, std = (torch.tensor(v).mul(255).view(3, 1, 1) for v in (MEAN, STD))
    return (pixels.float() - mean) / std


def erased(x: Tensor, probability: float) -> Tensor:
    """torchvision's RandomErasing, of normalised images: rectangles of 2 to 33 % of the area become zero."""
    from torchvision.transforms import v2

    return torch.stack([v2.RandomErasing(probability)(image) for image in x])


class Epoch(Dataset):
    """The batches of one epoch that are this process's: item i is (images [B, 3, 32, 32], labels [B], B of all).

    Order and augmentation of batch i depend on (seed, epoch, i, rank) alone: a run that was stopped goes on with the
    same numbers, in any number of workers.
    """

    def __init__(
        self,
        images: Images,
        batch: int,
        epoch: int,
        seed: int,
        augment: Callable[[Tensor], Tensor],
        erasing: float = 0.0,
        rank: int = 0,
        world: int = 1,
    ) -> None:
        self.images, self.augment, self.erasing = images, augment, erasing
        self.key, self.share = (seed, epoch), (rank, world)
        generator = torch.Generator().manual_seed(position(seed, epoch))
        batches = torch.randperm(len(images.labels), generator=generator).split(batch)
        self.batches = [rows for rows in batches if len(rows) >= world]

    def __len__(self) -> int:
        return len(self.batches)

    def __getitem__(self, i: int) -> tuple[Tensor, Tensor, int]:
        rank, world = self.share
        mine = self.batches[i].tensor_split(world)[rank]
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(position(*self.key, i + 1, rank))
            x = normalised(self.augment(self.images.pixels[mine]))
            x = erased(x, self.erasing) if self.erasing else x
        return x, self.images.labels[mine], len(self.batches[i])


def position(seed: int, epoch: int, batch: int = 0, rank: int = 0) -> int:
    """A seed of its own for every place in a run."""
    return (((seed * 1_000_003 + epoch) * 1_000_003 + batch) * 1_009 + rank) % 2**63
