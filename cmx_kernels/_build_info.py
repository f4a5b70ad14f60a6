"""What there is to build with (torch, compiler, nvcc, architectures), and what the installed package was built from.

setup.py loads this file by its path, before the package is installed: standard library only, no import of the package.
"""

import importlib.util
import json
import os
import platform
import re
import shlex
import shutil
import site
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path

MIN_TORCH = (2, 11)
DEFAULT_ARCHS = "8.0;8.9;9.0a;10.0;12.0+PTX"  # 8.6 and 8.7 run the code of 8.0
NAMED_ARCHS = {  # PyTorch's names; a combined name stands before its parts
    "Volta+Tegra": "7.2",
    "Volta": "7.0+PTX",
    "Turing": "7.5+PTX",
    "Ampere+Tegra": "8.7",
    "Ampere": "8.0;8.6+PTX",
    "Ada": "8.9+PTX",
    "Hopper": "9.0+PTX",
    "Blackwell+Tegra": "11.0",
    "Blackwell": "10.0;10.3;12.0;12.1+PTX",
}
AVX512 = "-mavx512f -mavx512bw -mavx512vl -mavx512dq -mfma -mf16c -mprefer-vector-width=512"
ISA_FLAGS = {
    "baseline": "",
    "avx2": "-mavx2 -mfma -mf16c",
    "avx512": AVX512,
    "avx512bf16": AVX512 + " -mavx512bf16",
    "amx": AVX512 + " -mavx512bf16 -mamx-tile -mamx-bf16 -DCMX_TILES",
}


class LeftOut(Exception):
    """Something is not built; the message says why."""


def read():
    """The record of the last build: torch, compiler, flags, isa_levels, nvcc, cuda_archs, missing={what: why}."""
    record = Path(__file__).with_name("_build.json")
    if record.is_file():
        return json.loads(record.read_text())
    return {"missing": {"compiled kernels": "this source tree was never installed: run `pip install -e .` in it"}}


def run(*command):
    return subprocess.run(command, capture_output=True, text=True, env={**os.environ, "LC_ALL": "C"})


def torch_folders():
    """Where `import torch` looks in the environment that pip installs into, even from inside pip's build isolation."""
    spec = importlib.util.find_spec("torch")  # finds it, does not import it
    if spec and spec.submodule_search_locations:
        yield Path(next(iter(spec.submodule_search_locations)))
    folders = [sysconfig.get_path("purelib"), sysconfig.get_path("platlib")]
    venv = Path(sys.prefix, "pyvenv.cfg")
    if not venv.exists() or re.search(r"include-system-site-packages\s*=\s*true", venv.read_text(), re.IGNORECASE):
        folders += [site.getusersitepackages(), *site.getsitepackages([sys.base_prefix, sys.base_exec_prefix])]
    yield from (Path(folder, "torch") for folder in folders)


def find_torch():
    """The folder and the version of torch, without importing it."""
    pip = f"{sys.executable} -m pip install"
    for folder in torch_folders():
        if (folder / "version.py").is_file():
            version = re.search(r"__version__ = ['\"](.+?)['\"]", (folder / "version.py").read_text())[1]
            if tuple(map(int, version.split(".")[:2])) >= MIN_TORCH:
                return folder, version
            raise SystemExit(
                f"cmx_kernels needs torch >= 2.11 and this environment has {version}: "
                f"run `{pip} --upgrade 'torch>=2.11'`, then this command again."
            )
    raise SystemExit(
        "cmx_kernels is built against the torch of the environment it is installed into, and this one has none: "
        f"run `{pip} 'torch>=2.11'` (a CPU or CUDA build), then this command again (uv: with --no-build-isolation)."
    )


def accepts(cxx, flags):
    """Whether the compiler knows these flags; of tiles, whether its assembler knows their instructions."""
    command = [*shlex.split(cxx), *flags.split(), "-x", "c++"]
    if "-mamx-bf16" not in command:
        return run(*command, "-fsyntax-only", os.devnull).returncode == 0
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder, "tile.cpp")
        source.write_text('void dot() { asm("tdpbf16ps %tmm2, %tmm1, %tmm0"); }\n')
        return run(*command, "-c", str(source), "-o", f"{folder}/tile.o").returncode == 0


