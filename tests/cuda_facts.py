"""What the CUDA kernels are as compiled: registers, spills and instructions, read from the cubins of every arch.

python tests/cuda_facts.py > tests/cuda_facts.txt      after a change that is meant
"""

import functools
import hashlib
import importlib.util
import os
import re
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from cmx_kernels import _build_info

ROOT = Path(__file__).resolve().parent.parent
TABLE = Path(__file__).with_suffix(".txt")
ARCHS = ("sm_80", "sm_89", "sm_90a")
COLUMNS = {  # of the table, after registers, stack, static shared memory: instructions whose SASS matches
    "code": r".*",
    "local": r"LDL|STL",  # spills, and arrays with a computed index
    "HMMA": r"HMMA",
    "HGMMA": r"HGMMA",  # wgmma
    "LDSM": r"LDSM",
    "copy16": r"LDGSTS\S*\.128",  # cp.async
    "TMA": r"UTMALDG|UTMASTG",
    "proxy": r"FENCE\.VIEW\.ASYNC",  # before stores of tiles
    "chain": r"ACQBULK|PREEXIT",  # begin_chained
    "early": r"(LDG|STG|LDGSTS|UTMALDG|UTMASTG|ATOMG?|RED|LD|ST)(\.|$)",  # accesses to global memory before it
    "membar": r"MEMBAR\S*\.(GPU|SYS)",  # hundreds of cycles: where clusters meet, and in no loop
    "load16": r"LDG\.\S*128",
    "store16": r"STG\S*\.128",
    "FFMA": r"FFMA",
    "MUFU": r"MUFU",
    "atomic": r"ATOM|RED(\.|$)",
}
# the last two, of the loop without other branches that has most FFMA: its instructions, and its FFMA
LOOP = ("loop", "loopFMA")
_NAME = re.compile(
    r"((?:depthwise|product|pool|head|epilogue|recast|unfold|fold|widen|batchnorm|training|activation)(?:_[a-z]+)*)_kernelI(f|6__half|13__nv_bfloat16|NS_\d+\w+?E)?((?:L[ib]\d+E)*)E"
)
_TYPES = {"f": "float", "6__half": "fp16", "13__nv_bfloat16": "bf16"}


def kernel_name(symbol: str) -> str | None:
    """product_mma<bf16, 0, 1>, of its symbol; None where that is no kernel's."""
    match = _NAME.search(symbol)
    if not match:
        return None
    named = re.sub(r"NS_\d+(\w+)E", r"\1", match[2] or "")  # a struct of ours
    arguments = [*([_TYPES.get(named, named)] if named else []), *re.findall(r"L[ib](\d+)E", match[3])]
    return f"{match[1]}<{', '.join(arguments)}>"


class Missing(Exception):
    """A tool is not here."""


@functools.cache
def nvcc() -> tuple[str, str]:
    """nvcc, and its release."""
    try:
        path = _build_info.find_cuda(_build_info.find_compiler())[0]
    except _build_info.LeftOut as why:
        raise Missing(str(why)) from None
    return path, re.search(r"release ([\d.]+)", subprocess.check_output([path, "--version"], text=True))[1]


@functools.cache
def cuobjdump() -> str:
    """The toolkit's, or one from PyPI (nvidia-cuda-cuobjdump, or inside triton)."""
    found = shutil.which("cuobjdump") or shutil.which("cuobjdump", path=str(Path(nvcc()[0]).parent))
    for package, place in (("nvidia", "cu13/bin"), ("triton", "backends/nvidia/bin")):
        spec = None if found else importlib.util.find_spec(package)
        for folder in (spec.submodule_search_locations or ()) if spec else ():
            found = found or shutil.which("cuobjdump", path=f"{folder}/{place}")
    if not found:
        raise Missing("no cuobjdump: a whole CUDA toolkit has it, or pip's nvidia-cuda-cuobjdump with -nvdisasm")
    if not shutil.which("nvdisasm", path=f"{Path(found).parent}{os.pathsep}{os.environ.get('PATH', '')}"):
        raise Missing("no nvdisasm, which cuobjdump calls: a whole CUDA toolkit has it, or pip's nvidia-cuda-nvdisasm")
    return found


