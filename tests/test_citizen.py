"""A fused model where its users take it: export, AOTInductor, ONNX, meta devices, files, workers, shared weights."""

import copy
import io
from pathlib import Path
from typing import Any

import pytest
import torch
from plain_models import FUSED, NATIVE, check_against, counted, fused_and_plain, needs_kernels, paper, timms, trained
from torch import Tensor, nn

from cmx_kernels import ConvMixer, LargeKernelDepthwiseConv2d, explain, fuse, use

pytestmark = pytest.mark.filterwarnings("ignore:cmx_kernels", "ignore::DeprecationWarning", "ignore::FutureWarning")
X = torch.randn(2, 3, 28, 35, generator=torch.Generator().manual_seed(2))
BATCHES = ({0: torch.export.Dim("n")},)


@pytest.fixture(params=FUSED)
def models(request: pytest.FixtureRequest) -> tuple[nn.Module, nn.Module]:
    return fused_and_plain(request.param)


def _called(program: torch.export.ExportedProgram) -> list[str]:
    return [str(node.target).split(".")[1] for node in program.graph.nodes if str(node.target).startswith("cmx.")]


@needs_kernels
@pytest.mark.parametrize(("name", "strict"), [*((name, False) for name in FUSED), ("ours", True)])
@torch.no_grad()
def test_export_keeps_a_forced_backend(name: str, strict: bool) -> None:
    """By default a program holds PyTorch's operators alone, see test_tracing; use() keeps ours, through a file too."""
    fused, plain = fused_and_plain(name)
    with use("cpu"):
        program = torch.export.export(fused, (X,), dynamic_shapes=BATCHES, strict=strict)
    assert _called(program) == ["patch_embed", *3 * ["depthwise_block", "pointwise_block"]]
    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    x = torch.cat([X, X])
    check_against(torch.export.load(file).module()(x), plain, x)
    with use("reference"):
        assert not _called(torch.export.export(fused, (X,), strict=strict))


@needs_kernels
@pytest.mark.parametrize("compiled", [False, True])
@torch.no_grad()
def test_a_stem_side_by_side_is_one_operator(compiled: bool) -> None:
    """The paper's first three modules, where no single call takes the network: in a graph, or of another activation."""
    plain = trained(paper(32, 3, 5, 7, 10))
    if not compiled:
        plain[1] = nn.ReLU()
    fused = fuse(copy.deepcopy(plain))
    assert [row.backend for row in explain(fused, X)][:6] == ["cpu"] * 6
    run = torch.compile(fused, backend="eager", fullgraph=True) if compiled else fused
    run(X)
    with torch.profiler.profile() as profile:
        out = run(X)
    check_against(out, plain, X)
    names = [event.key for event in profile.key_averages()]
    assert ("cmx::patch_embed" in names, "aten::conv2d" in names) == (True, False)


def _layers() -> tuple[nn.Module, nn.Module, Tensor, list[str]]:
    layer, plain = LargeKernelDepthwiseConv2d(8, 5).eval(), nn.Conv2d(8, 8, 5, padding="same", groups=8).eval()
    plain.load_state_dict(layer.state_dict())
    return layer, plain, torch.randn(2, 8, 9, 7), ["depthwise_block"]


def _networks() -> tuple[nn.Module, nn.Module, Tensor, list[str]]:
    return *fused_and_plain("ours"), X, ["patch_embed", *3 * ["depthwise_block", "pointwise_block"]]


AOT = {"layer": _layers, "network": _networks}


@needs_kernels
@pytest.mark.slow
@pytest.mark.parametrize("name", AOT)
@torch.no_grad()
def test_aot_inductor(name: str, tmp_path: Path) -> None:
    """The compiled program calls the operators of _C through the dispatcher, for any batch."""
    fused, plain, x, called = AOT[name]()
    with use("cpu"):
        program = torch.export.export(fused, (x,), dynamic_shapes=BATCHES)
    assert _called(program) == called
    quick = {"aot_inductor.compile_wrapper_opt_level": "O0", "cpp.enable_kernel_profile": False}
    path = str(tmp_path / "program.pt2")
    torch._inductor.aoti_compile_and_package(program, package_path=path, inductor_configs=quick)
    loaded = torch._inductor.aoti_load_package(path)
    for given in (x, torch.cat([x, -x])):
        check_against(loaded(given), plain, given)


