"""The depthwise block on a GPU against PyTorch: CUDA events, L2 flushed before every call, providers in turns.

    python -m benchmarks.gpu_timings [--seconds 240] [--out benchmarks/results/gpu]

Every provider is checked against float32 before it is timed. Bandwidth is that of a copy measured in the same run.
"""

import argparse
import json
import platform
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import cmx_kernels
from cmx_kernels import backends, ops

CASES = [  # (n, c, size), kernel, dtype: the models first, so that a short run has them
    *[((64, c, s), k, "bfloat16") for c, s, k in ((1536, 32, 9), (768, 32, 7), (1024, 16, 9))],
    *[((64, c, s), k, "float32") for c, s, k in ((1536, 32, 9), (768, 32, 7), (1024, 16, 9))],
    *[((n, 768, 32), k, "bfloat16") for n in (1, 256) for k in (7, 9)],
    *[((64, 768, 32), k, "bfloat16") for k in (3, 5, 11, 13, 17, 21, 25, 31)],
    *[((64, 384, 56), k, d) for k in (3, 7, 9, 31) for d in ("bfloat16", "float32")],
    *[((64, 768, 32), k, "float16") for k in (7, 9)],
    *[((64, 384, 14), k, "bfloat16") for k in (7, 9)],
]


class Timer:
    """Times calls with events, the L2 cache overwritten before each."""

    def __init__(self) -> None:
        self.flush = torch.empty(256 << 20, dtype=torch.uint8, device="cuda")

    def once(self, call: Callable[[], Any]) -> float:
        """Microseconds"""
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        self.flush.zero_()
        start.record()
        call()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) * 1e3


def copy_bandwidth(timer: Timer) -> float:
    """TB/s of a copy, bytes read and written."""
    a = torch.randn(256 << 20, device="cuda", dtype=torch.bfloat16)
    b = torch.empty_like(a)
    us = median(timer.once(lambda: b.copy_(a)) for _ in range(20))
    return 2 * a.numel() * a.element_size() / us * 1e-6


