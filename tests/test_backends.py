"""The table of backends: what is selected, what refuses and why, use(), environment variables, a library that fails."""

import importlib.machinery
import shutil
import sys
import warnings
from pathlib import Path

import cases
import pytest
import torch
from compare import check, check_equal
from fresh import PACKAGE, python
from torch._subclasses import FakeTensorMode

import cmx_kernels
from cmx_kernels import backends, cuda, ops, registry
from cmx_kernels.ops.conv_block import ConvOp

HAS_C = registry.C is not None
X = torch.zeros(1, 4, 5, 5)
W = torch.zeros(4, 1, 3, 3)
IMPORT = "import torch; from cmx_kernels import backends, ops, registry; x = torch.ones(1, 4, 5, 5)"
CALL = IMPORT + "; print(ops.depthwise_block(x, x.view(4, 1, 5, 5)).sum())"
SELECT = IMPORT + "; print(backends.select('depthwise_block', x, 'gelu'))"


@pytest.fixture(autouse=True)
def nothing_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backends, "_said", set())


def test_order() -> None:
    """The fastest first, the reference last; the reference takes everything."""
    assert backends.NAMES == ("cuda", "triton", "cpu", "reference")
    assert backends.BACKENDS[-1].why_not("anything", X, "no such activation") is None


@pytest.mark.parametrize("dtype", cases.DTYPES, ids=cases.name)
@pytest.mark.parametrize("op", (*cases.OPS, "block_stack"))
def test_select(op: str, dtype: torch.dtype) -> None:
    assert backends.select(op, X.to(dtype), "gelu", quiet=True) == ("cpu" if HAS_C else "reference")
    assert backends.select(op, X.double(), "gelu") == "reference"