@torch.no_grad()
def test_onnx_export_takes_the_plain_path(models: tuple[nn.Module, nn.Module]) -> None:
    pytest.importorskip("onnxscript", reason="torch.onnx.export needs it: pip install onnxscript")
    program = torch.onnx.export(models[0], (X,), dynamo=True, verbose=False)
    kinds = {node.op_type for node in program.model.graph}
    assert {node.domain for node in program.model.graph} == {""}
    assert "Conv" in kinds
    (name,) = [value.name for value in program.model_proto.graph.input]
    runner = pytest.importorskip("onnx.reference").ReferenceEvaluator(program.model_proto)
    check_against(torch.from_numpy(runner.run(None, {name: X.numpy()})[0]), models[1], X)


@torch.no_grad()
def test_meta_device(models: tuple[nn.Module, nn.Module]) -> None:
    """Built without memory, then given some, or given the tensors of a checkpoint; both ways run fused."""
    fused, plain = models
    for assign in (False, True):
        with torch.device("meta"):
            empty = fuse(copy.deepcopy(plain).to("meta"))
            assert empty(X.to("meta")).shape == (2, 10)
        if not assign:
            assert empty.to_empty(device="cpu") is empty
        empty.load_state_dict(fused.state_dict(), assign=assign)
        assert torch.equal(empty(X), fused(X))
    with torch.device("meta"):
        net = ConvMixer(32, 3, 5, 7, 10)
    assert {p.device.type for p in net.parameters()} == {"meta"}


@torch.no_grad()
def test_safetensors(models: tuple[nn.Module, nn.Module], tmp_path: Path) -> None:
    safetensors = pytest.importorskip("safetensors.torch")
    fused, plain = models
    out = fused(X)
    safetensors.save_model(fused, str(tmp_path / "net.safetensors"))
    other = fuse(copy.deepcopy(plain))
    for parameter in other.parameters():
        parameter.zero_()
    other(X)
    assert safetensors.load_model(other, str(tmp_path / "net.safetensors")) == (set(), [])
    assert torch.equal(other(X), out), "packed weights are those from before the load"
    assert set(safetensors.load_file(tmp_path / "net.safetensors")) == set(plain.state_dict())


class Images(torch.utils.data.Dataset):
    """Features that are computed in the workers."""

    def __init__(self, model: nn.Module, x: Tensor) -> None:
        self.model, self.x = model, x

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, i: int) -> Tensor:
        with torch.no_grad():
            return self.model(self.x[i : i + 1])[0]


@torch.no_grad()
def test_workers_of_a_data_loader() -> None:
    """Started afresh, so that the model travels by pickle; test_drop_in has the forked ones."""
    model = trained(ConvMixer(32, 2, 5, 7, 10))
    out = model(X)
    loader = torch.utils.data.DataLoader(Images(model, X), batch_size=2, num_workers=1, multiprocessing_context="spawn")
    (batch,) = loader
    torch.testing.assert_close(batch, out)


SHARING: dict[str, Any] = {
    "one weight in two blocks": lambda net: setattr(net[4][1], "weight", net[3][1].weight),
    "one BatchNorm in two blocks": lambda net: net[4].__setitem__(3, net[3][3]),
    "one block twice": lambda net: net.__setitem__(4, net[3]),
}


@pytest.mark.parametrize("how", SHARING)
def test_weights_shared_between_modules(how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fused in one call, with the gradients of both uses, and a change is seen in both."""
    plain = paper(32, 3, 5, 7, 10)
    SHARING[how](plain)
    trained(plain)
    fused = fuse(copy.deepcopy(plain), strict=True)
    with torch.no_grad(), counted(monkeypatch) as calls:
        check_against(fused(X), plain, X)
        for model in (fused, plain):
            model[3][1].weight.mul_(1.5)
            model[3][3].running_mean.add_(0.5)
        check_against(fused(X), plain, X)
    assert len(calls) == 2 * NATIVE
    for model in (fused, plain):
        model(X).square().sum().backward()
    for (name, a), b in zip(fused.named_parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-4, atol=1e-4, msg=lambda m, name=name: f"{name}: {m}")


@torch.no_grad()
def test_two_models_on_the_same_weights() -> None:
    """As an EMA or a teacher built on views does: a change through one is seen by the other."""
    plain = trained(timms(32, 2, 5, 7, 10))
    other = timms(32, 2, 5, 7, 10).eval()
    other.load_state_dict(plain.state_dict(keep_vars=True), assign=True)
    fuse(other)
    check_against(other(X), plain, X)
    plain.blocks[0][1].weight.mul_(2)
    check_against(other(X), plain, X)
