"""python examples/publish_cifar10.py --data FOLDER --run runs/cifar10: the result of a run into this source tree.

Checks the weights on the whole test set: at least 70 % right, fused and plain agreeing on every image in float32, the
accuracy in bfloat16 within 0.1 point. Then writes cmx_kernels/data/convmixer_cifar10.safetensors and
examples/cifar10_curves.png and .json. No image of the data set is copied.
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
LEAST, MOST_BYTES, MOST_LOST = 0.70, 3_000_000, 0.001


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
    fused, plain = (answers(ConvMixer(*size, 10, fused=fused), weights, test.pixels) for fused in (True, False))
    low = answers(ConvMixer(*size, 10, dtype=torch.bfloat16), weights, test.pixels)
    accuracy, accuracy_bf16 = (float((found == test.labels).double().mean()) for found in (fused, low))
    different = int((fused != plain).sum())
    nbytes = sum(value.nbytes for value in weights.values())
    print(f"{accuracy:.2%} of {len(test.labels)} images, {accuracy_bf16:.2%} in bfloat16, ", end="")
    print(f"{different} differ between fused and plain, {nbytes:,} bytes")
    if accuracy < LEAST or different or nbytes > MOST_BYTES or abs(accuracy_bf16 - accuracy) > MOST_LOST:
        limits = f"at least {LEAST:.0%}, no difference, at most {MOST_BYTES:,} bytes, {MOST_LOST:.1%} lost in bfloat16"
        print(f"error: wanted {limits}", file=sys.stderr)
        return 2
    write_atomically(
        ROOT / "cmx_kernels" / "data" / "convmixer_cifar10.safetensors", lambda path: save_file(weights, path)
    )
    write_json(ROOT / "examples" / "cifar10_curves.json", {**history, "accuracy": accuracy, "bfloat16": accuracy_bf16})
    if (args.run / "curves.png").is_file():
        shutil.copy(args.run / "curves.png", ROOT / "examples" / "cifar10_curves.png")
    return 0


@torch.no_grad()
def answers(model: ConvMixer, weights: dict[str, torch.Tensor], pixels: torch.Tensor) -> torch.Tensor:
    model.load_state_dict(weights)
    return torch.cat(
        [model.eval()(cifar10.normalised(part).to(model.head.weight.dtype)).argmax(1) for part in pixels.split(500)]
    )


if __name__ == "__main__":
    sys.exit(main())
