"""tune: what is measured is kept, used where it was measured and nowhere else, right, and never slower than eager."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from plain_models import check_against, counted, fused_and_plain, needs_kernels, paper, trained
from torch import nn

from cmx_kernels import ConvMixer, LargeKernelDepthwiseConv2d, backends, explain, fuse, registry, tune, tuned, use
from cmx_kernels.ops import depthwise_packed

X = torch.randn(2, 3, 28, 28, generator=torch.Generator().manual_seed(2))
PATCHES = torch.randn(2, 32, 4, 4)
module = sys.modules["cmx_kernels.tune"]


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    tuned.forget()
    yield
    tuned.forget()


@pytest.fixture
def speeds(monkeypatch: pytest.MonkeyPatch) -> dict[str, float]:
    """Seconds that the stop-watch shows for a backend, instead of what it takes."""
    shown = {"cpu": 1.0, "reference": 2.0}
    monkeypatch.setattr(module, "_seconds", lambda one, name, calls: shown[name])
    return shown


def _net() -> nn.Module:
    return trained(ConvMixer(32, 2, 5, 7, 10))


@needs_kernels
@torch.no_grad()
def test_the_faster_one_runs_and_results_stay_right(speeds: dict[str, float], monkeypatch: pytest.MonkeyPatch) -> None:
    fused, plain = fused_and_plain("ours")
    for fast in ("cpu", "reference"):
        speeds[fast] = 0.5 * min(speeds.values())
        report = tune(fused, X)
        assert {row.backend for row in report} == {fast} and not report.refusals
        assert {row.kernel for row in report} == {"block_stack", "patch_embed", "depthwise_block", "pointwise_block"}
        with counted(monkeypatch) as calls:
            check_against(fused(X), plain, X)
        assert len(calls) == (fast == "cpu")
    assert torch.equal(fused(X), plain(X)), "eager was measured as the fastest"
    assert "tune() measured reference as faster" in str(explain(fused, X))
    with counted(monkeypatch) as calls:
        fused(X[:1]), fused(X.repeat(2, 1, 1, 1))
    assert len(calls) == 2, "other shapes keep the usual order"
    with use("cpu"), counted(monkeypatch) as calls:
        fused(X)
    assert len(calls) == 1, "use() is stronger than a measurement"


@needs_kernels
@torch.no_grad()
def test_in_a_compiled_graph(speeds: dict[str, float]) -> None:
    """Where all shapes that were measured agree; without a break, and still one graph for all batches."""
    from torch._dynamo.testing import CompileCounterWithBackend

    layer, x = LargeKernelDepthwiseConv2d(8, 5).eval(), torch.randn(2, 8, 9, 9)
    plain = nn.Conv2d(8, 8, 5, padding=2, groups=8)
    plain.load_state_dict(layer.state_dict())
    for fast, kernels in (("reference", 0), ("cpu", 1)):
        speeds[fast] = 0.5 * min(speeds.values())
        tune(layer, x)
        torch._dynamo.reset()
        counter = CompileCounterWithBackend("aot_eager")
        compiled = torch.compile(layer, fullgraph=True, backend=counter)
        for n in (2, 3, 5):
            torch.testing.assert_close(compiled(torch.cat([x] * n)), plain(torch.cat([x] * n)))
        assert counter.frame_count <= 2
        called = [str(node.target) for node in counter.graphs[0].graph.nodes]
        assert sum("cmx.depthwise_block" in target for target in called) == kernels
    speeds["reference"] = 0.1
    tune(layer, x[:1])
    assert not tuned.agreed, "one batch prefers the kernel, the other PyTorch"


@needs_kernels
@torch.no_grad()
def test_a_wrong_backend_is_never_kept(speeds: dict[str, float], monkeypatch: pytest.MonkeyPatch) -> None:
    layer = LargeKernelDepthwiseConv2d(8, 5).eval()
    real = depthwise_packed.depthwise_packed
    monkeypatch.setattr("cmx_kernels.layers.depthwise_packed", lambda *a: real(*a) * 1.001)
    (row,) = tune(layer, torch.randn(2, 8, 9, 9))
    assert row.backend == "reference"
    assert "wrong by" in row.refusals["cpu"]

    def fails(*_: object) -> None:
        raise RuntimeError("out of shared memory\nmore lines")

    monkeypatch.setattr("cmx_kernels.layers.depthwise_packed", fails)
    (row,) = tune(layer, torch.randn(2, 8, 9, 9))
    assert (row.backend, row.refusals["cpu"]) == ("reference", "it fails: out of shared memory; please report it")


IN_A_NEW_PROCESS = """
import torch
from cmx_kernels import LargeKernelDepthwiseConv2d, backends, tuned
x = torch.zeros(2, 8, 9, 9)
torch.set_num_threads(2)
with torch.no_grad():
    print(backends.select("depthwise_block", x, "none", weight=(8, 1, 5, 5)))
