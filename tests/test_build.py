"""The build: what it finds, what it refuses and in which words, what it leaves in the package."""

import ast
import ctypes
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
import torch

from cmx_kernels import _build_info as info

ROOT = Path(__file__).resolve().parents[1]
KNOWN = {75, 80, 86, 87, 89, 90, 100, 103, 110, 120, 121}  # nvcc 13.0


@pytest.fixture
def clean_env(monkeypatch):
    for name in ("CMX_CUDA", "TORCH_CUDA_ARCH_LIST", "CUDA_HOME", "CUDA_PATH", "CXX", "CXXFLAGS", "LDFLAGS"):
        monkeypatch.delenv(name, raising=False)
    return monkeypatch


@pytest.fixture
def source_tree(tmp_path):
    """A copy of what the build reads, with one small C++ file per kind: compiled in a second or two."""
    tree = tmp_path / "tree"
    for folder in ("csrc/cpu", "cmx_kernels"):
        (tree / folder).mkdir(parents=True)
    for name in ("setup.py", "pyproject.toml", "MANIFEST.in", "LICENSE", "cmx_kernels/_build_info.py"):
        shutil.copy(ROOT / name, tree / name)
    (tree / "README.md").write_text("a copy for a test\n")
    (tree / "cmx_kernels/__init__.py").touch()
    (tree / "csrc/shared.h").write_text("int twice(int);\n")
    (tree / "csrc/module.cpp").write_text('#include "cmx_isa_levels.h"\n#include "shared.h"\nint once = 1;\n')
    (tree / "csrc/cpu/twice.cpp").write_text("namespace CMX_ISA { int twice(int x) { return 2 * x; } }\n")
    return tree


def setup_py(tree, *arguments, **environment):
    environment = {**os.environ, "CMX_CUDA": "0", **environment}
    command = [sys.executable, "setup.py", *arguments]
    return subprocess.run(command, cwd=tree, env=environment, capture_output=True, text=True)


@pytest.fixture
def compiler():
    try:
        info.find_compiler()
        info.find_build_tools()
    except (info.LeftOut, SystemExit) as why:
        pytest.skip(str(why))


def refusal(function, *arguments):
    """The words of a refusal, which are one sentence on one line."""
    with pytest.raises(SystemExit) as caught:
        function(*arguments)
    sentence = str(caught.value)
    assert "\n" not in sentence and sentence.endswith(".")
    return sentence


def test_torch_is_found_from_inside_build_isolation_and_not_imported():
    script = (  # pip's isolation takes the environment's packages off the path, too
        "import sys; sys.path = [p for p in sys.path if not p.endswith('-packages')]\n"
        f"sys.path.insert(0, {str(ROOT / 'cmx_kernels')!r}); import _build_info\n"
        "folder, version = _build_info.find_torch(); assert 'torch' not in sys.modules; print(folder, version)"
    )
    found = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert found.stdout.split() == [str(Path(torch.__file__).parent), torch.__version__]


def test_no_torch_is_refused_with_the_command_to_run(monkeypatch):
    monkeypatch.setattr(info, "torch_folders", lambda: iter(()))
    assert f"run `{sys.executable} -m pip install 'torch>=2.11'`" in refusal(info.find_torch)


@pytest.mark.parametrize("version", ["2.10.1+cu128", "1.13.1", "2.9.0a0+git1234567"])
def test_old_torch_is_refused_with_the_command_to_run(monkeypatch, tmp_path, version):
    (tmp_path / "version.py").write_text(f"__version__ = '{version}'\n")
    monkeypatch.setattr(info, "torch_folders", lambda: iter([tmp_path]))
    sentence = refusal(info.find_torch)
    assert version in sentence and f"{sys.executable} -m pip install --upgrade 'torch>=2.11'" in sentence


