"""A fused model under torch.compile, export, TorchScript, fx, transforms and counters of operators."""

import pickle
from typing import Any

import pytest
import torch
from called import Called
from plain_models import FUSED, NATIVE, check_against, counted, fused_and_plain, needs_kernels
from torch import nn
from torch.autograd import forward_ad
from torch.overrides import TorchFunctionMode

from cmx_kernels import ConvMixer, LargeKernelDepthwiseConv2d, cuda, registry, use
from cmx_kernels.models import structure

pytestmark = pytest.mark.filterwarnings("ignore:cmx_kernels", "ignore::DeprecationWarning", "ignore::FutureWarning")
X = torch.randn(2, 3, 28, 35, generator=torch.Generator().manual_seed(2))


@pytest.fixture(params=FUSED)
def models(request: pytest.FixtureRequest) -> tuple[nn.Module, nn.Module]:
    return fused_and_plain(request.param)


@pytest.mark.parametrize("strict", [False, True])
@torch.no_grad()
def test_export_sees_the_plain_model(models: tuple[nn.Module, nn.Module], strict: bool) -> None:
    fused, plain = models
    fused(X)
    program = torch.export.export(fused, (X,), dynamic_shapes=({0: torch.export.Dim("n")},), strict=strict)
    assert not [node for node in program.graph.nodes if "cmx" in str(node.target)]
    x = torch.cat([X, X])
    torch.testing.assert_close(program.module()(x), plain(x))


@torch.no_grad()
def test_torchscript_and_fx_see_the_plain_model(models: tuple[nn.Module, nn.Module]) -> None:
    fused, plain = models
    classes = [type(m) for m in fused.modules()]
    traced = torch.jit.trace(fused, X)
    scripted = torch.jit.script(fused)
    graph = torch.fx.symbolic_trace(fused)
    for other in (traced, scripted, graph):
        assert "cmx::" not in str(getattr(other, "inlined_graph", getattr(other, "graph", "")))
        assert torch.equal(other(X), plain(X))
    assert [type(m) for m in fused.modules()] == classes
    check_against(fused(X), plain, X)


def test_compile(models: tuple[nn.Module, nn.Module]) -> None:
    """One graph, of which our operators are part, for all batch sizes but the first."""
    from torch._dynamo.testing import CompileCounterWithBackend

    fused, plain = models
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(fused, fullgraph=True, backend=counter)
    with torch.no_grad():
        for n in (2, 3, 4, 7, 9):
            x = torch.randn(n, 3, 28, 35)
            check_against(compiled(x), plain, x)
    assert counter.frame_count <= 2
    called = [str(node.target) for node in counter.graphs[-1].graph.nodes]
    assert any("depthwise_block" in target for target in called) == NATIVE
    compiled(X).sum().backward()
    plain(X).sum().backward()
    for (name, a), b in zip(fused.named_parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-4, atol=1e-4, msg=name)
    for model in (fused, plain):
        model.train()
    compiled(X), plain(X)
    for (name, a), b in zip(fused.state_dict().items(), plain.state_dict().values(), strict=True):
        torch.testing.assert_close(a, b, msg=name)
    torch._dynamo.reset()


@torch.no_grad()
def test_compile_straight_from_a_file(models: tuple[nn.Module, nn.Module]) -> None:
    """In a process that has not seen the residual's class yet."""
    fused, plain = models
    data = pickle.dumps(fused)
    structure._ADDS_INPUT.clear()
    torch._dynamo.reset()
    compiled = torch.compile(pickle.loads(data), fullgraph=True, backend="eager")
    check_against(compiled(X), plain, X)


@torch.no_grad()
def test_transforms_of_torch_func(models: tuple[nn.Module, nn.Module]) -> None:
    fused, plain = models
    fused(X)
    state = {name: tensor * 1.1 for name, tensor in plain.state_dict().items() if tensor.is_floating_point()}
    torch.testing.assert_close(
        torch.func.functional_call(fused, state, X), torch.func.functional_call(plain, state, X), rtol=1e-4, atol=1e-5
    )
    for model in models:
        model.requires_grad_(False)
    got, wanted = (torch.vmap(model)(X[:, None]) for model in models)
    torch.testing.assert_close(got, wanted)
    got, wanted = (torch.func.jvp(model, (X,), (torch.ones_like(X),))[1] for model in models)
    torch.testing.assert_close(got, wanted)
    with torch.enable_grad():
        got, wanted = (torch.func.grad(lambda x, model=model: model(x).sum())(X) for model in models)
    torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-6)