"""


@needs_kernels
def test_the_next_process_knows(speeds: dict[str, float], tmp_path: Path) -> None:
    speeds["reference"] = 0.1
    tune(LargeKernelDepthwiseConv2d(8, 5).eval(), torch.zeros(2, 8, 9, 9))
    (file,) = (tmp_path / "cmx_kernels").iterdir()
    done = subprocess.run([sys.executable, "-c", IN_A_NEW_PROCESS], env=os.environ, capture_output=True, text=True)
    assert done.stdout.strip() == "reference", done.stderr
    assert json.loads(file.read_text())["version"] == tuned.VERSION


def _loaded() -> str:
    tuned.forget()
    tuned.load()
    with torch.no_grad():
        return backends.select("depthwise_block", torch.zeros(2, 8, 9, 9), "none", weight=(8, 1, 5, 5))


@needs_kernels
@pytest.mark.filterwarnings("ignore:cmx_kernels")
@pytest.mark.parametrize("what", ["torch", "triton", "library", "sources", "name", "isa", "cores"])
def test_another_machine_does_not_count(what: str, speeds: dict[str, float], tmp_path: Path) -> None:
    """Neither does another torch, driver or build; their entries stay in the file when new ones are added."""
    speeds["reference"] = 0.1
    layer, x = LargeKernelDepthwiseConv2d(8, 5).eval(), torch.zeros(2, 8, 9, 9)
    tune(layer, x)
    assert _loaded() == "reference"
    file = tuned.cache_file()
    content = json.loads(file.read_text())
    content["machines"][0]["machine"][what] = "another"
    file.write_text(json.dumps(content))
    assert _loaded() == "cpu"
    tune(layer, x)
    assert _loaded() == "reference"
    assert len(json.loads(file.read_text())["machines"]) == 2
    content["version"] = 99
    file.write_text(json.dumps(content))
    assert _loaded() == "cpu"


def test_what_makes_a_machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The driver of a GPU, the version of Triton, the Python of the package: each makes it another one."""
    gpu = SimpleNamespace(name="a GPU", total_memory=1)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: gpu)
    monkeypatch.setattr(torch._C, "_cuda_getDriverVersion", lambda: 13000, raising=False)
    package = tmp_path / "package"
    shutil.copytree(Path(tuned.__file__).parent, package, ignore=shutil.ignore_patterns("_C*", "__pycache__"))
    assert tuned.sources(package) == tuned.sources(Path(tuned.__file__).parent)
    monkeypatch.setattr(tuned, "__file__", str(package / "tuned.py"))
    kernel = package / "triton_kernels" / "pool_head.py"

    def changed() -> set[str]:
        tuned.machine.cache_clear()
        return {key for key, value in tuned.machine("cuda:0").items() if value != before[key]}

    tuned.machine.cache_clear()
    before = tuned.machine("cuda:0")
    assert changed() == set()
    monkeypatch.setattr(torch._C, "_cuda_getDriverVersion", lambda: 13010)
    assert changed() == {"driver"}
    monkeypatch.setattr(metadata, "version", lambda name: "99.0")
    assert changed() == {"driver", "triton"}
    kernel.write_text(kernel.read_text().replace(" + ", " - ", 1))
    assert changed() == {"driver", "triton", "sources"}
    kernel.rename(package / "pool_head.py")
    monkeypatch.setattr(registry, "C", None)
    assert changed() == {"driver", "triton", "sources", "library"}
    tuned.machine.cache_clear()


@needs_kernels
def test_threads_count(speeds: dict[str, float]) -> None:
    speeds["reference"] = 0.1
    tune(LargeKernelDepthwiseConv2d(8, 5).eval(), torch.zeros(2, 8, 9, 9))
    assert _loaded() == "reference"
    torch.set_num_threads(1)
    assert _loaded() == "cpu"


@pytest.mark.parametrize(
    "content", ["", "[]", "{}", '{"version": 1}', '{"version": 1, "machines": [{"machine": {"device": "cpu"}}]}']
)
def test_damaged_files_are_ignored_with_a_warning(content: str) -> None:
    file = tuned.cache_file()
    file.parent.mkdir(parents=True)
    file.write_text(content)
    with pytest.warns(UserWarning, match=r"cannot be read.*delete it and call tune\(\) again"):
        tuned.load()
    assert not tuned.choices


@needs_kernels
def test_a_folder_that_cannot_be_written(speeds: dict[str, float], tmp_path: Path) -> None:
    (tmp_path / "cmx_kernels").write_text("a file in the way")
    speeds["reference"] = 0.1
    with pytest.warns(UserWarning, match="holds for this process only"):
        tune(LargeKernelDepthwiseConv2d(8, 5).eval(), torch.zeros(2, 8, 9, 9))
    assert len(tuned.choices) == 1


@pytest.mark.filterwarnings("ignore:cmx_kernels")
@torch.no_grad()
def test_really_measured() -> None:
    """No stop-watch of the test: something is chosen, in a layout, a dtype and a network of other hands."""
    net = fuse(trained(paper(32, 2, 5, 7, 10)))
    with torch.autocast("cpu", torch.bfloat16):
        report = tune(net, X.contiguous(memory_format=torch.channels_last))
        out = net(X.contiguous(memory_format=torch.channels_last))
    assert torch.isfinite(out).all()
    assert {"depthwise_block", "pointwise_block"} <= {row.kernel for row in report}
    assert [row.kernel for row in report].count("block_stack") == 2, "the network, and one of its equal blocks"
    for row in report:
        times = {entry.split()[0]: float(entry.split()[1]) for entry in row.note.split(", ")}
        assert min(times, key=lambda name: times[name]) == row.backend or len(set(times.values())) < len(times)
        assert "reference" in times
    blocks = fuse(nn.Sequential(nn.ReLU(), *list(trained(paper(32, 2, 5, 7, 10)))[3:5])).eval()
    assert len(tune(blocks, PATCHES)) >= 2


def test_errors() -> None:
    with pytest.raises(TypeError, match=r"model: got str, wanted an nn\.Module"):
        tune("model", X)
    with pytest.raises(ValueError, match=r"wanted eval mode.*call \.eval\(\)"):
        tune(_net().train(), X)
    with pytest.raises(ValueError, match=r"without fused parts; call cmx_kernels\.fuse"):
        tune(paper(8, 1, 3, 7, 2).eval(), X)
