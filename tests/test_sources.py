"""The structure that keeps the code in one piece: who imports whom, where things are declared, how long files are."""

import ast
import inspect
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import cases
import pytest
import torch

from cmx_kernels import activations, backends, ops, registry
from cmx_kernels.ops import checks

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "cmx_kernels"
CSRC = ROOT / "csrc"
SKIPPED = {".git", "build", "dist", ".venv", "node_modules"}

# A module imports from layers below its own, and from its own folder.
LAYERS = (
    {"flops"},
    {"registry", "activations", "_build_info", "profiling"},
    {"cuda", "triton_kernels", "cost_model", "tuned"},
    {"backends", "checkpoints", "micro_batches"},
    {"plain_layers"},
    {"ops"},
    {"models", "self_check"},
    {"layers"},
    {"fuse"},
    {"info", "explain", "bench", "classify"},
    {"tune"},
    {"__main__"},
)
NATIVE = {"registry", "backends"}  # who may know _C


def _files(*patterns: str) -> list[Path]:
    found = {path for pattern in patterns for path in ROOT.glob(pattern)}
    return sorted(p for p in found if p.is_file() and not SKIPPED & set(p.relative_to(ROOT).parts))


def _name(path: Path) -> str:
    return str(path.relative_to(ROOT))


def _tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text())


PYTHON = _files("*.py", *(f"{folder}/**/*.py" for folder in ("cmx_kernels", "tests", "benchmarks", "csrc", "examples")))
MODULES = [p for p in PYTHON if PACKAGE in p.parents and p != PACKAGE / "__init__.py"]
NATIVE_FILES = _files("csrc/**/*.h", "csrc/**/*.cuh", "csrc/**/*.cpp", "csrc/**/*.cu")
TESTS = _files("tests/**/test_*.py")
needs_sources = pytest.mark.skipif(not CSRC.is_dir(), reason="these tests run from an installed package, without csrc/")


