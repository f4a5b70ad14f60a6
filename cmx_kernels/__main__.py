"""python -m cmx_kernels info | explain MODEL | bench MODEL ... | classify IMAGE [--model NAME] [--checkpoint FILE]"""

import argparse
import sys

import torch

from cmx_kernels.bench import compare, suite
from cmx_kernels.classify import classify
from cmx_kernels.explain import explain
from cmx_kernels.info import build_info
from cmx_kernels.models import create_model, list_models
from cmx_kernels.models.variants import find_variant

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def parser() -> argparse.ArgumentParser:
    main = argparse.ArgumentParser(prog="python -m cmx_kernels", description="Fused ConvMixer kernels for PyTorch.")
    commands = main.add_subparsers(dest="command", required=True, metavar="info | explain | bench | classify")
    commands.add_parser("info", help="what was compiled, what is used, what is missing and why")
    models = f"one of {', '.join(list_models())}, or enough of it to leave one, such as 512/16"

    explain = commands.add_parser("explain", help="which kernel runs each part of a model, and why not another")
    explain.add_argument("model", help=models)
    bench = commands.add_parser("bench", help="fused against plain PyTorch on this machine; without MODEL: the suite")
    bench.add_argument("models", nargs="*", metavar="MODEL", help=models)
    bench.add_argument("--rounds", type=_positive, default=5, help="turns of each; the median counts")
    for command in (explain, bench):
        command.add_argument("--batch", type=_positive, default=1)
        command.add_argument("--size", type=_positive, help="pixels of an image side; default: the model's")
        command.add_argument("--dtype", choices=DTYPES, default="fp32")

    classify = commands.add_parser("classify", help="the five most probable classes of an image")
    classify.add_argument("image")
    classify.add_argument("--model", help=f"{models}; default: the small one that comes with the package")
    weights = classify.add_mutually_exclusive_group()
    weights.add_argument("--checkpoint", metavar="FILE", help=".safetensors, or a PyTorch file of weights")
    weights.add_argument("--pretrained", action="store_true", help="released weights from the Hugging Face hub")
    return main


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"got {value}, wanted at least 1")
    return value


def _info() -> None:
    for key, value in build_info().items():
        if isinstance(value, dict):
            print(f"{key}:")
            for name, entry in value.items():
                shown = " ".join(map(str, entry)) if isinstance(entry, list) else entry
                print(f"  {name:<18} {'available' if key == 'backends' and entry is None else shown}")
        else:
            print(f"{key:<20} {' '.join(value) if isinstance(value, list) else value}")


def _explain(args: argparse.Namespace) -> None:
    variant, dtype = find_variant(args.model), DTYPES[args.dtype]
    size = args.size or variant.image_size
    model = create_model(variant.name, dtype=dtype).eval()
    print(f"{variant.name}, eval, images [{args.batch}, 3, {size}, {size}], {args.dtype}")
    with torch.no_grad():
        print(explain(model, torch.randn(args.batch, 3, size, size, dtype=dtype)))


def _bench(args: argparse.Namespace) -> None:
    if not args.models:
        if suite([]) != 0:
            raise RuntimeError("the suite failed, see above")
        return
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, CPU kernels: {build_info()['isa_level']}")
    for variant in [find_variant(name) for name in args.models]:
        size = args.size or variant.image_size
        print(compare(variant.name, args.batch, size, DTYPES[args.dtype], args.rounds), flush=True)


def _classify(args: argparse.Namespace) -> None:
    if args.model is not None and args.checkpoint is None and not args.pretrained:
        print(
            "warning: the weights are random, so the classes mean nothing; give --checkpoint FILE or --pretrained",
            file=sys.stderr,
        )
    for name, probability in classify(args.image, args.model, args.checkpoint, args.pretrained):
        print(f"{probability:7.2%}  {name}")


def main(argv: list[str] | None = None) -> int:
    """0, or 2 after one sentence on stderr about what was wrong with the input."""
    args = parser().parse_args(argv)
    commands = {"info": lambda _: _info(), "explain": _explain, "bench": _bench, "classify": _classify}
    try:
        commands[args.command](args)
    except (ValueError, RuntimeError, OSError, ImportError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