def eager(x: Tensor, weight: Tensor, bias: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    """The plain model's layers, BatchNorm already folded to scale and shift."""
    y = F.gelu(F.conv2d(x, weight, bias, padding="same", groups=len(weight)))
    return torch.addcmul(x + shift[:, None, None], y, scale[:, None, None])


def providers(args: tuple[Tensor, ...]) -> dict[str, Callable[[], Tensor]]:
    x, *rest = args
    last = x.contiguous(memory_format=torch.channels_last)
    found: dict[str, Callable[[], Tensor]] = {}

    def ours(x: Tensor) -> Callable[[], Tensor]:
        def call() -> Tensor:
            with backends.use("cuda"):
                return ops.depthwise_block(x, *rest)

        return call

    def cudnn_benchmark() -> Tensor:
        torch.backends.cudnn.benchmark = True
        try:
            return eager(last, *rest)
        finally:
            torch.backends.cudnn.benchmark = False

    def inductor(layout: bool) -> Callable[[], Tensor]:
        import torch._inductor.config as config

        torch._dynamo.reset()
        with config.patch(layout_optimization=layout):
            compiled = torch.compile(eager)
            compiled(*args)
        return lambda: compiled(*args)

    found["cmx"] = ours(x)
    found["cmx channels_last"] = ours(last)
    found["eager"] = lambda: eager(*args)
    found["eager channels_last"] = lambda: eager(last, *rest)
    found["cudnn.benchmark"] = cudnn_benchmark
    for name, layout in (("inductor", True), ("inductor, layout off", False)):
        try:
            found[name] = inductor(layout)
        except Exception as error:  # no compiler, no triton: a row without it
            print(f"   {name}: {str(error).splitlines()[0][:100]}", flush=True)
    return found


def predicted(shape: tuple[int, int, int], k: int, dtype: str) -> tuple[str, float]:
    """The model's kernel and time for the GPU of its table whose name this one bears; nothing for another GPU."""
    from cmx_kernels import cost_model

    name = torch.cuda.get_device_name()
    known = next((gpu for gpu in cost_model.gpus() if gpu.removeprefix("RTX ") in name), None)
    if known is None:
        return "", float("nan")
    n, c, size = shape
    p = cost_model.depthwise(known, (n, c, size, size), (k, k), dtype)
    return p.kernel, p.predicted_us


def measure(timer: Timer, shape: tuple[int, int, int], k: int, dtype: str, bandwidth: float) -> dict[str, Any]:
    n, c, size = shape
    kind = getattr(torch, dtype)
    generator = torch.Generator("cuda").manual_seed(0)

    def normal(*sizes: int, scale: float = 1.0) -> Tensor:
        return (torch.randn(sizes, device="cuda", generator=generator) * scale).to(kind)

    args = (normal(n, c, size, size), normal(c, 1, k, k, scale=1 / k), normal(c), normal(c), normal(c))
    with torch.backends.cudnn.flags(allow_tf32=False):
        wanted = eager(args[0][:2].float(), *(a.float() for a in args[1:]))
        times: dict[str, list[float]] = {}
        calls = providers(args)
        for name, call in list(calls.items()):
            error = (call()[:2].float() - wanted).abs().max().item()
            allowed = {"float32": 1e-4, "float16": 0.02, "bfloat16": 0.15}[dtype]
            if not error <= allowed * max(1.0, wanted.abs().max().item() / 8):
                print(f"   {name} is wrong by {error:.3g}: not timed", flush=True)
                del calls[name]
        for _ in range(12):
            for name, call in calls.items():
                times.setdefault(name, []).append(timer.once(call))
    us = {name: median(values[2:]) for name, values in times.items()}
    nbytes = 2 * args[0].numel() * args[0].element_size() + args[1].numel() * args[1].element_size()
    floor = nbytes / bandwidth * 1e-6
    best = min((value for name, value in us.items() if not name.startswith("cmx")), default=float("nan"))
    mine = us.get("cmx", float("nan"))
    kernel, model_us = predicted(shape, k, dtype)
    return {
        "shape": [n, c, size, size], "k": k, "dtype": dtype, "us": us, "floor_us": floor, "kernel": kernel,
        "predicted_us": model_us, "of_copy": floor / mine, "speedup": best / mine,
    }  # fmt: skip


def table(result: dict[str, Any]) -> str:
    names = list(dict.fromkeys(name for row in result["rows"] for name in row["us"]))
    lines = [
        f"{result['gpu']}, torch {result['torch']}, copy {result['copy_tb_per_s']:.2f} TB/s, {result['date']}.",
        "Depthwise block: conv, bias, GELU, scale, shift, residual. Median us, L2 flushed; fp32 without TF32.",
        "",
        "| shape | k | dtype | floor | predicted | " + " | ".join(names) + " | of copy | best PyTorch / cmx |",
        "|" + "---|" * (len(names) + 7),
    ]
    for row in result["rows"]:
        us = " | ".join(f"{row['us'][name]:.1f}" if name in row["us"] else "-" for name in names)
        lines.append(
            f"| {'x'.join(map(str, row['shape']))} | {row['k']} | {row['dtype']} | {row['floor_us']:.1f} | "
            f"{row['predicted_us']:.1f} | {us} | {100 * row['of_copy']:.0f} % | {row['speedup']:.2f} |"
        )
    return "\n".join(lines) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=240, help="start no further case after this time")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/gpu"))
    options = parser.parse_args()
    if not torch.cuda.is_available():
        print("gpu_timings: torch sees no CUDA device, so there is nothing to time")
        return 2
    start = time.monotonic()
    timer = Timer()
    result: dict[str, Any] = {
        "gpu": torch.cuda.get_device_name(), "torch": torch.__version__, "cmx_kernels": cmx_kernels.__version__,
        "python": platform.python_version(), "date": time.strftime("%Y-%m-%d"),
        "copy_tb_per_s": copy_bandwidth(timer), "rows": [],
    }  # fmt: skip
    print(f"{result['gpu']}: copy {result['copy_tb_per_s']:.2f} TB/s", flush=True)
    for shape, k, dtype in CASES:
        if time.monotonic() - start > options.seconds:
            print(f"{options.seconds:.0f} s are over: the remaining cases are left out", flush=True)
            break
        row = measure(timer, shape, k, dtype, result["copy_tb_per_s"])
        result["rows"].append(row)
        print(f"{row['shape']} k={k} {dtype}: " + ", ".join(f"{n} {v:.1f}" for n, v in row["us"].items()), flush=True)
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.with_suffix(".json").write_text(json.dumps(result, indent=1) + "\n")
        options.out.with_suffix(".md").write_text(table(result))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