@pytest.mark.parametrize(("capability", "chosen"), [((9, 0), "cuda"), ((8, 0), "reference"), ((12, 0), "reference")])
def test_a_gpu_backend_is_chosen_where_it_was_measured(
    monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], chosen: str
) -> None:
    monkeypatch.setattr(cuda, "why_not", lambda device: None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(cuda, "tried", lambda device: None)
    with FakeTensorMode(allow_non_fake_inputs=True):
        x = torch.empty(1, 4, 5, 5, device="cuda")
    refusals = backends.refusals("depthwise_block", x, "gelu")
    assert backends.select("depthwise_block", x, "gelu", quiet=True) == chosen
    assert ("cuda" in refusals) == (chosen != "cuda")
    assert f"this one, of {capability[0]}.{capability[1]}" in refusals.get("cuda", "this one, of 9.0")
    with backends.use("cuda"):
        assert backends.select("depthwise_block", x, "gelu") == "cuda"
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    assert backends.select("depthwise_block", x, "gelu", quiet=True) == "reference"


def test_every_activation_has_a_cpu_kernel() -> None:
    for act in cases.ACTS:
        assert backends.select("depthwise_block", X, act, quiet=True) == ("cpu" if HAS_C else "reference")


def test_refusals_are_sentences() -> None:
    """One for every backend that does not run the call, with what it got."""
    found = backends.refusals("depthwise_block", X.double(), "gelu")
    assert set(found) == {"cuda", "triton", "cpu"}
    assert "cpu" in found["cuda"] and "CUDA tensor" in found["cuda"]
    assert found["cpu"] == (
        "x is torch.float64, the cpu kernels take float32, float16 and bfloat16" if HAS_C else registry.WHY_NO_C
    )
    meta = backends.refusals("depthwise_block", X.to("meta"), "gelu")
    assert set(meta) == {"cuda", "triton", "cpu"}
    assert not HAS_C or "meta" in meta["cpu"]


@pytest.mark.parametrize("name", ("cuda", "triton"))
@pytest.mark.parametrize("op", cases.OPS)
def test_forced_refusal_lists_every_reason(op: str, name: str) -> None:
    args = cases.inputs(op, cases.RAGGED[op])
    with backends.use(name), pytest.raises(RuntimeError) as caught:
        getattr(ops, op)(*args)
    message = str(caught.value)
    assert message.startswith(f"{op}: the forced backend {name!r} refuses: x is on cpu")
    reasons = backends.refusals(op, args[0], "gelu")
    assert {"cuda", "triton"} <= set(reasons)
    for backend, reason in reasons.items():
        assert f"{backend}: {reason}" in message


@pytest.mark.skipif(not HAS_C, reason=str(registry.WHY_NO_C))
def test_use_runs_what_it_says(monkeypatch: pytest.MonkeyPatch) -> None:
    """use("cpu") calls the dispatcher, use("reference") the reference, seen by replacing both."""
    called: list[str] = []
    module = sys.modules["cmx_kernels.ops.depthwise_block"]
    spy = ConvOp(
        "depthwise_block", module.check, lambda *a: called.append("reference"), lambda *a: called.append("cpu")
    )
    monkeypatch.setattr(module, "_OP", spy)
    for name in ("cpu", "reference", "cpu"):
        with backends.use(name):
            ops.depthwise_block(X, W)
    ops.depthwise_block(X, W)
    ops.depthwise_block(X.double(), W.double())
    assert called == ["cpu", "reference", "cpu", "cpu", "reference"]


def test_use_nests_and_restores() -> None:
    assert backends._forced is None
    with backends.use("reference"):
        with pytest.raises(ZeroDivisionError), backends.use("cuda"):
            assert backends._forced == "cuda"
            raise ZeroDivisionError
        assert backends._forced == "reference"
        assert backends.select("depthwise_block", X, "gelu") == "reference"
    assert backends._forced is None
    assert cmx_kernels.use is backends.use


def test_use_of_an_unknown_name() -> None:
    with (
        pytest.raises(ValueError, match=r"use\(\): got 'gpu', wanted one of cuda, triton, cpu, reference"),
        backends.use("gpu"),
    ):
        pass
    assert backends._forced is None


def test_say_once() -> None:
    """A fall-back warns the first time, with the reason; another message warns again."""
    with pytest.warns(UserWarning, match="cmx_kernels: one"):
        backends.say_once("one")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        backends.say_once("one")
    with pytest.warns(UserWarning, match="cmx_kernels: two"):
        backends.say_once("two")


def test_strict(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backends, "STRICT", True)
    for _ in range(2):
        with pytest.raises(RuntimeError, match=r"CMX_STRICT=1.*a fall-back"):
            backends.say_once("a fall-back")


def test_float64_is_no_fall_back(monkeypatch: pytest.MonkeyPatch) -> None:
    """float64 belongs to the reference: neither a warning nor an error under CMX_STRICT=1."""
    monkeypatch.setattr(backends, "STRICT", True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert ops.depthwise_block(X.double(), W.double()).dtype == torch.float64


@pytest.mark.parametrize("op", cases.OPS)
def test_fused_0(op: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """CMX_FUSED=0 is plain PyTorch, silently, also where a fall-back would be an error."""
    monkeypatch.setattr(backends, "FUSED", False)
    monkeypatch.setattr(backends, "STRICT", True)
    args, expected = cases.problem(op, cases.RAGGED[op])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        out = getattr(ops, op)(*args)
    check(out, expected)
    with backends.use("reference"):
        check_equal(out, getattr(ops, op)(*args))


@pytest.mark.parametrize(
    ("environment", "selected"),
    (
        ({"CMX_BACKEND": "reference"}, "reference"),
        ({"CMX_FUSED": "0"}, "reference"),
        ({"CMX_BACKEND": "", "CMX_FUSED": "1", "CMX_STRICT": "0"}, "cpu" if HAS_C else "reference"),
    ),
    ids=str,
)
def test_environment(environment: dict[str, str], selected: str) -> None:
    done = python(SELECT, **environment)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == selected


def test_environment_forces_a_refusal() -> None:
    done = python(CALL, CMX_BACKEND="cuda")
    assert done.returncode == 1
    assert "the forced backend 'cuda' refuses: x is on cpu" in done.stderr


def test_environment_with_an_unknown_backend() -> None:
    done = python("import cmx_kernels", CMX_BACKEND="gpu")
    assert done.returncode == 1
    assert "ValueError: CMX_BACKEND: got 'gpu', wanted one of cuda, triton, cpu, reference" in done.stderr


def _copy(folder: Path) -> Path:
    """The package's Python files, without a native library."""
    ignored = shutil.ignore_patterns("_C*", "__pycache__", "_build.json")
    return Path(shutil.copytree(PACKAGE, folder / "cmx_kernels", ignore=ignored))


def _plant(package: Path, kind: str) -> None:
    library = package / f"_C{importlib.machinery.EXTENSION_SUFFIXES[0]}"
    if kind == "garbage":
        library.write_bytes(b"this is no ELF file" * 100)
    elif kind == "no module":
        shutil.copy(Path(torch.__file__).parent / "lib" / "libtorch.so", library)
    else:
        (package / "_C.py").write_text(f"raise {kind}('undefined symbol: x')\n")


@pytest.mark.parametrize("kind", ("garbage", "no module", "OSError"))
def test_library_that_does_not_load(tmp_path: Path, kind: str) -> None:
    """A warning with the cause and the way out, and the reference runs; never a failed import."""
    package = _copy(tmp_path)
    _plant(package, kind)
    done = python(CALL, package)
    assert done.returncode == 0, done.stderr
    assert f"the native library does not load in torch {torch.__version__}: " in done.stderr
    assert "rebuild with `pip install .`" in done.stderr
    assert "depthwise_block runs in plain PyTorch" in done.stderr
    with backends.use("reference"):
        assert done.stdout.strip() == str(ops.depthwise_block(torch.ones(1, 4, 5, 5), torch.ones(4, 1, 5, 5)).sum())


def test_library_that_needs_a_missing_module(tmp_path: Path) -> None:
    package = _copy(tmp_path)
    (package / "_C.py").write_text("import no_such_module\n")
    done = python(f"{CALL}; print(registry.WHY_NO_C)", package)
    assert done.returncode == 0, done.stderr
    assert "needs a module that is missing: No module named 'no_such_module'" in done.stdout


def test_no_library(tmp_path: Path) -> None:
    """Without compiled code everything works, says so once, and is an error where CMX_STRICT=1 wants speed."""
    package = _copy(tmp_path)
    done = python(f"{CALL}; {CALL}", package)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("the native library was not built") == 1
    strict = python(CALL, package, CMX_STRICT="1")
    assert strict.returncode == 1
    assert "CMX_STRICT=1): depthwise_block runs in plain PyTorch" in strict.stderr
