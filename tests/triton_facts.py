"""What the Triton kernels are as compiled: registers, spills and instructions for three GPUs, without a GPU.

python tests/triton_facts.py --write      after a change that is meant: the table of the Triton that is installed
python tests/triton_facts.py --third      every variant for one of the GPUs, a third of the time

The launches are the real ones, on CPU tensors that nobody fills: the tiles, strides and alignments that the operators
choose, specialised and compiled by Triton's own JIT against a driver that only names the GPU.
"""

import contextlib
import hashlib
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

os.environ.setdefault("TRITON_CACHE_DIR", str(Path(__file__).resolve().parent.parent / "build" / "triton"))
os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget

from cmx_kernels import triton_kernels
from cmx_kernels.triton_kernels import launch

CACHE = Path(os.environ["TRITON_CACHE_DIR"])
ARCHS = {80: 108, 90: 132, 100: 148}  # sm_: multiprocessors of an A100, H100 or H200, B200
COLUMNS = {  # after registers, stack, shared memory: instructions whose SASS matches
    "code": r".*",
    "local": r"LDL|STL",
    "HMMA": r"HMMA",  # mma
    "HGMMA": r"HGMMA",  # wgmma
    "UTCMMA": r"UTC\w*MMA",  # tcgen05
    "LDGSTS": r"LDGSTS",  # cp.async
    "UTMALDG": r"UTMALDG",  # TMA
    "UTMASTG": r"UTMASTG",
    "load16": r"LDG\.\S*128",
    "load2": r"LDG\.\S*U16",
    "store16": r"STG\S*\.128",
    "FFMA": r"FFMA",
    "ATOM": r"ATOMG|ATOM\.|REDG?\.",  # to global memory
    "chain": r"ACQBULK|PREEXIT",  # begin_chained
    "early": r"(LDG|STG|LDGSTS|UTMALDG|UTMASTG|ATOMG?|REDG?|LD|ST)(\.|$)",  # accesses to global memory before it
}
BF16, F32 = torch.bfloat16, torch.float32


class Driver:
    """Names the GPU; every JIT cache is per device, so the device is the arch."""

    def __init__(self, arch: int) -> None:
        self.target = GPUTarget("cuda", arch, 32)

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> int:
        return self.target.arch

    def get_current_stream(self, device: int | None = None) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cuda", 0)


class Compiling:
    """Stands for wrap_triton: kernel[grid](...) compiles and is written down."""

    made: ClassVar[list[tuple[str, Any]]] = []

    def __init__(self, kernel: Any) -> None:
        self.kernel = kernel

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        def run(*args: Any, **options: Any) -> None:
            Compiling.made.append((self.kernel.__name__, self.kernel.warmup(*args, grid=grid, **options)))

        return run


@contextlib.contextmanager
def _for_gpu(arch: int) -> Iterator[None]:
    """The operators launch as on this GPU."""
    triton.runtime.driver.set_active(Driver(arch))
    launch.arch = lambda x: arch
    launch.multiprocessors = lambda x: ARCHS[arch]
    launch.on_device = lambda x: contextlib.nullcontext()
    Compiling.made = []
    yield


def block(op: str, x: tuple[int, ...], weight: tuple[int, ...], dtype: torch.dtype, *rest: Any, **how: Any) -> None:
    """One operator on tensors of these shapes."""
    module = sys.modules[f"cmx_kernels.triton_kernels.{op}"]
    module.wrap_triton = Compiling
    last = torch.channels_last if how.get("last") else torch.contiguous_format
    v = torch.empty(weight[0])
    launch.precision = lambda x, convolution=True: how.get("precision", "ieee")
    launch.is_plain = lambda x: not how.get("traced")
    vectors: tuple[Tensor, ...] = (v,) if op == "pool_head" else (v, v, v)
    getattr(module, op)(
        torch.empty(x, dtype=dtype, memory_format=last), torch.empty(weight, dtype=dtype), *vectors, *rest
    )


def training(x: tuple[int, ...], k: int, dtype: torch.dtype, *, forward: bool, last: bool = False) -> None:
    """The depthwise half of a training step, and the passes of the pointwise half."""
    folder = "cmx_kernels.triton_kernels"
    for name in ("statistics", "training_passes", "depthwise_block", "depthwise_training"):
        sys.modules[f"{folder}.{name}"].wrap_triton = Compiling
    launch.is_plain = lambda x: True
    one, passes = sys.modules[f"{folder}.depthwise_training"], sys.modules[f"{folder}.training_passes"]
    layout = torch.channels_last if last else torch.contiguous_format
    a, rows = torch.empty(x, dtype=dtype, memory_format=layout), torch.empty(4, x[1])
    weight = torch.empty((x[1], 1, k, k), dtype=dtype)
    if forward:
        one.depthwise_block_train(a, rows[:3], weight, rows[0], "gelu")
        passes.training_moments(a, "gelu")
    else:
        one.depthwise_block_backward(a, a, rows, a, rows[:3], weight, "gelu", True, True, True)
        passes.training_sums(a, a, rows[:3], "gelu")


