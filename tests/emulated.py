"""Builds csrc/cuda for the CPU (tests/emulator) and calls its kernels on torch CPU tensors."""

import ctypes
import hashlib
import os
import platform
import re
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import ahead
import cuda_facts
import pytest
import torch
from torch import Tensor

from cmx_kernels import _build_info

ROOT = Path(__file__).resolve().parent.parent
CACHE = ROOT / "build" / "emulator"
FLAGS = "-std=c++20 -fno-strict-aliasing -fPIC -Wall -Wextra -Wno-unknown-pragmas -Wno-class-memaccess -DCMX_EMULATED"
MODES = {
    "library": "-O1",
    "program": "-O1",
    "address": "-O0 -g1 -fsanitize=address,undefined -fno-sanitize-recover=undefined",
    "thread": "-O1 -g1 -fsanitize=thread",
}
KERNELS = ("ffma", "mma", "mma_plane", "mma_last")
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
ACTS = ("none", "relu", "gelu", "gelu_tanh")
ORDERS = range(6)  # forward, reverse, random; then the same with cp.async arriving at once


@ahead.once
def cuda_include() -> Path:
    """The folder of cuda_bf16.h and its like, or a skip."""
    if platform.machine() != "x86_64":
        pytest.skip("the emulator switches stacks with x86-64 instructions")
    try:
        return _build_info.find_cuda(_build_info.find_compiler())[1]
    except _build_info.LeftOut as why:
        pytest.skip(f"the emulator needs g++ and CUDA's headers: {why}")


def needs(function: Callable[..., object], *arguments: object) -> pytest.MarkDecorator:
    """Marks a test for which this call builds something beforehand."""
    return ahead.needs(function, *arguments, first=cuda_include)


def written(text: str, suffix: str) -> str:
    """A file of this content."""
    file = CACHE / f"{hashlib.sha256(text.encode()).hexdigest()[:16]}{suffix}"
    if not file.exists():
        file.parent.mkdir(parents=True, exist_ok=True)
        new = file.with_name(f"{os.getpid()}.{file.name}")  # another session may want the same one now
        new.write_text(text)
        os.replace(new, file)
    return str(file)


def flags(mode: str, root: Path = ROOT) -> list[str]:
    """root: of the csrc whose headers are taken."""
    includes = [f"-I{root}/csrc", f"-I{root}/csrc/cuda", "-Itests/emulator", "-isystem", str(cuda_include())]
    return [*FLAGS.split(), *MODES[mode].split(), *includes]


def without_fp16(text: str) -> str:
    """A launcher that takes bf16 for fp16, too: half of the kernels to compile, for programs that run none in fp16."""
    return text.replace("<fp16", "<bf16")


@ahead.once
def half_of_csrc() -> Path:
    """The folder of a csrc of such launchers."""
    files = {f: without_fp16(f.read_text()) for f in (*ROOT.glob("csrc/*.h"), *ROOT.glob("csrc/cuda/*")) if f.is_file()}
    root = CACHE / hashlib.sha256("".join(map(str, files.items())).encode()).hexdigest()[:16]
    if not root.exists():
        new = root.with_name(f"{os.getpid()}.{root.name}")
        for file, text in files.items():
            target = new / file.relative_to(ROOT)
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_text(text)
        os.replace(new, root)
    return root


@ahead.once
def make(target: Path, *arguments: str) -> Path:
    """What g++ makes of these arguments."""
    if not target.exists():
        new = target.with_name(f"{os.getpid()}.{target.name}")
        done = ahead.run("g++", *arguments, "-o", str(new))
        assert done.returncode == 0, done.stdout[-6000:]
        os.replace(new, target)
    return target


@ahead.once
def build(mode: str, *sources: str) -> Path:
    """Compiles and links sources (paths from the repository), each once per content: a shared library, or a program.

    Programs run nothing in fp16.
    """
    root = ROOT if mode == "library" else half_of_csrc()
    headers = [*root.glob("csrc/*.h"), *root.glob("csrc/cuda/*.h"), *root.glob("csrc/cuda/*.cuh")]
    headers += ROOT.glob("tests/emulator/*.h")
    given = flags(mode, root)
    common = " ".join([*given, *(header.read_text() for header in sorted(headers))])

    def name(*texts: str) -> Path:
        return CACHE / hashlib.sha256("".join(texts).encode()).hexdigest()[:16]

    # most of the time goes into these headers: they are compiled once
    first = written(f'#include "tests/emulator/emulator.h"  // {name(common).name}\n', ".h")
    make(Path(f"{first}.gch"), *given, f"-I{ROOT}", "-x", "c++-header", first)

    def compile_one(source: str) -> Path:
        path = (root if source.startswith("csrc/") else ROOT) / source
        target = name(common, path.read_text()).with_suffix(".o")
        return make(target, *given, "-include", first, "-x", "c++", "-c", str(path))

    with ThreadPoolExecutor(ahead.CORES) as pool:
        objects = list(map(str, pool.map(compile_one, sources)))
    if mode == "library":
        return make(name(*objects).with_suffix(".so"), *given, "-shared", *objects)
    return make(name(*objects), *given, *objects)


@ahead.once
def link(read: tuple[str, ...], *arguments: str) -> Path:
    """A shared library of sources that do not include the emulator. read: patterns of the files that it consists of."""
    texts = [file.read_text() for pattern in read for file in sorted(ROOT.glob(pattern))]
    key = hashlib.sha256("".join([torch.__version__, *arguments, *texts]).encode()).hexdigest()
    return make(CACHE / f"{key[:16]}.so", *flags("library"), "-shared", *arguments)


