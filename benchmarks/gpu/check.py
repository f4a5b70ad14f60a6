"""Everything that wants a GPU, in parts of less than ten minutes each, without a network: `make gpu-check PART=...`.

    correct     the emulator's instruction models on the hardware, operator tests, compute-sanitizer
    ops         the depthwise block against PyTorch
    product     pointwise_block, patch_embed and pool_head against PyTorch and cuBLAS
    network     whole networks against PyTorch, Inductor and CUDA graphs, and the rivals of the paper's table
    training    training steps

Results go to benchmarks/results/gpu-*.json and .md. A step that cannot run says why; one that fails does not stop the
others, and makes the exit status 1. `--device cpu --dry-run` goes the same way with tiny shapes on the CPU.
"""

import argparse
import math
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu.device import RESULTS, save, say
from benchmarks.machine import commit
from cmx_kernels import _build_info, cuda

ROOT = Path(__file__).resolve().parents[2]
PROGRAMS = {  # under sanitizers: main, and the kernels it calls
    "sanitized": ("depthwise_fwd_ffma", "depthwise_fwd_mma", "depthwise_fwd_mma_plane"),
    "sanitized_product": ("product_mma", "product_wgmma", "pool_head", "epilogue_inplace"),
    "sanitized_training": (
        *(f"depthwise_{kernel}" for kernel in ("fwd_ffma", "fwd_mma", "fwd_mma_plane", "bwd_ffma", "bwd_mma", "fwd")),
        *("training_rows", "training_final"),
    ),
}
PARTS = ("correct", "ops", "product", "network", "training")
BUDGET = 570  # seconds a part
_SHORTEST = 5  # seconds a step must have left

Step = dict[str, Any]


def run(name: str, command: list[str], seconds: float, end: float = math.inf) -> Step:
    """``end``: of the part, by time.monotonic()."""
    start = time.monotonic()
    seconds = min(seconds, end - start)
    if seconds < _SHORTEST:
        return skipped(name, f"the {BUDGET} s of its part are over")
    say(f"== {name}: {' '.join(map(str, command))}")
    try:
        code: int | str = subprocess.run(command, cwd=ROOT, timeout=seconds).returncode
    except subprocess.TimeoutExpired:
        code = f"not finished after {seconds:.0f} s"
    except OSError as error:
        code = str(error)
    return {"step": name, "passed": code == 0, "result": code, "seconds": round(time.monotonic() - start, 1)}


def skipped(name: str, why: str) -> Step:
    say(f"== {name}: not run, {why}")
    return {"step": name, "passed": None, "result": why, "seconds": 0}


def correct(dry: bool) -> Iterator[Step]:
    pytest = [sys.executable, "-m", "pytest", "-q"]
    tests = [f"tests/test_{name}.py" for name in ("cuda_device", "cuda_product_device", "gpu_models")]
    end = time.monotonic() + BUDGET
    yield run("operator and instruction models", [*pytest, *tests], 240, end)
    if dry:
        yield skipped("compute-sanitizer", "this is a dry run")
    else:
        with tempfile.TemporaryDirectory() as folder:
            yield from sanitizers(Path(folder), end)
    yield run("triton", [*pytest, "tests/test_triton_device.py"], 120, end)


def sanitizers(folder: Path, end: float) -> Iterator[Step]:
    """memcheck, racecheck and initcheck over the kernels on ragged shapes, in a program without torch."""
    names = ("memcheck", "racecheck", "initcheck")
    try:
        nvcc = _build_info.find_cuda(_build_info.find_compiler())[0]
    except _build_info.LeftOut as why:
        yield from (skipped(name, str(why)) for name in names)
        return
    tool = shutil.which("compute-sanitizer") or shutil.which("compute-sanitizer", path=str(Path(nvcc).resolve().parent))
    if not tool:
        yield from (skipped(name, "no compute-sanitizer beside nvcc or on PATH") for name in names)
        return
    for main_file, kernels in PROGRAMS.items():
        program = folder / main_file
        sources = [f"tests/emulator/{main_file}.cpp", *(f"csrc/cuda/{kernel}.cu" for kernel in kernels)]
        arch = _build_info.for_device(torch.cuda.get_device_capability())
        command = [nvcc, "-std=c++20", "-O3", "-lineinfo", *arch, "--threads", "0"]
        folders = ["-Icsrc", "-Icsrc/cuda", "-Itests/emulator"]
        build = run(f"build {main_file}", [*command, *folders, "-x", "cu", *sources, "-o", str(program)], 100, end)
        yield build
        if build["passed"]:
            for name in names:
                yield run(f"{name}, {main_file}", [tool, f"--tool={name}", "--error-exitcode=9", str(program)], 60, end)


def timings(part: str, options: argparse.Namespace) -> Iterator[Step]:
    command = [sys.executable, "-m", f"benchmarks.gpu.{part}", "--seconds", str(BUDGET - 90)]
    command += ["--device", options.device, "--results", str(options.results)]
    yield run(part, [*command, *(["--dry-run"] if options.dry_run else [])], BUDGET)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Checks and timings on a GPU.")
    parser.add_argument("--part", choices=(*PARTS, "all"), default="all")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--dry-run", action="store_true", help="tiny shapes; with --device cpu it needs no GPU")
    parser.add_argument("--results", type=Path, default=RESULTS)
    options = parser.parse_args(arguments)
    if options.device == "cuda":
        if not torch.cuda.is_available():
            say("gpu-check: torch sees no CUDA device here. It needs an NVIDIA GPU and a CUDA build of torch.")
            return 2
        why = cuda.why_not(torch.cuda.current_device())
        if why is not None:
            say(f"gpu-check: the CUDA kernels do not run here ({why}); the rest is measured")
    steps: list[Step] = []
    record = {"gpu": torch.cuda.get_device_name() if options.device == "cuda" else "none, a dry run"}
    record |= {"torch": torch.__version__, "commit": commit(), "steps": steps}
    for part in PARTS if options.part == "all" else (options.part,):
        for step in correct(options.dry_run) if part == "correct" else timings(part, options):
            steps.append({"part": part, **step})
            save(options.results / f"gpu-check-{options.part}.json", record)
    for step in steps:
        state = {True: "passed", False: "FAILED", None: "not run"}[step["passed"]]
        why = "" if step["passed"] else f": {step['result']}"
        say(f"{state:>8}  {step['step']} ({step['seconds']} s){why}")
    return int(any(step["passed"] is False for step in steps))


if __name__ == "__main__":
    raise SystemExit(main())
