"""python examples/publish_cifar10.py --data FOLDER --run runs/cifar10: the result of a run into this source tree.

Checks the weights on the whole test set: at least 70 % right, fused and plain agreeing on every image. Then writes
cmx_kernels/data/convmixer_cifar10.safetensors, examples/cifar10_curves.png and .json, and tests/cifar10_sheet.png:
60 images of the test set, class by class, for tests.
"""

import argparse
import json
import shutil
import sys
from pathlib import Path

import cifar10
import torch
from records import write_atomically, write_json
from safetensors.torch import load_file, save_file

from cmx_kernels import ConvMixer

ROOT = Path(__file__).resolve().parent.parent
LEAST, MOST_BYTES, PER_CLASS = 0.70, 3_000_000, 6


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="as for train_cifar10.py")
    parser.add_argument("--run", type=Path, default=Path("runs/cifar10"), help="its --output")
    args = parser.parse_args()
    try:
        test = cifar10.load(args.data, "test")
        weights = load_file(args.run / "model.safetensors")
        history = json.loads((args.run / "history.json").read_text())
    except (OSError, ValueError, ImportError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    size = [history["settings"][key] for key in ("dim", "depth", "kernel_size", "patch_size")]
    guesses = [answers(ConvMixer(*size, 10, fused=fused), weights, test.pixels) for fused in (True, False)]
    accuracy = float((guesses[0] == test.labels).double().mean())
    different = int((guesses[0] != guesses[1]).sum())
    nbytes = sum(value.nbytes for value in weights.values())
    print(f"{accuracy:.2%} of {len(test.labels)} images, {different} differ between fused and plain, {nbytes:,} bytes")
    if accuracy < LEAST or different or nbytes > MOST_BYTES:
        print(f"error: wanted at least {LEAST:.0%}, no difference, at most {MOST_BYTES:,} bytes", file=sys.stderr)
        return 2
    write_atomically(
        ROOT / "cmx_kernels" / "data" / "convmixer_cifar10.safetensors", lambda path: save_file(weights, path)
    )
    write_json(ROOT / "examples" / "cifar10_curves.json", {**history, "accuracy": accuracy})
    if (args.run / "curves.png").is_file():
        shutil.copy(args.run / "curves.png", ROOT / "examples" / "cifar10_curves.png")
    sheet(test)
    return 0


@torch.no_grad()
def answers(model: ConvMixer, weights: dict[str, torch.Tensor], pixels: torch.Tensor) -> torch.Tensor:
    model.load_state_dict(weights)
    return torch.cat([model.eval()(cifar10.normalised(part)).argmax(1) for part in pixels.split(500)])


def sheet(test: cifar10.Images) -> None:
    """One row a class: the first images of each, whether the model knows them or not."""
    from PIL import Image

    rows = [test.pixels[test.labels == label][:PER_CLASS] for label in range(10)]
    grid = torch.stack(rows).permute(0, 3, 1, 4, 2).reshape(10 * cifar10.SIZE, PER_CLASS * cifar10.SIZE, 3)
    picture = Image.fromarray(grid.numpy())
    write_atomically(ROOT / "tests" / "cifar10_sheet.png", lambda path: picture.save(path, format="PNG", optimize=True))


if __name__ == "__main__":
    sys.exit(main())
