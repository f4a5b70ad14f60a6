"""The command line of train_cifar10.py."""

import argparse
from functools import partial
from typing import Any

import torch

AMP = {"none": None, "bf16": torch.bfloat16, "fp16": torch.float16}
PRESETS: dict[str, dict[str, Any]] = {
    "authors": {},
    "cpu": {
        "dim": 64,
        "depth": 6,
        "epochs": 12,
        "batch_size": 128,
        "lr": 0.02,
        "augment": "light",
        "device": "cpu",
        "amp": "bf16",
    },
}


def arguments(argv: list[str] | None, description: str | None) -> argparse.Namespace:
    formatter = partial(argparse.RawDescriptionHelpFormatter, max_help_position=34, width=110)
    main = argparse.ArgumentParser("train_cifar10.py", description=description, formatter_class=formatter)

    def group(title: str) -> Any:
        adder = main.add_argument_group(title).add_argument

        def add(flag: str, help: str, **kw: Any) -> None:
            shown = "" if kw.get("default") in (None, "") or "action" in kw else f" (default: {kw['default']})"
            adder(flag, help=help + shown, **kw)

        return add

    add = group("data and results")
    add("--data", "folder of images, the python batches, or 'torchvision' to download", default="data", metavar="PATH")
    add("--output", "checkpoints, history.json, curves.png, model.safetensors", default="runs/cifar10", metavar="DIR")
    add("--restart", "start over although --output holds a checkpoint", action="store_true")
    add("--save-every", "steps between two checkpoints", type=positive, default=100, metavar="STEPS")
    add("--stop-after", "stop after this many steps, as if killed", type=positive, metavar="STEPS")
    add(
        "--compare",
        "only this many steps, of fused, plain, and plain in another precision",
        type=positive,
        metavar="STEPS",
    )
    add = group("model")
    add("--preset", "the authors' recipe, or a small model for two CPU cores", choices=PRESETS, default="authors")
    add("--dim", "channels", type=positive, default=256)
    add("--depth", "blocks", type=positive, default=8)
    add("--kernel-size", "of the depthwise convolutions", type=positive, default=5)
    add("--patch-size", "pixels of a patch's side", type=positive, default=2)
    add("--plain", "train the plain PyTorch modules instead of the fused ones", action="store_true")
    add = group("recipe")
    add("--epochs", "passes over the data", type=positive, default=25)
    add("--batch-size", "of all processes together", type=positive, default=512)
    add(
        "--lr",
        "highest learning rate: up to it for 2/5 of the run, down to 1/20 until 4/5, then to 0",
        type=float,
        default=0.05,
    )
    add("--weight-decay", "of AdamW, for all parameters", type=float, default=0.005)
    add("--clip-norm", "clip gradients to this norm", type=float)
    add(
        "--augment",
        "authors: torchvision's RandAugment; light: shift, flip, cutout",
        choices=("authors", "light", "none"),
        default="authors",
    )
    add("--scale", "smallest share of the area that RandomResizedCrop keeps", type=float, default=1.0)
    add("--ra-n", "operations of RandAugment", type=int, default=2)
    add("--ra-m", "magnitude of RandAugment", type=int, default=12)
    add("--jitter", "of ColorJitter", type=float, default=0.0)
    add("--erasing", "probability of RandomErasing", type=float, default=0.0)
    add("--seed", "of everything", type=int, default=0)
    add = group("machine")
    add("--device", "default: cuda where there is one", metavar="cpu|cuda")
    add("--amp", "autocast; fp16 with a GradScaler (default: fp16 on cuda, none on cpu)", choices=AMP)
    add("--workers", "processes that augment; 0: none of their own", type=int, default=0)
    add("--threads", "of PyTorch on the CPU", type=positive)
    preset = main.parse_known_args(argv)[0].preset
    main.set_defaults(**PRESETS[preset])
    args = main.parse_args(argv)
    args.device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    args.amp = args.amp or ("fp16" if args.device.startswith("cuda") else "none")
    if args.device.startswith("cuda") and not torch.cuda.is_available():
        main.error(f"--device: got {args.device}, but torch {torch.__version__} sees no GPU; take --device cpu")
    return args


def positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"got {value}, wanted at least 1")
    return value
