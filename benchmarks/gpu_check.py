"""Everything that wants a GPU, in one command of under ten minutes and without a network: `make gpu-check`.

Instruction models of the emulator against the hardware, the operator's tests, compute-sanitizer, then timings. Results
go to benchmarks/results/gpu-check.json and gpu.md. A step that cannot run says why; a step that fails fails the whole.
"""

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from cmx_kernels import _build_info, cuda

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
KERNELS = ("depthwise_fwd_ffma", "depthwise_fwd_mma", "depthwise_fwd_mma_plane")
BUDGET = 570  # seconds in all


def run(name: str, command: list[str], seconds: float) -> dict[str, Any]:
    print(f"== {name}: {' '.join(map(str, command))}", flush=True)
    start = time.monotonic()
    try:
        code: int | str = subprocess.run(command, cwd=ROOT, timeout=seconds).returncode
    except subprocess.TimeoutExpired:
        code = f"not finished after {seconds:.0f} s"
    return {"step": name, "passed": code == 0, "result": code, "seconds": round(time.monotonic() - start, 1)}


def skipped(name: str, why: str) -> dict[str, Any]:
    print(f"== {name}: not run, {why}", flush=True)
    return {"step": name, "passed": None, "result": why, "seconds": 0}


def sanitizers(folder: Path) -> list[dict[str, Any]]:
    """memcheck, racecheck and initcheck over the kernels on ragged shapes, in a program without torch."""
    names = ("memcheck", "racecheck", "initcheck")
    try:
        nvcc = _build_info.find_cuda(_build_info.find_compiler())[0]
    except _build_info.LeftOut as why:
        return [skipped(name, str(why)) for name in names]
    tool = shutil.which("compute-sanitizer") or shutil.which("compute-sanitizer", path=str(Path(nvcc).resolve().parent))
    if not tool:
        return [skipped(name, "no compute-sanitizer beside nvcc or on PATH") for name in names]
    program = folder / "sanitized"
    sources = ["tests/emulator/sanitized.cpp", *(f"csrc/cuda/{kernel}.cu" for kernel in KERNELS)]
    command = [nvcc, "-std=c++20", "-O3", "-lineinfo", "-arch=native", "-Icsrc", "-Icsrc/cuda", "-x", "cu", *sources]
    steps = [run("build for the sanitizers", [*command, "-o", str(program)], 150)]
    if steps[0]["passed"]:
        steps += [run(name, [tool, f"--tool={name}", "--error-exitcode=9", str(program)], 60) for name in names]
    return steps


def main() -> int:
    if not torch.cuda.is_available():
        print("gpu-check: torch sees no CUDA device here. It needs an NVIDIA GPU and a CUDA build of torch.")
        return 2
    why = cuda.why_not(torch.cuda.current_device())
    if why is not None:
        print(f"gpu-check: the CUDA kernels do not run here: {why}")
        return 2
    start = time.monotonic()
    tests = [sys.executable, "-m", "pytest", "-q", "tests/test_cuda_device.py"]
    with tempfile.TemporaryDirectory() as folder:
        steps = [run("operator and instruction models", tests, 150), *sanitizers(Path(folder))]
    left = BUDGET - (time.monotonic() - start)
    timings = [sys.executable, "-m", "benchmarks.gpu_timings", "--seconds", f"{max(30, left - 60):.0f}"]
    steps.append(run("timings", timings, max(60, left)))
    RESULTS.mkdir(parents=True, exist_ok=True)
    record = {"gpu": torch.cuda.get_device_name(), "torch": torch.__version__, "commit": commit(), "steps": steps}
    (RESULTS / "gpu-check.json").write_text(json.dumps(record, indent=1) + "\n")
    for step in steps:
        state = {True: "passed", False: "FAILED", None: "not run"}[step["passed"]]
        why = "" if step["passed"] else f": {step['result']}"
        print(f"{state:>8}  {step['step']} ({step['seconds']} s){why}")
    return any(step["passed"] is False for step in steps)


def commit() -> str:
    git = shutil.which("git")
    done = git and subprocess.run([git, "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True)
    return done.stdout.strip() if done and done.returncode == 0 else os.environ.get("CMX_COMMIT", "unknown")


if __name__ == "__main__":
    raise SystemExit(main())