def find_compiler():
    """The C++ compiler: $CXX, or the first of g++, c++, clang++."""
    if sys.platform != "linux":
        raise LeftOut(f"compiled kernels are supported on Linux only, and this is {platform.system()}")
    cxx = os.environ.get("CXX") or next(filter(shutil.which, ("g++", "c++", "clang++")), None)
    if not cxx or not shutil.which(shlex.split(cxx)[0]):
        raise LeftOut(f"no C++ compiler ({cxx or 'g++, c++, clang++'} not found on PATH): install g++, or set CXX")
    if not accepts(cxx, "-std=c++20"):
        raise LeftOut(f"{cxx} does not compile C++20: install g++ 10 or newer, or set CXX")
    if not Path(sysconfig.get_path("include"), "Python.h").is_file():
        raise LeftOut("Python.h is missing: install the development files of this Python (Debian: python3-dev)")
    return cxx


def find_build_tools():
    """ninja, and the include folder of pybind11."""
    pip = f"run `{sys.executable} -m pip install ninja pybind11`, or install without --no-build-isolation."
    ninja = shutil.which("ninja", path=os.pathsep.join([sysconfig.get_path("scripts"), os.environ.get("PATH", "")]))
    if not ninja:
        raise SystemExit(f"cmx_kernels needs ninja to compile its kernels: {pip}")
    try:
        import pybind11
    except ImportError:
        raise SystemExit(f"cmx_kernels needs pybind11 to compile its kernels: {pip}") from None
    return ninja, pybind11.get_include()


def isa_levels(cxx, missing):
    """The levels csrc/cpu is compiled for, once each, with their flags; one is chosen at run time."""
    levels = ISA_FLAGS if platform.machine() in ("x86_64", "AMD64") else {"baseline": ""}
    unknown = [level for level in levels if not accepts(cxx, levels[level])]
    missing.update({f"CPU {level}": f"{cxx} does not know {levels[level]}" for level in unknown})
    return {level: flags for level, flags in levels.items() if level not in unknown}


def cuda_mode():
    """CMX_CUDA: auto (CUDA kernels where there is an nvcc), 0 (none), 1 (fail where they cannot be built)."""
    mode = os.environ.get("CMX_CUDA", "auto")
    if mode not in ("auto", "0", "1"):
        raise SystemExit(f"CMX_CUDA={mode} is unknown: write auto (where there is an nvcc), 0 (never) or 1 (or fail).")
    return mode


def find_cuda(cxx):
    """nvcc, and the include and library folders of its toolkit. Any torch will do: the kernels do not know torch."""
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    path = f"{home}/bin" if home else os.pathsep.join([os.environ.get("PATH", ""), "/usr/local/cuda/bin"])
    nvcc = shutil.which("nvcc", path=path)
    if not nvcc:
        raise LeftOut(f"no nvcc in {home}/bin (CUDA_HOME)" if home else "no nvcc on PATH or in /usr/local/cuda/bin")
    probe = run(nvcc, "-std=c++20", "-ccbin", shlex.split(cxx)[-1], "-x", "cu", "-E", os.devnull)
    if probe.returncode:
        raise LeftOut(f"{nvcc} does not work with {cxx}: {(probe.stderr.strip() or 'no message').splitlines()[0]}")
    # nvcc on PATH may be a wrapper script: only nvcc knows where its toolkit is
    dryrun = run(nvcc, "--dryrun", "-x", "cu", "-c", os.devnull, "-o", "x.o").stderr
    toolkit = Path(re.search(r"TOP=(.*)", dryrun)[1].strip()).resolve()
    for lib in ("lib64", "lib", f"targets/{platform.machine()}-linux/lib"):
        if (toolkit / lib / "libcudart_static.a").is_file():
            return nvcc, toolkit / "include", toolkit / lib
    raise LeftOut(f"{toolkit}/lib64 has no libcudart_static.a: install the development files of the CUDA runtime")


def nvcc_knows(nvcc):
    """The architectures that nvcc compiles for, as numbers: {80, 86, …}."""
    return set(map(int, re.findall(r"compute_(\d+)", run(nvcc, "--list-gpu-arch").stdout)))


