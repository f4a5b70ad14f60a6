"""The Triton backend where no GPU is: what it refuses, the kernels interpreted and as compiled for three GPUs."""

import importlib.util
import os
import subprocess
from collections.abc import Callable
from pathlib import Path

import ahead
import pytest
import torch

from cmx_kernels import backends, triton_kernels

TESTS = Path(__file__).resolve().parent
ALL = os.environ.get("CMX_TRITON_TABLE") == "all"
needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs triton: pip install triton")


@ahead.once
def _python(interpreted: bool, *arguments: str) -> subprocess.CompletedProcess[str]:
    """A process of its own: Triton decides at its import whether it interprets."""
    return ahead.run_python(*arguments, TRITON_DEFAULT_FP_FUSION="1", TRITON_INTERPRET=str(int(interpreted)))


def _refusals(x: torch.Tensor, op: str = "depthwise_block", act: str = "gelu") -> str:
    with torch._subclasses.FakeTensorMode(allow_non_fake_inputs=True):
        return str(backends._why_not_triton(op, torch.empty(x.shape, dtype=x.dtype, device="cuda"), act))


def test_refusals(monkeypatch: pytest.MonkeyPatch) -> None:
    """A sentence for every form that is missing; never chosen unless asked for."""
    x = torch.zeros(1, 4, 5, 5)
    assert (
        backends._why_not_triton("depthwise_block", x, "gelu") == "x is on cpu, the triton backend wants a CUDA tensor"
    )
    assert _refusals(x, "block_stack") == "this release has no Triton kernel for block_stack"
    assert _refusals(x.double()) == "x is torch.float64, the Triton kernels take float32, float16 and bfloat16"
    assert _refusals(x, act="square") == "no Triton kernel for the activation 'square'"
    triton = next(b for b in backends.BACKENDS if b.name == "triton")
    assert "slower than cuda" in str(triton.why_not_unasked(x))
    monkeypatch.setattr(triton_kernels, "_INSTALLED", False)
    triton_kernels.load.cache_clear()
    try:
        assert _refusals(x).startswith("triton is not installed: pip install triton")
    finally:
        triton_kernels.load.cache_clear()


@needs_triton
@pytest.mark.skipif(torch.cuda.is_available(), reason="where a GPU is, tests/test_triton_device.py launches kernels")
def test_what_compiles_may_not_launch() -> None:
    """A launch wants a driver, a C compiler and Python's headers; without one of them that is a refusal."""
    code = "from cmx_kernels import triton_kernels as t; t.load(); from cmx_kernels.triton_kernels import launch"
    done = _python(False, "-c", f"{code}; print(t.why_not_arch(90)); print(launch.why_not_launched(0))")
    compiled, launched = done.stdout.splitlines()[-2:]
    assert compiled == "None"
    assert "does not launch a kernel here: " in launched


ARCHS = "from cmx_kernels.triton_kernels import why_not_arch as w; print(*map(w, (75, 80, 90, 990)), sep='\\n')"


@needs_triton
@ahead.needs(_python, False, "-c", ARCHS)
def test_archs() -> None:
    """Found out by compiling: sm_75 is too old for us, sm_990 unknown to Triton."""
    lines = _python(False, "-c", ARCHS).stdout.splitlines()[-4:]
    assert lines[0] == "the GPU is an sm_75, the Triton kernels want sm_80 or newer"
    assert lines[1:3] == ["None", "None"], lines
    assert "does not compile for sm_990" in lines[3]


A_CPU_TENSOR = """
import torch
from cmx_kernels import triton_kernels
assert triton_kernels.load() is None
x = torch.zeros(1, 4, 5, 5)
torch.ops.cmx_triton.depthwise_block(x, x.view(4, 1, 5, 5), None, None, None, "gelu", True)
"""


@needs_triton
@ahead.needs(_python, False, "-c", A_CPU_TENSOR)
def test_a_cpu_tensor() -> None:
    """torch.ops.cmx_triton called by hand: the way out, not Triton's own message."""
    output = _python(False, "-c", A_CPU_TENSOR).stdout
    assert "x: got a tensor on cpu, torch.ops.cmx_triton wants a CUDA tensor; move it with .cuda()" in output


