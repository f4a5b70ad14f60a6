"""Everything that wants a GPU, in parts of less than ten minutes each, without a network: `make gpu-check PART=...`.

    correct     the emulator's instruction models on the hardware, operator tests, compute-sanitizer
    ops         the depthwise block against PyTorch
    product     pointwise_block, patch_embed and pool_head against PyTorch and cuBLAS
    network     whole networks against PyTorch, Inductor and CUDA graphs, and the rivals of the paper's table
    training    training steps

Results go to benchmarks/results/gpu-*.json, .md and, where matplotlib is installed, .png. A step that cannot run says
why; one that fails does not stop the others, and makes the exit status 1. `--device cpu --dry-run` goes the same way
with tiny shapes on the CPU.
"""

import argparse
import ast
import contextlib
import importlib.util
import math
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu.device import RESULTS, reason, say
from benchmarks.gpu.store import BROKEN, save
from benchmarks.machine import commit
from cmx_kernels import _build_info, cuda

ROOT = Path(__file__).resolve().parents[2]
PROGRAMS = {  # under sanitizers: main, and the kernels it calls
    "sanitized": tuple(f"depthwise_fwd_{kernel}" for kernel in ("ffma", "mma", "mma_plane", "mma_last")),
    "sanitized_product": ("product_mma", "product_wgmma", "pool_head", "epilogue_inplace", "recast", "unfold"),
    "sanitized_training": (
        *(f"depthwise_{kernel}" for kernel in ("fwd_ffma", "fwd_mma", "fwd_mma_plane", "fwd_mma_last")),
        *(f"depthwise_{kernel}" for kernel in ("bwd_ffma", "bwd_mma", "bwd_mma_large", "fwd")),
        *("training_rows", "training_final"),
    ),
}
TESTS = ("cuda_device", "cuda_product_device", "gpu_models", "triton_device")
SHARED = ("ops", "numerics", "ops_random")  # tests of every backend: of these that of CUDA
PICTURES = (("ops", "product"), ("network",), ("training",))  # parts that are drawn together
PARTS = ("correct", "ops", "product", "network", "training")
BUDGET = 570  # seconds a part
_SHORTEST, _AT_END = 5, 90  # seconds a step must have left; within which what has begun to be measured ends
_TAIL = 2500  # characters of a log

Step = dict[str, Any]


def _code(command: list[str], seconds: float, log: Path | None = None) -> int | str:
    """The exit status, or what there was instead. With ``log`` all it says goes there."""
    with open(log, "w") if log else contextlib.nullcontext() as file:
        try:
            output = {"stdout": file, "stderr": subprocess.STDOUT} if file else {}
            return subprocess.run(command, cwd=ROOT, timeout=seconds, **output).returncode
        except subprocess.TimeoutExpired:
            return f"not finished after {seconds:.0f} s"
        except OSError as error:
            return str(error)


def measuring(seconds: float) -> float:
    """Of the seconds that a part has, those in which something new is begun."""
    return max(1.0, seconds - min(_AT_END, seconds / 4))


def run(name: str, command: list[str], seconds: float, end: float = math.inf, log: Path | None = None) -> Step:
    """``end``: of the part, by time.monotonic()."""
    start = time.monotonic()
    last = min(end, start + seconds)
    if last - start < _SHORTEST:
        return skipped(name, f"the {BUDGET} s of its part are over")
    say(f"== {name}: {' '.join(map(str, command))}")
    code = _code(command, last - start, log)
    while code == BROKEN and (left := last - time.monotonic()) > _SHORTEST:  # a new process has a new CUDA context
        code = _code([*command, "--resume", "--seconds", str(measuring(left))], left, log)
    if log and code != 0:
        say(f"== {name}: {code}, {log}\n{log.read_text(errors='replace')[-_TAIL:]}")
    return {"step": name, "passed": code == 0, "result": code, "seconds": round(time.monotonic() - start, 1)}


def skipped(name: str, why: str) -> Step:
    say(f"== {name}: not run, {why}")
    return {"step": name, "passed": None, "result": why, "seconds": 0}


Job = tuple[str, list[str], float]  # name, command, seconds


def _log(logs: Path, name: str) -> Path:
    return logs / (re.sub(r"\W+", "-", name) + ".log")