def cuda_archs(wanted, known, missing):
    """TORCH_CUDA_ARCH_LIST as PyTorch reads it -> ["8.0", "9.0a", "12.0+PTX"]; what is left out goes into `missing`."""
    if wanted == "native":
        smi = shutil.which("nvidia-smi") and run("nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader")
        wanted = ";".join(sorted(set(smi.stdout.split()))) if smi and smi.returncode == 0 else ""
    text = wanted or DEFAULT_ARCHS
    for name, value in NAMED_ARCHS.items():
        text = text.replace(name, value)
    archs = []
    for arch in filter(None, re.split(r"[;,\s]+", text)):
        match = re.fullmatch(r"(\d+)\.(\d)([af]?)(\+PTX)?", arch)
        if not match:
            raise SystemExit(f"TORCH_CUDA_ARCH_LIST: {arch!r} is no CUDA architecture; write '{DEFAULT_ARCHS}'.")
        major, minor, suffix, ptx = match.groups(default="")
        number = int(major + minor)
        if number < 80:
            missing[f"CUDA {arch}"] = "the kernels need 8.0 or newer"
        elif number in known:
            suffix = "a" if number == 90 else suffix  # every 9.0 device runs 9.0a, which has wgmma besides
            archs.append(f"{major}.{minor}{suffix}{ptx}")
        elif wanted:
            raise SystemExit(f"TORCH_CUDA_ARCH_LIST asks for {arch}, which this nvcc does not know: use a newer nvcc.")
        else:
            missing[f"CUDA {arch}"] = "this nvcc does not know it"
    if not archs:
        raise LeftOut(f"TORCH_CUDA_ARCH_LIST={wanted} names no architecture from 8.0 on")
    if not wanted and not any("PTX" in arch for arch in archs):
        archs[-1] += "+PTX"  # an nvcc older than the newest default still serves newer devices
    return list(dict.fromkeys(archs))


def gencode(archs):
    """nvcc's flags for such a list. PTX is for later devices, so it is that of the architecture without suffix."""
    flags = []
    for arch in archs:
        number = arch.replace(".", "").replace("+PTX", "")
        flags += ["-gencode", f"arch=compute_{number},code=sm_{number}"]
        if arch.endswith("+PTX"):
            flags += ["-gencode", "arch=compute_{0},code=compute_{0}".format(number.rstrip("af"))]
    return flags


def for_device(capability):
    """nvcc's flags for one device. Not -arch=native, which leaves out the instructions of 9.0a."""
    return gencode(cuda_archs("{}.{}".format(*capability), {10 * capability[0] + capability[1]}, {}))


def jobs():
    """MAX_JOBS, or as many compilers as there are cores and 1.5 GB of free memory for each."""
    if os.environ.get("MAX_JOBS"):
        return os.environ["MAX_JOBS"]
    memory = [int(re.search(r"MemAvailable:\s*(\d+)", Path("/proc/meminfo").read_text())[1]) * 1024]
    limit = Path("/sys/fs/cgroup/memory.max")  # a container's
    if limit.is_file() and limit.read_text().strip().isdigit():
        memory.append(int(limit.read_text()))
    return str(max(1, min(len(os.sched_getaffinity(0)), int(min(memory) / 1.5e9))))


def box(report):
    """The lines that tell a person what was built, what was not, and why."""
    rows = [("torch", report["torch"])]
    if report["isa_levels"]:
        rows.append(("CPU kernels", " ".join(report["isa_levels"]) + f"  ({report['compiler']})"))
    if report["cuda_archs"]:
        rows.append(("CUDA kernels", " ".join(report["cuda_archs"]) + f"  (nvcc {report['nvcc']})"))
    rows += [(f"no {what}", why) for what, why in report["missing"].items()]
    if "compiled kernels" in report["missing"]:
        rows.append(("so", "pure Python install: every op runs through its PyTorch reference, or Triton on a GPU"))
    width = max(len(what) for what, _ in rows)
    lines = [f"| {what:<{width}}  {why}" for what, why in rows]
    rule = "+" + "-" * (max(map(len, lines)) - 1)
    return [rule, "| cmx_kernels was built with", *lines, rule]