@pytest.mark.parametrize("version", ["2.11.0+cu130", "2.14.0.dev20260901", "3.0.0"])
def test_newer_torch_is_taken(monkeypatch, tmp_path, version):
    (tmp_path / "version.py").write_text(f"__version__ = '{version}'\n")
    monkeypatch.setattr(info, "torch_folders", lambda: iter([tmp_path / "not there", tmp_path]))
    assert info.find_torch() == (tmp_path, version)


def test_pip_is_refused_before_it_downloads_a_torch(source_tree):
    """Without torch the metadata step fails already: after it, pip would download torch as a dependency."""
    with (source_tree / "cmx_kernels/_build_info.py").open("a") as file:
        file.write("\n\ndef find_torch():\n    raise SystemExit('no torch here.')\n")
    assert "no torch here." in setup_py(source_tree, "dist_info").stderr
    assert setup_py(source_tree, "sdist").returncode == 0


def test_unknown_mode_is_refused(clean_env):
    clean_env.setenv("CMX_CUDA", "yes")
    assert "auto (where there is an nvcc), 0 (never) or 1 (or fail)" in refusal(info.cuda_mode)


@pytest.mark.parametrize("mode", ["auto", "0", "1"])
def test_no_nvcc(clean_env, compiler, source_tree, mode):
    done = setup_py(source_tree, "build_ext", "--inplace", CMX_CUDA=mode, CUDA_HOME=str(source_tree / "nowhere"))
    if mode == "1":
        assert done.returncode != 0
        assert "CMX_CUDA=1, and CUDA kernels cannot be built: no nvcc in" in done.stderr
    else:
        assert done.returncode == 0, done.stderr
        why = json.loads((source_tree / "cmx_kernels/_build.json").read_text())["missing"]["CUDA kernels"]
        assert why == "CMX_CUDA=0" if mode == "0" else "no nvcc in" in why
        assert why in done.stdout


@pytest.mark.parametrize(
    ("wanted", "archs"),
    [
        ("", ["8.0", "8.9", "9.0a", "10.0", "12.0+PTX"]),
        ("8.0", ["8.0"]),
        ("8.0;9.0", ["8.0", "9.0a"]),
        ("8.0 8.6+PTX", ["8.0", "8.6+PTX"]),
        ("9.0+PTX", ["9.0a+PTX"]),
        ("Ampere;Hopper", ["8.0", "8.6+PTX", "9.0a+PTX"]),
        ("7.5 8.0 8.6 9.0 10.0 12.0+PTX", ["8.0", "8.6", "9.0a", "10.0", "12.0+PTX"]),
        ("10.3a;12.1f;8.0;8.0", ["10.3a", "12.1f", "8.0"]),
    ],
)
def test_arch_list(wanted, archs):
    missing = {}
    assert info.cuda_archs(wanted, KNOWN, missing) == archs
    assert missing == ({"CUDA 7.5": "the kernels need 8.0 or newer"} if "7.5" in wanted else {})


def test_default_archs_are_cut_to_what_an_older_nvcc_knows():
    missing = {}
    assert info.cuda_archs("", {80, 86, 89, 90}, missing) == ["8.0", "8.9", "9.0a+PTX"]
    assert set(missing) == {"CUDA 10.0", "CUDA 12.0+PTX"}


def test_native_is_the_list_of_the_devices_or_the_default(monkeypatch):
    smi = subprocess.CompletedProcess([], 0, stdout="9.0\n9.0\n8.0\n")
    monkeypatch.setattr(info.shutil, "which", lambda name: name)
    monkeypatch.setattr(info, "run", lambda *command: smi)
    assert info.cuda_archs("native", KNOWN, {}) == ["8.0", "9.0a"]
    smi.returncode = 9  # no driver
    assert info.cuda_archs("native", KNOWN, {})[-1] == "12.0+PTX"


def test_ptx_is_that_of_the_architecture_without_suffix():
    assert info.gencode(["9.0a+PTX"])[1::2] == ["arch=compute_90a,code=sm_90a", "arch=compute_90,code=compute_90"]