GRAPHS = """
import torch, cases, triton, triton_facts
from torch._subclasses import FakeTensorMode
from torch._functorch.aot_autograd import aot_export_joint_simple
from cmx_kernels import backends, ops, triton_kernels
triton.runtime.driver.set_active(triton_facts.Driver(90))
assert triton_kernels.load() is None
for op in cases.OPS:
    args = cases.inputs(op, cases.RAGGED[op], torch.bfloat16)
    tensors = [a for a in args if isinstance(a, torch.Tensor)]
    rest = [a for a in args if not isinstance(a, torch.Tensor)]
    with FakeTensorMode() as mode, backends.use("triton"):
        fake = [torch.empty(t.shape, dtype=t.dtype, device="cuda") for t in tensors]
        graph = aot_export_joint_simple(lambda *t: (getattr(ops, op)(*t, *rest),), fake, trace_joint=False)
    print(op, sum("triton_kernel_wrapper" in str(node.target) for node in graph.graph.nodes))

T = torch.ops.cmx_triton
def depthwise(x, rows, w, k):
    a, _ = T.depthwise_block_train(x, rows, w, None, "gelu")
    return T.depthwise_block_backward(a, a, k, x, rows, w, "gelu", True, True, True)
def pointwise(x, rows, w, k):
    a, _ = T.pointwise_block_train(x, rows, x, None, w, None, "gelu")
    return T.pointwise_block_backward(a, a, k, x, rows, x, None, w, "gelu", True, True)
for function, weight in ((depthwise, (4, 1, 3, 3)), (pointwise, (4, 4, 1, 1))):
    sizes = (2, 4, 8, 8), (3, 4), weight, (4, 4)
    with FakeTensorMode():
        fake = [torch.empty(s, dtype=torch.bfloat16 if len(s) == 4 else None, device="cuda") for s in sizes]
        graph = aot_export_joint_simple(function, fake, trace_joint=False)
    print("training", function.__name__, sum("triton_kernel_wrapper" in str(n.target) for n in graph.graph.nodes))
"""


@needs_triton
@ahead.needs(_python, False, "-c", GRAPHS)
def test_compiler_sees_the_kernels() -> None:
    """A graph that torch.compile's back end gets holds the Triton kernels, not an opaque operator."""
    output = _python(False, "-c", GRAPHS).stdout
    found = [line for line in output.splitlines() if line.split(" ")[0] in triton_kernels.OPS]
    assert found == ["patch_embed 1", "depthwise_block 1", "pointwise_block 1", "pool_head 1"], output
    found = [line for line in output.splitlines() if line.startswith("training ")]
    assert found == ["training depthwise 8", "training pointwise 6"], output


INTERPRETED = ("-m", "pytest", "-q", "-x", "tests/interpreted")


@needs_triton
@ahead.needs(_python, True, *INTERPRETED)
def test_interpreted() -> None:
    """tests/interpreted, in a process where Triton interprets."""
    done = _python(True, *INTERPRETED)
    assert done.returncode == 0, done.stdout[-6000:]


# The table, every variant for one of the GPUs; with CMX_TRITON_TABLE=all for each of them, which takes minutes
TABLES = [("tests/triton_facts.py", *archs, *([] if ALL else ["--third"])) for archs in (("80",), ("90", "100"))]


def with_facts(test: Callable[..., None]) -> Callable[..., None]:
    for table in TABLES:
        test = ahead.needs(_python, False, *table)(test)
    return needs_triton(test)


@pytest.fixture(scope="module")
def facts() -> list[str]:
    lines: list[str] = []
    for table in TABLES:
        done = _python(False, *table)
        assert done.returncode == 0, done.stdout[-6000:]
        lines = [*(lines or done.stdout.splitlines()[:2]), *done.stdout.splitlines()[2:]]
    return lines


def _rows(lines: list[str]) -> dict[tuple[str, str, str], dict[str, int]]:
    columns = lines[1].split()[3:]
    rows = [(line[:8].strip(), line[8:34].strip(), line[34:68].strip(), line[68:].split()) for line in lines[2:]]
    return {tuple(where): dict(zip(columns, map(int, numbers), strict=True)) for *where, numbers in rows}