SOURCES = (
    "csrc/cuda/depthwise_fwd_mma_last.cu",  # the longest first
    "csrc/cuda/depthwise_fwd_mma.cu",
    "csrc/cuda/depthwise_fwd_mma_plane.cu",
    "csrc/cuda/depthwise_fwd_ffma.cu",
    "csrc/cuda/depthwise_bwd_mma.cu",
    "csrc/cuda/depthwise_bwd_mma_large.cu",
    "csrc/cuda/depthwise_bwd_ffma.cu",
    "csrc/cuda/depthwise_fwd.cu",
    "csrc/cuda/training_final.cu",
    "csrc/cuda/training_rows.cu",
    "tests/emulator/depthwise.cpp",
    "tests/emulator/training.cpp",
)


class _Forward(ctypes.Structure):
    """struct DepthwiseForward"""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("x", "weight", "y", "bias", "scale", "shift", "affine", "partials")),
        ("shape", ctypes.c_int * 7),
        ("strides", ctypes.c_int64 * 8),
        ("act", ctypes.c_int),
        ("in_act", ctypes.c_int),
        ("residual", ctypes.c_bool),
    )


class Gpu(ctypes.Structure):
    """struct Gpu of csrc/cuda/plan.h"""

    _fields_ = (
        *((name, ctypes.c_int) for name in ("arch", "multiprocessors", "shared_bytes")),
        *((name, ctypes.c_double) for name in ("ghz", "tb_per_s", "tensor")),
    )


def gpu(multiprocessors: int) -> Gpu:
    """An H200, of so many multiprocessors."""
    return Gpu(90, multiprocessors, 227 << 10, 1.755, 4.3, 1)


class _Call(ctypes.Structure):
    """struct Call of tests/emulator/depthwise.cpp"""

    _fields_ = (
        ("p", _Forward),
        ("gpu", Gpu),
        ("kernel", ctypes.c_int),
        ("order", ctypes.c_int),
        ("seed", ctypes.c_uint),
        ("moments", ctypes.c_void_p),
    )


@ahead.once
def library() -> ctypes.CDLL:
    found = ctypes.CDLL(str(build("library", *SOURCES)))
    assert (found.cmx_size_of_gpu(), found.cmx_size_of_call()) == (ctypes.sizeof(Gpu), ctypes.sizeof(_Call))
    return found


def launched(found: ctypes.CDLL) -> dict[str, int]:
    """Every kernel in this library, and the orders of threads (bits 0 to 2) of its launches since the last question."""
    symbols = ahead.run("nm", "--defined-only", found._name).stdout
    functions = re.findall(r"^(\w+) [tT] (_ZN\w+|cmx_launched)$", symbols, re.M)
    at = {name: int(address, 16) for address, name in functions}
    base = ctypes.cast(found.cmx_launched, ctypes.c_void_p).value - at["cmx_launched"]
    kernels = {cuda_facts.kernel_name(symbol): base + address for symbol, address in at.items()}
    return {name: found.cmx_launched(ctypes.c_void_p(address)) for name, address in kernels.items() if name}


def channels_last(t: Tensor) -> Tensor:
    """The same numbers, densely; unlike torch's own form also where a dimension has the size 1."""
    n, c, h, w = t.shape
    return torch.empty(n, h, w, c, dtype=t.dtype).permute(0, 3, 1, 2).copy_(t)


def bank_use(run: Callable[[], object]) -> list[tuple[int, int]]:
    """(instructions, extra cycles) of a call's accesses to shared memory, from one __syncthreads to the next."""
    count = 64
    found = (ctypes.c_int * (2 * count))()
    library().cmx_bank_use(True, found, count)
    run()
    library().cmx_bank_use(False, found, count)
    return list(zip(found[::2], found[1::2], strict=True))


class NoPlan(Exception):
    """This kernel does not take this shape."""


def depthwise(
    kernel: str,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    act: str = "none",
    residual: bool = False,
    *,
    affine: Tensor | None = None,
    in_act: str = "none",
    moments: Tensor | None = None,
    out: Tensor | None = None,
    order: int = 0,
    multiprocessors: int = 1,
) -> Tensor:
    """One kernel on CPU tensors. ``out`` may have strides of its own; vectors are float32. Without it x is laid out as
    mma_last wants it.

    affine [3, C] of x, after in_act. moments [2, C]: y = conv(x) + bias, and here the moments of act(y).
    """
    if kernel == "mma_last" and out is None:
        x = channels_last(x)
    y = torch.full_like(x, torch.nan) if out is None else out
    pointers = [None if t is None else t.data_ptr() for t in (x, weight, y, bias, scale, shift, affine)]
    p = _Forward(
        *pointers,
        None,
        (*x.shape, *weight.shape[2:], DTYPES.index(x.dtype)),
        (*x.stride(), *y.stride()),
        ACTS.index(act),
        ACTS.index(in_act),
        residual,
    )
    call = _Call(
        p,
        gpu(multiprocessors),
        KERNELS.index(kernel),
        order,
        order + 1,
        None if moments is None else moments.data_ptr(),
    )
    message = ctypes.create_string_buffer(1000)
    result = library().cmx_emulate(ctypes.byref(call), message, ctypes.c_size_t(len(message)))
    if result == -1:
        raise NoPlan
    if result:
        raise RuntimeError(message.value.decode() or f"cudaError {result}")
    return y