def test_arch_list_refusals():
    assert "'sm_80' is no CUDA architecture" in refusal(info.cuda_archs, "sm_80", KNOWN, {})
    assert "asks for 12.0, which this nvcc does not know" in refusal(info.cuda_archs, "12.0", {80, 90}, {})
    with pytest.raises(info.LeftOut, match=r"names no architecture from 8\.0 on"):
        info.cuda_archs("7.0;7.5", KNOWN, {})


def test_without_a_compiler_it_is_a_pure_python_install(clean_env, source_tree):
    done = setup_py(source_tree, "build_ext", "--inplace", CXX="no-such-compiler", CMX_CUDA="auto")
    record = json.loads((source_tree / "cmx_kernels/_build.json").read_text())
    assert record["torch"] == torch.__version__ and record["isa_levels"] == record["cuda_archs"] == []
    assert "no-such-compiler not found" in record["missing"]["compiled kernels"]
    assert "no-such-compiler not found" in done.stdout and "pure Python install" in done.stdout
    done = setup_py(source_tree, "build_ext", "--inplace", CXX="no-such-compiler", CMX_CUDA="1")
    assert "CMX_CUDA=1, and nothing can be compiled" in done.stderr


@pytest.mark.parametrize(("name", "system"), [("win32", "Windows"), ("darwin", "Darwin")])
def test_other_systems_are_left_out(monkeypatch, name, system):
    monkeypatch.setattr(sys, "platform", name)
    monkeypatch.setattr(info.platform, "system", lambda: system)
    with pytest.raises(info.LeftOut, match=system):
        info.find_compiler()


def test_build_tools_are_asked_for_in_one_sentence(monkeypatch):
    monkeypatch.setattr(info.shutil, "which", lambda *_, **__: None)
    assert "needs ninja" in refusal(info.find_build_tools)
    monkeypatch.setattr(info.shutil, "which", lambda *_, **__: "/bin/ninja")
    monkeypatch.setitem(sys.modules, "pybind11", None)
    assert "needs pybind11" in refusal(info.find_build_tools)


def test_unknown_level_is_left_out_with_the_reason(monkeypatch):
    monkeypatch.setattr(info.platform, "machine", lambda: "x86_64")
    monkeypatch.setattr(info, "accepts", lambda cxx, flags: "bf16" not in flags)
    missing = {}
    assert list(info.isa_levels("g++", missing)) == ["baseline", "avx2", "avx512"]
    assert "-mavx512bf16" in missing["CPU avx512bf16"]
    monkeypatch.setattr(info.platform, "machine", lambda: "aarch64")
    assert info.isa_levels("g++", {}) == {"baseline": ""}


def test_builds_again_only_what_changed(clean_env, compiler, source_tree):
    first = setup_py(source_tree, "build_ext", "--inplace")
    record = json.loads((source_tree / "cmx_kernels/_build.json").read_text())
    for level in record["isa_levels"]:
        assert f"csrc/cpu/twice.cpp {level}" in first.stdout
    assert "ninja: no work to do" in setup_py(source_tree, "build_ext", "--inplace").stdout

    (source_tree / "csrc/shared.h").write_text("int twice(int x);\n")
    again = setup_py(source_tree, "build_ext", "--inplace").stdout
    assert "csrc/module.cpp" in again and "csrc/cpu/twice.cpp" not in again
    ninja = source_tree / f"build/{sys.implementation.cache_tag}-torch{torch.__version__}/build.ninja"
    for forbidden in ("-march=native", "-ffast-math", "rpath", "-Ofast"):
        assert forbidden not in ninja.read_text()


def test_a_compile_error_fails_loudly(clean_env, compiler, source_tree):
    (source_tree / "csrc/broken.cpp").write_text("this is not C++\n")
    done = setup_py(source_tree, "build_ext", "--inplace")
    assert done.returncode != 0 and "csrc/broken.cpp:1:1: error" in done.stdout
    assert "cmx_kernels did not compile: the compiler's message is above." in done.stderr