@with_facts
def test_nothing_spills(facts: list[str]) -> None:
    for where, fact in _rows(facts).items():
        few = (
            (16, 6) if facts[0] == "triton 3.6.0" and where[2].endswith("bwd") else (0, 0)
        )  # some scalars, see the table
        assert fact["stack"] <= few[0] and fact["local"] <= few[1], f"{where} spills: {fact}"
        most = {"sm_80": 163 << 10, "sm_90": 227 << 10, "sm_100": 227 << 10}[where[0]]
        assert fact["shared"] <= (99 << 10 if where[0] == "sm_80" else most), f"{where}: sm_86 and sm_89 have 99 KB"


@with_facts
def test_instructions(facts: list[str]) -> None:
    """Tensor cores for 16 bits and TF32, asynchronous copies, wide stores; multiply-adds for float32; no atomics."""
    product = {"sm_80": ("HMMA",), "sm_90": ("HGMMA", "HMMA"), "sm_100": ("UTCMMA", "HMMA")}
    for (arch, kernel, variant), fact in _rows(facts).items():
        where = f"{arch} {kernel} {variant}: {fact}"
        assert not fact["ATOM"], f"{where}: sums would depend on the order of programs"
        narrow = variant.split()[0] in ("bf16", "fp16", "tf32")
        if kernel in ("pointwise_fwd", "pointwise_fwd_descriptor", "patch_embed_fwd", "depthwise_fwd_bands"):
            assert narrow == any(fact[i] for i in product[arch]), where
        if kernel == "pointwise_fwd_descriptor":
            assert fact["UTMALDG"] and fact["UTMASTG"] and not fact["HMMA"] and arch != "sm_80", where
        if kernel == "pointwise_fwd" and "2x100x7x7" not in variant:
            assert fact["LDGSTS"] and fact["store16"], where
        if kernel == "depthwise_fwd_bands" and "7x7 5x5" not in variant:
            assert fact["LDGSTS"] and fact["store16"], where
        if kernel == "depthwise_bwd_weight":
            taps = {"9x9": 81, "7x7": 49, "31x31": 64}[variant.split()[2]] // (1 + (arch == "sm_100"))  # FFMA2
            assert fact["FFMA"] >= taps and fact["regs"] <= 168, f"{where}: three blocks of 128 threads"
        if kernel.startswith("training_rows"):
            written = kernel in ("training_rows_sum", "training_rows_gradient")
            assert fact["load16"] and bool(fact["store16"]) == written and fact["regs"] <= 96, where


@with_facts
def test_chained_kernels(facts: list[str]) -> None:
    """Launched early, from compute capability 9.0 on: one without begin_chained would read what is not yet written."""
    for (arch, kernel, variant), fact in _rows(facts).items():
        forward = kernel.startswith(("pointwise_fwd", "patch_embed_fwd", "depthwise_fwd", "pool", "head"))
        wanted = 2 if forward and arch != "sm_80" and "traced" not in variant else 0
        assert (fact["chain"], fact["early"]) == (wanted, 0), f"{arch} {kernel} {variant}: {fact}"


@with_facts
def test_table(facts: list[str]) -> None:
    """Exact for a Triton of which there is a table; another schedules otherwise, and has the rules above only."""
    table = TESTS / f"{facts[0].replace('triton ', 'triton_facts_')}.txt"
    if not table.exists():
        known = sorted(path.name for path in TESTS.glob("triton_facts_*.txt"))
        pytest.skip(f"this is {facts[0]}, of which there is no table ({', '.join(known)})")
    wanted = table.read_text().splitlines()
    if not ALL:
        made = {line[:68] for line in facts}
        wanted = wanted[:2] + [line for line in wanted[2:] if line[:68] in made]
        assert {where[1] for where in _rows(facts)} == {where[1] for where in _rows(table.read_text().splitlines())}
    changed = [f"- {a}\n+ {b}" for a, b in zip(wanted, facts, strict=False) if a != b]
    assert facts == wanted, "\n".join(["meant? python tests/triton_facts.py --write", wanted[1], *changed])