def variants() -> Iterator[tuple[str, Callable[[], None]]]:
    def row(name: str, *args: Any, **how: Any) -> tuple[str, Callable[[], None]]:
        return name, lambda: block(*args, **how)

    pw, dw, pe = "pointwise_block", "depthwise_block", "patch_embed"
    wide, small = (64, 1536, 32, 32), (1, 1536, 32, 32)
    square = (1536, 1536, 1, 1)
    yield row("bf16 64x1536x32x32", pw, wide, square, BF16, "gelu")
    yield row("bf16 64x1536x32x32 last", pw, wide, square, BF16, "gelu", last=True)
    yield row("bf16 64x1536x32x32 traced", pw, wide, square, BF16, "gelu", traced=True)
    yield row("bf16 1x1536x32x32", pw, small, square, BF16, "gelu")
    yield row("bf16 2x100x7x7", pw, (2, 100, 7, 7), (77, 100, 1, 1), BF16, "gelu")
    yield row("tf32 64x1536x32x32", pw, wide, square, F32, "gelu", precision="tf32")
    yield row("fp32 64x1536x32x32", pw, wide, square, F32, "gelu")
    for name, x, k, last in (
        ("bf16 64x1536x32x32 9x9", wide, 9, False),
        ("bf16 1x1536x32x32 9x9", small, 9, False),
        ("bf16 64x1024x16x16 9x9", (64, 1024, 16, 16), 9, False),
        ("bf16 64x128x56x56 7x7", (64, 128, 56, 56), 7, False),
        ("bf16 8x100x7x7 5x5", (8, 100, 7, 7), 5, False),
        ("bf16 64x768x32x32 7x7 last", (64, 768, 32, 32), 7, True),
    ):
        yield row(name, dw, x, (x[1], 1, k, k), BF16, "gelu", True, last=last)
    yield row("fp32 64x1536x32x32 9x9", dw, wide, (1536, 1, 9, 9), F32, "gelu", True)
    yield row("fp32 64x384x32x32 31x31", dw, (64, 384, 32, 32), (384, 1, 31, 31), F32, "gelu", True)
    yield row("bf16 64x3x224x224 7x7", pe, (64, 3, 224, 224), (1536, 3, 7, 7), BF16, "gelu")
    yield row("fp32 64x3x224x224 7x7", pe, (64, 3, 224, 224), (1536, 3, 7, 7), F32, "gelu")
    yield row("bf16 64x1536x32x32", "pool_head", wide, (1000, 1536), BF16)
    yield row("bf16 64x256x16x16", "pool_head", (64, 256, 16, 16), (10, 256), BF16)
    for name, x, k, dtype, last in (
        ("bf16 64x1536x32x32 9x9", wide, 9, BF16, False),
        ("fp32 64x1536x32x32 9x9", wide, 9, F32, False),
        ("bf16 64x768x32x32 7x7 last", (64, 768, 32, 32), 7, BF16, True),
        ("fp32 64x384x32x32 31x31", (64, 384, 32, 32), 31, F32, False),
    ):
        for part, forward in (("fwd", True), ("bwd", False))[k == 31 :]:
            yield f"{name} {part}", partial(training, x, k, dtype, forward=forward, last=last)


def _tool(name: str) -> str:
    return str(Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name)


def _facts(cubin: bytes) -> list[int]:
    """Registers, stack and counts of instructions, read once a cubin."""
    cache = CACHE / f"{hashlib.sha256(cubin).hexdigest()[:20]}.sass"
    if not cache.exists():
        cache.parent.mkdir(parents=True, exist_ok=True)
        file = cache.with_suffix(f".{os.getpid()}.cubin")
        file.write_bytes(cubin)
        path = os.pathsep.join([str(Path(_tool("nvdisasm")).parent), os.environ.get("PATH", "")])
        command = [_tool("cuobjdump"), "-sass", "-res-usage", str(file)]
        cache.write_text(
            subprocess.check_output(command, text=True, env={**os.environ, "PATH": path}, stderr=subprocess.DEVNULL)
        )
        file.unlink()
    dump = cache.read_text()
    usage = dict(part.split(":") for part in re.search(r"REG:.*", dump)[0].split() if part.count(":") == 1)
    code = re.findall(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)", dump)
    before = code[: code.index("ACQBULK")] if "ACQBULK" in code else []
    counts = [sum(bool(re.match(p, i)) for i in (before if n == "early" else code)) for n, p in COLUMNS.items()]
    return [int(usage["REG"]), int(usage["STACK"]), *counts]


def rows(arch: int, third: bool) -> list[str]:
    found: dict[tuple[str, str], str] = {}
    with _for_gpu(arch):
        for name, call in list(variants())[list(ARCHS).index(arch) if third else 0 :: 3 if third else 1]:
            Compiling.made.clear()
            call()
            for kernel, made in Compiling.made:
                registers, stack, *counts = _facts(made.asm["cubin"])
                kernel = kernel.removesuffix("_kernel")
                if kernel == "training_rows":
                    kernel += "_" + re.search(r"'(sum|gradient|moments|sums)'", str(made.src.constants))[1]
                numbers = "".join(f"{n:>8}" for n in (registers, stack, made.metadata.shared, *counts))
                found.setdefault((kernel, name), f"sm_{arch:<5}{kernel:<26}{name:<34}{numbers}")
    return sorted(found.values())


def header() -> list[str]:
    columns = "".join(f"{name:>8}" for name in ("regs", "stack", "shared", *COLUMNS))
    return [f"triton {triton.__version__}", f"{'arch':<8}{'kernel':<26}{'variant':<34}{columns}"]


if __name__ == "__main__":
    reason = triton_kernels.load()
    if reason is not None:
        sys.exit(reason)
    archs = [int(a) for a in sys.argv[1:] if a.isdigit()] or list(ARCHS)
    text = "\n".join([*header(), *(line for arch in archs for line in rows(arch, "--third" in sys.argv))])
    print(text)
    if "--write" in sys.argv:
        Path(__file__).with_name(f"triton_facts_{triton.__version__}.txt").write_text(text + "\n")