def _compile(job: tuple[Path, str]) -> Path:
    """A file with the code of one source for one arch: the object of the build, or a cubin made once per content."""
    source, arch = job
    read = [source, *ROOT.glob("csrc/*.h"), *ROOT.glob("csrc/cuda/*.h"), *ROOT.glob("csrc/cuda/*.cuh")]
    last = max(file.stat().st_mtime for file in read)
    for built in ROOT.glob(f"build/*/cuda/{source.name}.o"):
        listed = subprocess.check_output([cuobjdump(), "-lelf", str(built)], text=True)
        if built.stat().st_mtime > last and f".{arch}.cubin" in listed:
            return built
    key = hashlib.sha256("".join(file.read_text() for file in read).encode() + f"{arch}{nvcc()}".encode())
    out = ROOT / "build" / "cubin" / f"{source.stem}-{arch}-{key.hexdigest()[:16]}.cubin"
    if not out.exists():
        out.parent.mkdir(parents=True, exist_ok=True)
        command = [nvcc()[0], "-std=c++20", "-O3", f"-arch={arch}", "-Icsrc", "-cubin", str(source), "-o", f"{out}.new"]
        subprocess.run(command, check=True, cwd=ROOT)
        os.replace(f"{out}.new", out)
    return out


def _loop(sass: str) -> list[int]:
    """Of the loops whose body has no other branch the one with most FFMA: its instructions, and FFMA."""
    code = re.findall(r"/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)([^;]*)", sass)
    place = {int(address, 16): i for i, (address, _, _) in enumerate(code)}
    branches = [i for i, (_, name, _) in enumerate(code) if name in ("BRA", "EXIT", "RET", "BRX", "CALL")]
    best = [0, 0]
    for before, end in zip([-1, *branches], branches, strict=False):
        target = re.search(r"0x([0-9a-f]+)\s*$", code[end][2])
        start = place.get(int(target[1], 16), end + 1) if target else end + 1
        ffma = sum(name == "FFMA" for _, name, _ in code[start : end + 1])
        if before < start <= end and ffma > best[1]:
            best = [end + 1 - start, ffma]
    return best


def _facts(code: Path, arch: str) -> dict[str, str]:
    """Kernel -> its numbers."""
    path = os.pathsep.join([str(Path(cuobjdump()).parent), os.environ.get("PATH", "")])  # of nvdisasm, which it calls
    command = [cuobjdump(), "-arch", arch, "-sass", "-res-usage", str(code)]
    dump = subprocess.check_output(command, text=True, env={**os.environ, "PATH": path})
    found: dict[str, list[int]] = {}
    for function, usage in re.findall(r"Function (\S+):\s*\n\s*(REG:.*)", dump):
        numbers = dict(part.split(":") for part in usage.split() if part.count(":") == 1)
        found[function] = [int(numbers[key]) for key in ("REG", "STACK", "SHARED")]
    for part in dump.split("Function : ")[1:]:
        code = re.findall(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)", part)
        before = code[: code.index("ACQBULK")] if "ACQBULK" in code else []
        found[part.split()[0]] += [
            sum(bool(re.match(pattern, i)) for i in (before if name == "early" else code))
            for name, pattern in COLUMNS.items()
        ]
        found[part.split()[0]] += _loop(part)
    rows = {}
    for function, numbers in found.items():
        name = kernel_name(function)
        if name:
            rows[name] = "".join(f"{n:>8}" for n in numbers)
    return rows


def table() -> list[str]:
    """The header with the release of nvcc, then a line for every kernel and arch."""
    sources = [path for path in sorted(ROOT.glob("csrc/cuda/*.cu")) if "__launch_bounds__" in path.read_text()]
    sources.append(ROOT / "tests/emulator/activations.cu")
    jobs = [(source, arch) for source in sources for arch in ARCHS]
    cuobjdump()
    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        found = list(pool.map(_compile, jobs))
        facts = list(pool.map(_facts, found, [arch for _, arch in jobs]))
    rows = [
        f"{arch:<7}{kernel:<38}{numbers}"
        for (_, arch), kernels in zip(jobs, facts, strict=True)
        for kernel, numbers in kernels.items()
    ]
    columns = "".join(f"{name:>8}" for name in ("regs", "stack", "shared", *COLUMNS, *LOOP))
    return [f"nvcc {nvcc()[1]}", f"{'arch':<7}{'kernel':<38}{columns}", *sorted(rows)]


if __name__ == "__main__":
    print("\n".join(table()))
