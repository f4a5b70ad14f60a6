"""Builds cmx_kernels/_C with ninja, against the torch that is installed in the environment pip installs into.

Never imports or downloads torch, never uses the network. Without a compiler the package installs as pure Python.
What was built, what was not and why: a box at the end of `pip install -v`, and the same in cmx_kernels/_build.json.
"""

import json
import os
import platform
import shlex
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.dist_info import dist_info

ROOT = Path(__file__).resolve().parent
sys.path.insert(0, str(ROOT / "cmx_kernels"))
import _build_info as info  # noqa: E402  (importing it as cmx_kernels._build_info would import torch)

sys.path.pop(0)

FLAGS = "-std=c++20 -O3 -fPIC -fvisibility=hidden -ffp-contract=fast -fno-math-errno -Wall -Wextra"
FLAGS += " -Wno-maybe-uninitialized"  # GCC's own AVX-512 headers set it off
FLAGS += " -falign-functions=64 -falign-loops=64"  # else networks lose up to 4 % when code before a tap loop grows
NVCC_FLAGS = "-std=c++20 -O3 -Xcompiler -fPIC,-fvisibility=hidden -DCMX_WITH_CUDA"
# to compile: they are begun first, or the last one would run alone
LONGEST = (
    *("product_mma", "depthwise_fwd_mma_last", "depthwise_fwd_mma", "depthwise_bwd_mma_large", "depthwise_bwd_ffma"),
    "depthwise_fwd_ffma",
)
RULES = """\
rule cxx
  command = {cxx} $flags -MMD -MF $out.d -c $in -o $out
  depfile = $out.d
  deps = gcc
  description = $in $isa
rule nvcc
  command = {nvcc} $flags -MMD -MF $out.d -c $in -o $out
  depfile = $out.d
  deps = gcc
  description = $in
rule link
  command = {cxx} -shared -o $out $in $flags
  description = $out
"""


def headers(name, folder):
    """Flags for foreign headers, whose place on this machine must not end up in the messages of the binary."""
    return ["-isystem", str(folder), f"-ffile-prefix-map={folder}={name}"]


def plan_cuda(cxx, report):
    """nvcc, its flags, and the include and link flags of the others; everything empty where CUDA is left out."""
    mode = info.cuda_mode()
    try:
        if mode == "0":
            raise info.LeftOut("CMX_CUDA=0")
        nvcc, include, lib = info.find_cuda(cxx)
        archs = info.cuda_archs(os.environ.get("TORCH_CUDA_ARCH_LIST", ""), info.nvcc_knows(nvcc), report["missing"])
    except info.LeftOut as why:
        if mode == "1":
            raise SystemExit(f"CMX_CUDA=1, and CUDA kernels cannot be built: {why}.") from None
        report["missing"]["CUDA kernels"] = str(why)
        return "", [], [], []
    report.update(nvcc=info.run(nvcc, "--version").stdout.split("release ")[-1].split(",")[0], cuda_archs=archs)
    flags = [*NVCC_FLAGS.split(), "-ccbin", shlex.split(cxx)[-1], *info.gencode(archs)]
    flags += ["-DCMX_CUDA_ARCHS=" + ";".join(archs)]
    link = [f"-L{lib}", "-lcudart_static", "-lpthread", "-ldl", "-lrt"]
    return nvcc, flags, ["-DCMX_WITH_CUDA", "-DUSE_CUDA", *headers("cuda", include)], link