def _part(path: Path) -> str:
    """The first name below the package: a folder or a module."""
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def _imports(path: Path) -> Iterator[str]:
    """What a module imports, as dotted names; a relative import counts as what it means."""
    for node in ast.walk(_tree(path)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{_name(path)}: write the full name in imports"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


@pytest.mark.parametrize("path", MODULES, ids=_name)
def test_imports_go_down(path: Path) -> None:
    ranks = {module: rank for rank, layer in enumerate(LAYERS) for module in layer}
    part = _part(path)
    assert part in ranks, f"{_name(path)} has no place in LAYERS"
    for name in _imports(path):
        top, _, rest = name.partition(".")
        assert top not in ("tests", "benchmarks", "conftest"), f"{_name(path)} imports {name}"
        target = rest.split(".")[0]
        if top == "cmx_kernels" and target == "_C":
            assert part in NATIVE, f"{_name(path)} imports the native library"
        elif top == "cmx_kernels" and target in ranks and target != part:
            assert ranks[target] < ranks[part], f"{_name(path)} imports {name}, which is not below it"


@pytest.mark.parametrize("path", [p for p in MODULES if _part(p) == "models"], ids=_name)
def test_models_name_no_backend(path: Path) -> None:
    named = {n.value for n in ast.walk(_tree(path)) if isinstance(n, ast.Constant) and isinstance(n.value, str)}
    assert not named & {"cuda", "triton", "reference"}


@pytest.mark.parametrize("path", PYTHON, ids=_name)
def test_length_of_python_files(path: Path) -> None:
    lines = len(path.read_text().splitlines())
    assert lines <= 300, f"{_name(path)} has {lines} lines: it has two jobs"


@needs_sources
@pytest.mark.parametrize("path", [*NATIVE_FILES, *_files("tests/emulator/*.h", "tests/emulator/*.cpp")], ids=_name)
def test_length_of_native_files(path: Path) -> None:
    lines = len(path.read_text().splitlines())
    assert lines <= 500, f"{_name(path)} has {lines} lines: it has two jobs"


def test_import_is_light() -> None:
    """No heavy or optional package, no warning, no message."""
    heavy = {"timm", "torchvision", "triton", "matplotlib", "pytest", "PIL"}
    code = f"import sys, cmx_kernels; print(*{heavy} & set(sys.modules))"
    command = [sys.executable, "-W", "error::UserWarning:cmx_kernels", "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == ""
    assert "cmx_kernels" not in done.stderr


def _calls(path: Path, name: str) -> list[ast.Call]:
    return [n for n in ast.walk(_tree(path)) if isinstance(n, ast.Call) and ast.unparse(n.func).split(".")[-1] == name]


def test_schemas_are_in_one_place() -> None:
    """define() is called in ops/ only, the dispatcher's own registration in registry.py only, C++ defines nothing."""
    for path in MODULES:
        if _part(path) != "ops":
            assert not [c for c in _calls(path, "define") if ast.unparse(c.func) != "torch.library.define"], _name(path)
        if path.name != "registry.py":
            for function in ("register_fake", "register_autograd", "impl", "custom_op"):
                assert not _calls(path, function), f"{_name(path)} calls {function}"
            assert "torch.library.define" not in path.read_text(), _name(path)
    for path in NATIVE_FILES:
        if path.name != "module.cpp":
            assert not re.search(r"\bm\.def\(", path.read_text()), f"{_name(path)} defines a schema"


def test_cudnn_stays_on() -> None:
    """cudnn.flags turns cuDNN off unless it is told otherwise."""
    for path in PYTHON:
        for call in _calls(path, "flags"):
            if ast.unparse(call.func).endswith("cudnn.flags"):
                assert "enabled" in {k.arg for k in call.keywords}, f"{_name(path)}:{call.lineno}"


def test_triton_kernels_convert_no_parameter() -> None:
    """An integer that is 1 is a constant while Triton compiles, and has no .to(): tl.cast takes it."""
    for path in _files("cmx_kernels/triton_kernels/*.py"):
        for kernel in (n for n in ast.walk(_tree(path)) if isinstance(n, ast.FunctionDef)):
            if not any(ast.unparse(d) == "triton.jit" for d in kernel.decorator_list):
                continue
            given = {a.arg for a in kernel.args.args}
            made = {n.id for n in ast.walk(kernel) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)}
            for call in (n for n in ast.walk(kernel) if isinstance(n, ast.Call)):
                if isinstance(call.func, ast.Attribute) and call.func.attr == "to" and kernel.name.endswith("_kernel"):
                    assert ast.unparse(call.func.value) not in given - made, f"{_name(path)}:{call.lineno}"


@pytest.mark.parametrize("op", cases.OPS)
def test_an_operator_file(op: str) -> None:
    """Formula, reference, fake, gradient, schema, public function: all there, in this order."""
    path = PACKAGE / "ops" / f"{op}.py"
    tree = _tree(path)
    docstring = ast.get_docstring(tree) or ""
    assert docstring.startswith(f"{op}: y = ")
    assert re.search(r"x \[N, C.*, H, W\].*weight \[.*\].*-> y \[", docstring), "the shapes"
    lines = {node.name: node.lineno for node in tree.body if isinstance(node, ast.FunctionDef)}
    define = _calls(path, "define")[0]
    assert lines["reference"] < lines["_fake"] < lines["_backward"] < define.lineno < lines[op]
    assert lines[op] == max(lines.values()), "the public function comes last"
    arguments = [ast.unparse(a) for a in define.args]
    assert "_fake" in arguments and "reference" in arguments and "_backward" in arguments


@pytest.mark.parametrize("op", cases.OPS)
def test_signatures_agree(op: str) -> None:
    """Public function, reference, fake, schema and C++ take the same arguments in the same order."""
    module = sys.modules[f"cmx_kernels.ops.{op}"]
    public = list(inspect.signature(getattr(ops, op)).parameters)
    assert list(inspect.signature(module.reference).parameters) == public
    assert list(inspect.signature(module._fake).parameters) == public
    assert [a.name for a in getattr(torch.ops.cmx, op).default._schema.arguments] == public
    assert re.search(r"Args:.*Returns:.*Raises:", getattr(ops, op).__doc__, re.DOTALL)
    if CSRC.is_dir():
        found = re.search(rf"^Tensor {op}\(([^)]*)\)", (CSRC / "bind.cpp").read_text(), re.MULTILINE)
        assert found, "bind.cpp holds no function of this name"
        assert [argument.split()[-1].strip("&*") for argument in found[1].split(",")] == public


def test_public_operators() -> None:
    forms = {f"{op}_train" for op in cases.OPS} - {"pool_head_train"}  # of which the head has none
    assert set(ops.__all__) == {*cases.OPS, *forms}
    for op in cases.OPS:
        assert (PACKAGE / "ops" / f"{op}.py").is_file()
        assert (ROOT / "tests" / "test_ops.py").read_text().count("cases.OPS") > 0


def test_lists_of_activations_agree() -> None:
    """One list; kernels may lack some, tests may not."""
    assert tuple(activations.ACTIVATIONS) == cases.ACTS
    if registry.C is not None:
        assert set(registry.C.activations()) <= set(activations.ACTIVATIONS)
        assert set(registry.C.activations()) == backends._CPU_ACTIVATIONS
        assert {getattr(torch, name) for name in registry.C.dtypes()} == set(backends._CPU_DTYPES) == set(cases.DTYPES)


@needs_sources
def test_lists_of_the_kernels_agree() -> None:
    text = (CSRC / "lists.h").read_text()

    def listed(name: str) -> list[str]:
        return re.findall(r"X\((\w+)\)", re.search(rf"#define {name}\(X\)(.*)", text)[1])

    assert set(listed("CMX_FOR_EACH_ACTIVATION")) <= set(activations.ACTIVATIONS)
    assert {getattr(torch, name) for name in listed("CMX_FOR_EACH_DTYPE")} == set(cases.DTYPES)
    assert f"kMaxKernel = {checks.MAX_KERNEL};" in text
    widths = [int(k) for k in listed("CMX_FOR_EACH_KERNEL_WIDTH")]
    assert all(1 <= k <= checks.MAX_KERNEL for k in widths)


@pytest.mark.parametrize("act", cases.ACTS)
def test_rows_of_the_list_of_activations(act: str) -> None:
    """Each row's backward is autograd's derivative of its forward, away from kinks, and knows its module."""
    x = torch.linspace(-6, 6, 2000, dtype=torch.float64).requires_grad_()
    grad = torch.randn(2000, dtype=torch.float64)
    y = activations.activation(act)(x)
    (wanted,) = torch.autograd.grad(y, x, grad) if y is not x else (grad,)
    torch.testing.assert_close(activations.activation_backward(act, grad, x.detach()), wanted)
    modules = {
        "gelu": torch.nn.GELU(),
        "gelu_tanh": torch.nn.GELU("tanh"),
        "relu": torch.nn.ReLU(),
        "none": torch.nn.Identity(),
    }
    assert activations.name_of(modules[act]) == act
    assert activations.name_of(torch.nn.SiLU()) is None


@needs_sources
@pytest.mark.parametrize("path", NATIVE_FILES, ids=_name)
def test_native_includes(path: Path) -> None:
    """Only bind*.{h,cpp} know torch, only module.cpp Python; kernels include what both share and their own folder."""
    includes = re.findall(r'#include\s*[<"]([^>"]+)[>"]', path.read_text())
    torch_headers = [i for i in includes if i.split("/")[0] in ("torch", "ATen", "c10")]
    assert re.fullmatch(r"bind(_cuda\w*)?\.(h|cpp)", path.name) or not torch_headers
    assert path.name == "module.cpp" or not [i for i in includes if i.startswith("pybind11") or i == "Python.h"]
    if path.parent == CSRC:
        assert not [i for i in includes if i.startswith("cpu/")], "which level's?"
        return
    for include in includes:
        local = include.removeprefix("../").split("/")[-1]
        if (CSRC / local).is_file():
            shared = ("lists.h", "params.h", "batchnorm.h", "activation.h", "dispatch.h", "cpu_levels.h")
            assert local in shared, f"{_name(path)} includes {include}"
        for other in ("cpu", "cuda"):
            assert path.parent.name == other or f"{other}/" not in include


ROOT_FILES = ("*.py", "*.md", "*.toml", "Makefile", ".gitignore", "MANIFEST.in", "requirements/*")
FOLDERS = (
    ".github/**/*",
    ".ci/**/*",
    "cmx_kernels/**/*.py",
    "csrc/**/*",
    "tests/**/*",
    "benchmarks/**/*",
    "examples/**/*",
)
TEXT = [p for p in _files(*ROOT_FILES, *FOLDERS) if p.suffix not in (".so", ".pyc", ".png", ".svg", ".safetensors")]
MACHINE = re.compile(r"/(home|root|Users|mnt|work|srv)/\w|[^.\w]/tmp/\w|index-url\s+http|--trusted-host")


def test_no_traces_of_a_machine() -> None:
    """No path of somebody's disk, no address of somebody's package index."""
    found = []
    for path in TEXT:
        for number, line in enumerate(path.read_text(errors="replace").splitlines(), 1):
            if MACHINE.search(line) and "MACHINE =" not in line:
                found.append(f"{_name(path)}:{number}: {line.strip()[:100]}")
    assert not found, "\n".join(found)


def test_loading_is_safe() -> None:
    """Files are read without running code in them; no shell; no network in the package or its build."""
    for path in [*MODULES, ROOT / "setup.py"]:
        if not path.exists():
            continue
        text = path.read_text()
        for call in _calls(path, "load") + _calls(path, "loads"):
            assert not ast.unparse(call.func).startswith("pickle."), f"{_name(path)}:{call.lineno}"
            if ast.unparse(call.func) == "torch.load":
                assert "weights_only=True" in ast.unparse(call), f"{_name(path)}:{call.lineno}"
        for call in _calls(path, "run") + _calls(path, "Popen"):
            assert "shell=True" not in ast.unparse(call), f"{_name(path)}:{call.lineno}"
        assert not _calls(path, "eval") or ".eval()" in text, f"{_name(path)} calls eval"
        assert not _calls(path, "exec"), f"{_name(path)} calls exec"
        roots = {name.split(".")[0] for name in _imports(path)}
        assert not roots & {"urllib", "requests", "httpx", "socket", "marshal"}, _name(path)