def together(jobs: Iterable[Job], end: float, logs: Path) -> Iterator[Step]:
    """Some at a time, each in a process of its own: an illegal address or a hang ends one of them, not the others."""
    logs.mkdir(parents=True, exist_ok=True)

    def one(job: Job) -> Step:
        name, command, seconds = job
        return run(name, command, seconds, end, _log(logs, name))

    with ThreadPoolExecutor(max(1, min(8, (os.cpu_count() or 1) // 2))) as pool:
        yield from pool.map(one, jobs)


def tests(file: str, command: list[str], fixture: str = "") -> Iterator[Job]:
    """A job for each test function of a file, or for those that take a fixture."""
    for node in ast.parse((ROOT / file).read_text()).body:
        if isinstance(node, ast.FunctionDef) and node.name.startswith("test_"):
            if fixture and fixture not in {a.arg for a in node.args.args}:
                continue
            name = f"{Path(file).stem}, {node.name}".replace("test_", "")
            yield name, [*command, f"{file}::{node.name}"], 300


def unless_skipped(step: Step, logs: Path) -> Step:
    """pytest is content where it has skipped everything; nothing has passed there."""
    if step["passed"] and not re.search(r"\d passed", _log(logs, step["step"]).read_text(errors="replace")):
        return {**step, "passed": None, "result": "all of it was skipped"}
    return step


def correct(options: argparse.Namespace, budget: float = BUDGET) -> Iterator[Step]:
    pytest = [sys.executable, "-m", "pytest", "-q", "--tb=short", "-p", "no:cacheprovider"]
    files = [f"tests/test_{name}.py" for name in TESTS]
    end, logs = time.monotonic() + budget, options.results / "gpu-logs"
    if options.dry_run:
        yield run("tests", [*pytest, *files], budget, end)
        yield skipped("compute-sanitizer", "this is a dry run")
        return
    with tempfile.TemporaryDirectory() as folder:
        builds, checks, why = sanitizers(Path(folder))
        jobs = [*builds, *(job for file in files for job in tests(file, pytest))]
        for name in SHARED:
            jobs += tests(f"tests/test_{name}.py", [*pytest, "-m", "gpu", "-k", "cuda"], "backend")
        for step in together(jobs, end, logs):
            yield step if step["step"].startswith("build") else unless_skipped(step, logs)
        if why is not None:
            yield skipped("compute-sanitizer", why)
        yield from together([job for job in checks if Path(job[1][-1]).exists()], end, logs)


def sanitizers(folder: Path) -> tuple[list[Job], list[Job], str | None]:
    """How to build programs without torch, and how to run three checkers over their kernels; or why not."""
    try:
        nvcc = _build_info.find_cuda(_build_info.find_compiler())[0]
    except _build_info.LeftOut as why:
        return [], [], str(why)
    tool = shutil.which("compute-sanitizer") or shutil.which("compute-sanitizer", path=str(Path(nvcc).resolve().parent))
    if not tool:
        return [], [], "no compute-sanitizer beside nvcc or on PATH"
    builds: list[Job] = []
    checks: list[Job] = []
    arch = _build_info.for_device(torch.cuda.get_device_capability())
    command = [nvcc, "-std=c++20", "-O3", "-lineinfo", "--threads", "0", *arch]  # files side by side
    command += ["-Icsrc", "-Icsrc/cuda", "-Itests/emulator", "-x", "cu"]
    for main_file, kernels in PROGRAMS.items():
        program = str(folder / main_file)
        sources = [f"tests/emulator/{main_file}.cpp", *(f"csrc/cuda/{kernel}.cu" for kernel in kernels)]
        builds.append((f"build {main_file}", [*command, *sources, "-o", program], 240))
        for name in ("memcheck", "racecheck", "initcheck"):
            checks.append((f"{name} {main_file}", [tool, f"--tool={name}", "--error-exitcode=9", program], 120))
    return builds, checks, None


def timings(part: str, options: argparse.Namespace, budget: float = BUDGET) -> Iterator[Step]:
    command = [sys.executable, "-m", f"benchmarks.gpu.{part}", "--seconds", str(measuring(budget))]
    command += ["--device", options.device, *(f"--without={name}" for name in options.without)]
    command += [] if options.results == RESULTS else ["--results", str(options.results)]
    command += [flag for flag, wanted in (("--dry-run", options.dry_run), ("--resume", options.resume)) if wanted]
    yield run(part, command, budget)


def pictures(options: argparse.Namespace, parts: Iterable[str]) -> Iterator[Step]:
    """Of what these parts have measured."""
    if importlib.util.find_spec("matplotlib") is None:
        yield skipped("pictures", "matplotlib is not installed (pip install matplotlib)")
        return
    from benchmarks.plots import draw

    for group in PICTURES:
        name, start = f"pictures of {' and '.join(group)}", time.monotonic()
        files = [file for part in group if (file := options.results / f"gpu-{part}.json").is_file()]
        if not files or not set(group) & set(parts):
            continue
        try:
            written = ", ".join(path.name for path in draw(files))
            say(f"== {name}: {written or 'none'}")
            found = {"passed": True, "result": written}
        except Exception as error:  # what was measured is there all the same
            found = {"passed": False, "result": reason(error)}
        yield {"step": name, **found, "seconds": round(time.monotonic() - start, 1)}


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Checks and timings on a GPU.")
    parser.add_argument("--part", choices=(*PARTS, "all"), default="all")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--dry-run", action="store_true", help="tiny shapes; with --device cpu it needs no GPU")
    parser.add_argument("--resume", action="store_true", help="keep what was measured, and measure the rest")
    parser.add_argument("--without", action="append", default=[], metavar="NAME", help="no provider that begins so")
    parser.add_argument("--seconds", type=float, default=BUDGET, help="a part, building included")
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--since", type=float, default=time.time(), help="when make began to build: it counts too")
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
    budget = options.seconds - (time.time() - options.since)
    parts = PARTS if options.part == "all" else (options.part,)
    for part in parts:
        going = timings(part, options, budget) if part != "correct" else correct(options, budget)
        budget = options.seconds
        for step in going:
            steps.append({"part": part, **step})
            save(options.results / f"gpu-check-{options.part}.json", record)
    for step in pictures(options, parts):
        steps.append({"part": "pictures", **step})
        save(options.results / f"gpu-check-{options.part}.json", record)
    for step in steps:
        state = {True: "passed", False: "FAILED", None: "not run"}[step["passed"]]
        why = "" if step["passed"] else f": {step['result']}"
        say(f"{state:>8}  {step['step']} ({step['seconds']} s){why}")
    return int(any(step["passed"] is False for step in steps))


if __name__ == "__main__":
    raise SystemExit(main())
