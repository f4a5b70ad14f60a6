"""A fused model in the hands of the rest of PyTorch: copies, files, compilers, transforms, threads, processes."""

import copy
import io
import multiprocessing
import pickle
import threading
from typing import Any

import pytest
import torch
from plain_models import NATIVE, check_against, counted, needs_kernels, paper, timms, trained
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.testing._internal.two_tensor import TwoTensor
from torch.utils._python_dispatch import TorchDispatchMode

from cmx_kernels import ConvMixer, backends, fuse, use

pytestmark = pytest.mark.filterwarnings("ignore:cmx_kernels", "ignore::DeprecationWarning", "ignore::FutureWarning")
X = torch.randn(2, 3, 28, 35, generator=torch.Generator().manual_seed(2))
MAKE = {
    "ours": lambda: ConvMixer(32, 3, 5, 7, 10),
    "timm": lambda: fuse(timms(32, 3, 5, 7, 10)),
    "paper": lambda: fuse(paper(32, 3, 5, 7, 10)),
}


@pytest.fixture(params=MAKE)
def models(request: pytest.FixtureRequest) -> tuple[nn.Module, nn.Module]:
    """A fused model and its equal that never was fused."""
    fused = trained(MAKE[request.param]())
    plain = {"ours": lambda: ConvMixer(32, 3, 5, 7, 10, fused=False), "timm": lambda: timms(32, 3, 5, 7, 10)}.get(
        request.param, lambda: paper(32, 3, 5, 7, 10)
    )()
    plain.load_state_dict(fused.state_dict())
    return fused, plain.eval()