def compiled_file():
    built = sorted(ROOT.glob("cmx_kernels/_C*.so"))
    if not built:
        pytest.skip("_C is not built in this tree")
    return built[0]


def test_compiled_file_finds_torch_by_name_and_by_no_path():
    if not shutil.which("readelf"):
        pytest.skip("no readelf")
    dynamic = subprocess.run(["readelf", "-dW", compiled_file()], capture_output=True, text=True).stdout
    needed = re.findall(r"\(NEEDED\).*\[(.*)\]", dynamic)
    assert {"libtorch_cpu.so", "libtorch.so", "libstdc++.so.6"} <= set(needed)
    assert not [name for name in needed if "cuda" in name or "python" in name]
    assert "RPATH" not in dynamic and "RUNPATH" not in dynamic


def test_compiled_file_says_why_cuda_does_not_run():
    library = ctypes.CDLL(str(compiled_file()))
    if not info.read()["cuda_archs"]:
        assert "CUDA kernels" in info.read()["missing"]
        pytest.skip("built without CUDA")
    library.cmx_cuda_archs.restype = library.cmx_cuda_why_not.restype = ctypes.c_char_p
    assert library.cmx_cuda_archs().decode().split(";") == info.read()["cuda_archs"]
    assert library.cmx_cuda_runtime_version() >= 12000
    why = library.cmx_cuda_why_not(0)
    if library.cmx_cuda_driver_version() == 0:
        assert b"no NVIDIA driver is installed" in why
    elif torch.cuda.is_available():
        assert why is None
        assert b"only %d of them" % torch.cuda.device_count() in library.cmx_cuda_why_not(99)


def test_record_says_so_when_nothing_was_installed(monkeypatch):
    monkeypatch.setattr(info, "__file__", "/nowhere/_build_info.py")
    assert "pip install" in info.read()["missing"]["compiled kernels"]


def test_sdist_holds_everything_it_is_built_from(source_tree, tmp_path):
    (source_tree / "cmx_kernels/_C.some.so").touch()
    (source_tree / "cmx_kernels/_build.json").touch()
    done = setup_py(source_tree, "-q", "sdist", "--dist-dir", str(tmp_path / "dist"))
    assert done.returncode == 0, done.stderr
    (archive,) = (tmp_path / "dist").iterdir()
    with tarfile.open(archive) as tar:
        names = {name.partition("/")[2] for name in tar.getnames()}
        metadata = tar.extractfile(next(n for n in tar.getnames() if n.endswith("0/PKG-INFO"))).read().decode()
    needed = "setup.py pyproject.toml LICENSE cmx_kernels/_build_info.py csrc/shared.h csrc/cpu/twice.cpp"
    assert names.issuperset(needed.split())
    assert not [name for name in names if name.endswith((".so", "_build.json"))]
    for line in ("Name: cmx_kernels", "License-Expression: MIT", "License-File: LICENSE", "Requires-Dist: torch>=2.11"):
        assert f"\n{line}\n" in metadata


def test_metadata_never_makes_pip_replace_torch():
    tomllib = pytest.importorskip("tomllib")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    assert not [name for name in project["build-system"]["requires"] if name.startswith("torch")]
    assert "torch>=2.11" in project["project"]["dependencies"]
    assert "dynamic" not in project["project"]


@pytest.mark.parametrize("name", ["setup.py", "cmx_kernels/_build_info.py"])
def test_build_imports_neither_torch_nor_the_network(name):
    imported = set()
    for node in ast.walk(ast.parse((ROOT / name).read_text())):
        if isinstance(node, ast.Import):
            imported |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            imported.add(node.module.partition(".")[0])
    allowed = "ast importlib json os pathlib platform re shlex shutil site subprocess sys sysconfig tempfile"
    assert imported <= {*allowed.split(), "setuptools", "pybind11", "_build_info"}