def write_ninja(folder, cxx, torch, pybind11, report):
    """build.ninja: csrc/*.cpp once, csrc/cpu/*.cpp once per ISA level, csrc/cuda/*.cu once, linked into one file."""
    levels = info.isa_levels(cxx, report["missing"])
    nvcc, nvcc_flags, with_cuda, cuda_link = plan_cuda(cxx, report)
    compiler = info.run(*shlex.split(cxx), "--version").stdout.split("\n")[0]
    report.update(compiler=compiler, flags=FLAGS, isa_levels=list(levels))

    header = "#define CMX_FOR_EACH_ISA(X) " + " ".join(f"X({level})" for level in levels) + "\n"
    if not (folder / "cmx_isa_levels.h").exists() or (folder / "cmx_isa_levels.h").read_text() != header:
        (folder / "cmx_isa_levels.h").write_text(header)
    here = folder.relative_to(ROOT)
    common = [*FLAGS.split(), *shlex.split(os.environ.get("CXXFLAGS", "")), "-Icsrc", f"-I{here}"]
    with_torch = ["-DTORCH_TARGET_VERSION=0x020b000000000000", *headers("torch", f"{torch}/include")]
    extra = {
        "module.cpp": [*headers("pybind11", pybind11), *headers("python", sysconfig.get_path("include"))],
    }
    extra |= {source.name: with_torch for source in ROOT.glob("csrc/bind*.cpp")}
    objects, edges = [], []

    def add(rule, source, flags, isa=""):
        objects.append(f"{here}/{source.relative_to(ROOT / 'csrc')}{isa and '.'}{isa}.o")
        edge = f"build {objects[-1]}: {rule} {source.relative_to(ROOT)}\n"
        edges.append(edge + f"  flags = {shlex.join(flags)}\n  isa = {isa}".replace("$", "$$"))

    for source in sorted(ROOT.glob("csrc/*.cpp")):
        add("cxx", source, [*common, *with_cuda, *extra.get(source.name, [])])
    # Levels rise: of an inline function that several define the linker keeps the first, which every CPU can run.
    for level, isa_flags in levels.items():
        for source in sorted(ROOT.glob("csrc/cpu/*.cpp")):
            add("cxx", source, [*common, f"-DCMX_ISA={level}", *isa_flags.split()], level)
    for source in sorted(ROOT.glob("csrc/cuda/*.cu")) if nvcc else []:
        if "__global__" in source.read_text():
            add("nvcc", source, ["-Icsrc", f"-I{here}", *nvcc_flags])
        else:  # nothing to compile once per architecture
            add("cxx", source, ["-x", "c++", *common, *with_cuda])
    # torch loads its libraries RTLD_LOCAL, so _C must name libtorch_cpu itself; libtorch, for the weak CUDA symbols
    libs = [f"-L{torch}/lib", "-Wl,--no-as-needed", "-ltorch_cpu", "-ltorch", "-Wl,--as-needed"]
    # torch's C++ library, by its name: an exception that leaves a static one, as some compilers link, ends the process
    libs += ["-l:libstdc++.so.6", *cuda_link]
    libs += shlex.split(os.environ.get("LDFLAGS", ""))
    link = f"build {here}/_C.so: link {' '.join(objects)}\n  flags = {shlex.join(libs)}\n".replace("$", "$$")
    edges.sort(key=lambda edge: next((i for i, name in enumerate(LONGEST) if f"/{name}.cu\n" in edge), len(LONGEST)))
    lines = [f"builddir = {here}", RULES.format(cxx=cxx, nvcc=nvcc), *edges, link]
    (folder / "build.ninja").write_text("\n".join(lines))


class BuildNative(build_ext):
    def run(self):
        torch, version = info.find_torch()
        report = {"torch": version, "python": platform.python_version()}
        report |= {"isa_levels": [], "cuda_archs": [], "missing": {}}
        target = Path(self.get_ext_fullpath("cmx_kernels._C"))
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            cxx = info.find_compiler()
        except info.LeftOut as why:
            if info.cuda_mode() == "1":
                raise SystemExit(f"CMX_CUDA=1, and nothing can be compiled: {why}.") from None
            report["missing"]["compiled kernels"] = str(why)
            target.unlink(missing_ok=True)
        else:
            folder = ROOT / "build" / f"{sys.implementation.cache_tag}-torch{version}"
            folder.mkdir(parents=True, exist_ok=True)
            ninja, pybind11 = info.find_build_tools()
            write_ninja(folder, cxx, torch, pybind11, report)
            if subprocess.run([ninja, "-f", folder / "build.ninja", "-j", info.jobs()], cwd=ROOT).returncode:
                raise SystemExit("cmx_kernels did not compile: the compiler's message is above.")
            shutil.copy(folder / "_C.so", f"{target}.new")
            os.replace(f"{target}.new", target)  # never overwrites a file that a running process has mapped
        target.with_name("_build.json").write_text(json.dumps(report, indent=1) + "\n")
        print("\n".join(info.box(report)), flush=True)


class RefuseEarly(dist_info):
    def run(self):
        info.find_torch()  # pip asks for the metadata first: refuse before it downloads a torch for us
        super().run()


if __name__ == "__main__":
    for stale in ROOT.glob("build/lib*"):  # modules deleted since the last build would be packed again
        shutil.rmtree(stale)
    setup(
        ext_modules=[Extension("cmx_kernels._C", sources=[])],
        cmdclass={"build_ext": BuildNative, "dist_info": RefuseEarly},
    )