@torch.no_grad()
def test_deepcopy_and_pickle(models: tuple[nn.Module, nn.Module], monkeypatch: pytest.MonkeyPatch) -> None:
    fused, plain = models
    out = fused(X)
    file = io.BytesIO()
    torch.save(fused, file)
    file.seek(0)
    twins = [copy.deepcopy(fused), torch.load(file, weights_only=False), copy.copy(fused)]
    twins += [pickle.loads(pickle.dumps(fused, protocol)) for protocol in (2, pickle.HIGHEST_PROTOCOL)]
    for twin in twins:
        assert type(twin) is type(fused)
        assert list(twin.state_dict()) == list(plain.state_dict())
        with counted(monkeypatch) as calls:
            assert torch.equal(twin(X), out)
        assert len(calls) == NATIVE
    assert len(pickle.dumps(fused)) < 1.2 * len(pickle.dumps(plain)), "packed weights went into the file"


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


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@torch.no_grad()
def test_autocast(models: tuple[nn.Module, nn.Module], dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    fused, plain = models
    before = fused(X)
    with torch.autocast("cpu", dtype), counted(monkeypatch) as calls:
        out, eager = fused(X), plain(X)
        features = fused[:6](X) if isinstance(fused, nn.Sequential) else fused.forward_features(X)
    assert out.dtype == eager.dtype == features.dtype == dtype
    assert len(calls) == 2 * NATIVE
    ref = copy.deepcopy(plain).double()(X.double())
    assert (out - ref).abs().max() <= 2 * (eager - ref).abs().max() + 4 * torch.finfo(dtype).eps * ref.abs().max()
    assert torch.equal(fused(X), before)


def test_autocast_with_gradients(models: tuple[nn.Module, nn.Module]) -> None:
    for model in models:
        with torch.autocast("cpu", torch.bfloat16):
            out = model(X)
        out.float().square().sum().backward()
    for (name, a), b in zip(models[0].named_parameters(), models[1].parameters(), strict=True):
        assert a.grad.dtype == torch.float32
        assert (a.grad - b.grad).norm() <= 0.05 * b.grad.norm() + 1e-3, name


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


class Recorder(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(str(func))
        return func(*args, **(kwargs or {}))


@torch.no_grad()
def test_dispatch_modes_and_dual_numbers(models: tuple[nn.Module, nn.Module]) -> None:
    recorded = []
    tangents = []
    for model in models:
        model(X)
        with Recorder() as recorder:
            model(X)
        recorded.append([name for name in recorder.names if "detach" not in name])
        with forward_ad.dual_level():
            out = model(forward_ad.make_dual(X, torch.ones_like(X)))
            tangents.append(forward_ad.unpack_dual(out).tangent)
    assert recorded[0] == recorded[1]
    torch.testing.assert_close(*tangents)


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


class Marked(Tensor):
    """A tensor subclass that behaves as a tensor."""


@torch.no_grad()
def test_tensor_subclasses(models: tuple[nn.Module, nn.Module]) -> None:
    fused, plain = models
    fused(X)
    out = fused(X.as_subclass(Marked))
    assert type(out) is Marked
    check_against(out.as_subclass(Tensor), plain, X)
    conv = next(m for m in fused.modules() if isinstance(m, nn.Conv2d) and m.groups > 1)
    weight = conv.weight.detach()
    conv._parameters["weight"] = weight.as_subclass(Marked)
    check_against(fused(X).as_subclass(Tensor), plain, X)
    conv._parameters["weight"] = nn.Parameter(TwoTensor(weight, weight.clone()))  # without memory of its own
    check_against(fused(X).a, plain, X)


@torch.no_grad()
def test_replicas_as_data_parallel_makes_them(models: tuple[nn.Module, nn.Module]) -> None:
    """Replicas share the __dict__ entries of the original, and their parameters are plain attributes."""
    fused, plain = models
    fused(X)
    replicas = {module: module._replicate_for_data_parallel() for module in fused.modules()}
    for module, replica in replicas.items():
        for name, child in module._modules.items():
            replica._modules[name] = replicas[child]
        for name, parameter in module._parameters.items():
            setattr(replica, name, parameter.detach() * 0.5)
    for parameter in plain.parameters():
        parameter.mul_(0.5)
    check_against(replicas[fused](X), plain, X)


@torch.no_grad()
def test_two_threads(models: tuple[nn.Module, nn.Module]) -> None:
    fused, plain = models
    images = [torch.randn(n, 3, 28, 28) for n in (1, 2, 3)]
    wanted = [plain(x) for x in images]
    wrong: list[Any] = []

    def work(seed: int) -> None:
        with torch.no_grad():
            for i in range(30):
                k = (i + seed) % 3
                if not torch.allclose(fused(images[k]), wanted[k], atol=1e-5):
                    wrong.append((seed, i))

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def _in_child(model: nn.Module, x: Tensor, queue: Any) -> None:
    with torch.no_grad():
        queue.put(model(x).tolist())


@torch.no_grad()
def test_a_forked_process() -> None:
    """As a worker of a DataLoader: forked after the parent has run, with one thread."""
    model = trained(ConvMixer(32, 2, 5, 7, 10))
    out = model(X)
    torch.set_num_threads(1)  # the child of a process with OpenMP threads may not use them
    context = multiprocessing.get_context("fork")
    queue = context.SimpleQueue()
    child = context.Process(target=_in_child, args=(model, X, queue))
    child.start()
    child.join(60)
    alive = child.is_alive()
    child.kill()
    assert not alive, "the child hangs"
    assert child.exitcode == 0
    torch.testing.assert_close(torch.tensor(queue.get()), out)


@needs_kernels
@torch.no_grad()
def test_switches(models: tuple[nn.Module, nn.Module], monkeypatch: pytest.MonkeyPatch) -> None:
    fused, plain = models
    monkeypatch.setattr(backends, "FUSED", False)
    assert torch.equal(fused(X), plain(X))
    monkeypatch.setattr(backends, "FUSED", True)
    with use("cpu"):
        check_against(fused(X), plain, X)
    with use("reference"):
        assert torch.equal(fused(X), plain(X))
    with use("cuda"), pytest.raises(RuntimeError, match="wants a CUDA tensor"):
        fused(X)
    monkeypatch.setattr(backends, "STRICT", True)
    fused(X)
    with pytest.raises(RuntimeError, match="training mode"):
        fused.train()(X)
