"""What is released: wheel, sdist, the symbols that decide which torch a binary loads in, the workflow, the pages."""

import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
import torch
from test_build import ROOT, clean_env, compiled_file, compiler, setup_py, source_tree

__all__ = ["clean_env", "compiler", "source_tree"]  # fixtures
WORKFLOWS = sorted(ROOT.glob(".github/workflows/*.yml"))
FOLDERS = ("docs", "benchmarks", "csrc", "examples", "cmx_kernels")
PAGES = sorted([*ROOT.glob("*.md"), *(page for folder in FOLDERS for page in ROOT.glob(f"{folder}/**/*.md"))])


def test_a_wheel_from_the_sdist(clean_env, compiler, source_tree, tmp_path):
    """As `make wheel` does it: with the licence and the library, without tests, sources or paths of this machine."""
    clean_env.setenv("CMX_CUDA", "0")
    (source_tree / "cmx_kernels/py.typed").touch()
    assert setup_py(source_tree, "-q", "sdist", "--dist-dir", str(tmp_path)).returncode == 0
    (archive,) = tmp_path.glob("*.tar.gz")
    with tarfile.open(archive) as tar:
        tar.extractall(tmp_path / "sdist", filter="data")
    (unpacked,) = (tmp_path / "sdist").iterdir()
    command = [sys.executable, "-m", "pip", "wheel", "-q", "--no-build-isolation", "--no-deps", "-w", "dist", "."]
    done = subprocess.run(command, cwd=unpacked, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (wheel,) = (unpacked / "dist").glob("*.whl")
    with zipfile.ZipFile(wheel) as content:
        names = content.namelist()
        text = b"".join(content.read(name) for name in names)
    for wanted in (
        r"dist-info/licenses/LICENSE$",
        r"^cmx_kernels/_C\..*\.so$",
        r"^cmx_kernels/_build\.json$",
        r"^cmx_kernels/py\.typed$",
    ):
        assert [name for name in names if re.search(wanted, name)], wanted
    assert not [name for name in names if name.startswith(("tests/", "csrc/", "benchmarks/"))]
    assert str(tmp_path).encode() not in text and str(Path(torch.__file__).parent).encode() not in text
    assert b"march=native" not in text


def test_sdist_of_this_tree(tmp_path):
    """Everything that git tracks is in it, but for what belongs to the repository alone."""
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    if tracked.returncode:
        pytest.skip("no git checkout")
    names = [name for name in tracked.stdout.split() if (ROOT / name).is_file()]
    for name in names:
        (tmp_path / "tree" / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, tmp_path / "tree" / name)
    done = setup_py(tmp_path / "tree", "-q", "sdist")
    assert done.returncode == 0, done.stderr
    (archive,) = (tmp_path / "tree/dist").iterdir()
    with tarfile.open(archive) as tar:
        packed = {name.partition("/")[2] for name in tar.getnames()}
    own = (".ci/", ".github/", ".gitignore", ".pre-commit")
    assert not [name for name in names if name not in packed and not name.startswith(own)]


def test_the_binary_uses_the_stable_abi_alone():
    """No C++ symbol of torch or ATen: they change from release to release, the C functions do not."""
    if not shutil.which("nm"):
        pytest.skip("no nm: install binutils")
    done = subprocess.run(["nm", "-D", "--undefined-only", compiled_file()], capture_output=True, text=True, check=True)
    symbols = [line.split()[-1].split("@")[0] for line in done.stdout.splitlines()]
    assert [name for name in symbols if name.startswith(("aoti_torch_", "torch_"))]
    mangled = re.compile(r"_ZNK?(?:St)?\d*(?:2at|3c10|5torch)|_ZT[IVS]N(?:2at|3c10|5torch)")
    assert not [name for name in symbols if mangled.match(name)]


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.name)
def test_workflows_pin_actions_and_run_our_targets(path):
    text = path.read_text()
    uses = re.findall(r"uses:\s*(\S+)(.*)", text)
    assert uses and all(re.fullmatch(r"[\w.-]+/[\w.-]+@[0-9a-f]{40}", action) for action, _ in uses), uses
    assert all(re.fullmatch(r"\s*# v\d+\.\d+\.\d+", comment) for _, comment in uses), "which release is it?"
    runs = re.findall(r"run:\s*(.*)", text)
    targets = re.search(r"\.PHONY: (.*)", (ROOT / "Makefile").read_text())[1].split()
    assert runs and all(run.split()[0] == "make" and run.split()[1] in targets for run in runs), runs
    assert "contents: read" in text and "pull_request_target" not in text and "secrets." not in text


@pytest.mark.parametrize("path", PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_lead_somewhere(path):
    text = path.read_text()
    for link in re.findall(r"\]\(([^)\s]+)\)", text):
        if re.match(r"https?:", link):
            continue
        place, _, heading = link.partition("#")
        target = path.parent / place if place else path
        assert target.exists(), f"{path.name}: {link}"
        if heading:
            found = {re.sub(r"[^\w -]", "", h).strip().lower().replace(" ", "-") for h in _headings(target)}
            assert heading in found, f"{path.name}: {link}"


def _headings(path):
    return re.findall(r"^#+ (.*)$", path.read_text(), re.MULTILINE)


def test_code_in_the_pages_names_what_there_is():
    """Files, and names of the package, in backticks."""
    import cmx_kernels

    for path in PAGES:
        text = path.read_text()
        for name in re.findall(r"cmx_kernels\.(\w+)\(", text):
            assert hasattr(cmx_kernels, name), f"{path.name}: cmx_kernels.{name}"
        if path.parent == ROOT / "docs":
            for name in re.findall(r"`((?:csrc|tests|cmx_kernels|benchmarks)/[\w./]+\.\w+)`", text):
                assert (ROOT / name).exists(), f"{path.name}: {name}"


def test_quick_start_of_the_guide_runs(monkeypatch, tmp_path, capsys):
    """Word for word, but for the size of the network and the download."""
    timm = pytest.importorskip("timm", reason="the guide starts from a timm model")
    from plain_models import timms

    monkeypatch.setattr(timm, "create_model", lambda name, pretrained: timms(32, 2, 7, 7, 1000))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    code = re.search(r"```python\n(.*?)```", (ROOT / "docs/guide.md").read_text(), re.DOTALL)[1]
    assert "torch.randn(8, 3, 224, 224)" in code
    from cmx_kernels import tuned

    try:
        namespace = {}
        exec(compile(code.replace("224, 224", "28, 28"), "guide.md", "exec"), namespace)
    finally:
        tuned.forget()
    assert "torch.Size([8, 1000])" in capsys.readouterr().out
