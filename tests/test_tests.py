"""Every test asserts something, every skip has a reason that a reader can act on."""

import ast
import re
from pathlib import Path

import cases
import pytest
import torch
from conftest import Runner
from torch._subclasses.fake_tensor import FakeTensorMode

from cmx_kernels import cuda

TESTS = sorted(Path(__file__).parent.rglob("test_*.py"))
ASSERTING = re.compile(r"^_?(check|refused|assert|same|expect)|^(raises|warns|fail|gradcheck|gradgradcheck)$")


def _name(value: object) -> str | None:
    return value.name if isinstance(value, Path) else None


def _called(node: ast.AST) -> set[str]:
    return {ast.unparse(n.func).split(".")[-1] for n in ast.walk(node) if isinstance(n, ast.Call)}


def _asserts(node: ast.AST) -> bool:
    return any(isinstance(n, ast.Assert) for n in ast.walk(node)) or any(map(ASSERTING.search, _called(node)))


@pytest.mark.parametrize("path", TESTS, ids=_name)
def test_every_test_asserts(path: Path) -> None:
    functions = {n.name: n for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, ast.FunctionDef)}
    helpers = {name for name, node in functions.items() if _asserts(node)}
    for name, node in functions.items():
        if name.startswith("test_"):
            assert name in helpers or _called(node) & helpers, f"{path.name}: {name} asserts nothing"


@pytest.mark.parametrize("path", TESTS, ids=_name)
def test_every_skip_has_a_reason(path: Path) -> None:
    for node in ast.walk(ast.parse(path.read_text())):
        if not isinstance(node, ast.Call):
            continue
        called = ast.unparse(node.func)
        if called in ("pytest.mark.skip", "pytest.mark.skipif", "pytest.mark.xfail"):
            assert any(k.arg == "reason" for k in node.keywords), (
                f"{path.name}:{node.lineno}: {called} without a reason"
            )
        if called in ("pytest.skip", "pytest.xfail"):
            assert node.args or node.keywords, f"{path.name}:{node.lineno}: {called} without a reason"
        assert called != "time.sleep" or ast.unparse(node.args[0]) < "0.1", (
            f"{path.name}:{node.lineno}: a test that waits"
        )


@pytest.mark.parametrize("layout", cases.LAYOUTS)
def test_layouts_stay_on_their_device(layout: str) -> None:
    """Or a test of a GPU would hand the kernels a tensor of the CPU."""
    x = torch.empty(2, 3, 4, 5, device="meta")
    assert cases.LAYOUTS[layout](x).device == x.device


def test_gpu_backends_are_tested_where_they_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """A backend that is never chosen by itself is no reason to skip its tests."""
    with FakeTensorMode():
        x = torch.empty(1, 2, 3, 4, device="cuda")
        monkeypatch.setattr(Runner, "_place", lambda self, args: [x])
        for answer in (None, "there is no GPU"):
            monkeypatch.setattr(cuda, "why_not", lambda device, answer=answer: answer)
            assert Runner("cuda").why_not("depthwise_block", x) == answer