@torch.no_grad()
def test_dispatch_modes_and_dual_numbers(models: tuple[nn.Module, nn.Module]) -> None:
    recorded = []
    tangents = []
    for model in models:
        model(X)
        with Called() as recorder:
            model(X)
        recorded.append([name for name in recorder.names if "detach" not in name])
        with forward_ad.dual_level():
            out = model(forward_ad.make_dual(X, torch.ones_like(X)))
            tangents.append(forward_ad.unpack_dual(out).tangent)
    assert recorded[0] == recorded[1]
    torch.testing.assert_close(*tangents)


class Doubling(TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        return 2 * out if func is nn.functional.conv2d else out


@torch.no_grad()
def test_function_modes(models: tuple[nn.Module, nn.Module], monkeypatch: pytest.MonkeyPatch) -> None:
    """A mode sees the functions of the plain model; a default device is none that anybody would see."""
    layers = nn.Conv2d(3, 3, 7, padding=3, groups=3), LargeKernelDepthwiseConv2d(3, 7)
    layers[1].load_state_dict(layers[0].state_dict())
    for fused, plain in (models, layers[::-1]):
        before = fused(X)
        with Doubling():
            assert torch.equal(fused(X), plain(X))
        with torch.device("cpu"):
            assert torch.equal(fused(X), before)
    with torch.device("cpu"), counted(monkeypatch) as calls:
        models[0](X)
    assert len(calls) == NATIVE


@torch.no_grad()
def test_flops_are_those_of_the_plain_model(models: tuple[nn.Module, nn.Module]) -> None:
    from torch.utils.flop_counter import FlopCounterMode

    counts = []
    for model in models:
        model(X)
        with FlopCounterMode(display=False) as counter:
            model(X)
        counts.append(counter.get_total_flops())
    assert counts[0] == counts[1] > 0


def on_a_fake_gpu(model: nn.Module) -> nn.Module:
    """To be called in a FakeTensorMode: parameters and buffers without memory, on a device that need not exist."""
    for module in model.modules():
        for tensors, make in ((module._parameters, nn.Parameter), (module._buffers, lambda t, needs_grad: t)):
            for name, tensor in tensors.items():
                if tensor is not None:
                    tensors[name] = make(torch.empty(tensor.shape, dtype=tensor.dtype, device="cuda"), False)
    return model


@needs_kernels
@torch.no_grad()  # a node of autograd, and so training, wants a real device
def test_compile_for_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """One graph of our operators where the CUDA backend is forced, also where there is no GPU."""
    from torch._dynamo.testing import EagerAndRecordGraphs
    from torch._subclasses import FakeTensorMode

    monkeypatch.setattr(cuda, "why_not", registry.constant(lambda device: None))
    model = ConvMixer(32, 3, 5, 7, 10, device="meta").eval()
    torch._dynamo.reset()
    recorded = EagerAndRecordGraphs()
    with FakeTensorMode(allow_non_fake_inputs=True), use("cuda"):
        x = torch.empty(2, 3, 28, 35, device="cuda")
        y = torch.compile(on_a_fake_gpu(model), fullgraph=True, backend=recorded)(x)
    torch._dynamo.reset()
    assert (y.shape, y.device.type) == ((2, 10), "cuda")
    (graph,) = recorded.graphs
    called = [str(node.target) for node in graph.graph.nodes if node.op == "call_function"]
    found = [name.split(".")[1] for name in called if name.startswith("cmx.")]
    assert found == ["patch_embed", *3 * ["depthwise_block", "pointwise_block"]]
    assert not [name for name in called if "conv2d" in name or "batch_norm" in name]
