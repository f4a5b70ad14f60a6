"""A fused model in the hands of the rest of PyTorch: copies, files, autocast, subclasses, threads, processes."""

import copy
import io
import multiprocessing
import pickle
import threading
from typing import Any

import pytest
import torch
from plain_models import FUSED, NATIVE, check_against, counted, fused_and_plain, needs_kernels, trained
from torch import Tensor, nn
from torch.testing._internal.two_tensor import TwoTensor

from cmx_kernels import ConvMixer, backends, use

pytestmark = pytest.mark.filterwarnings("ignore:cmx_kernels", "ignore::DeprecationWarning", "ignore::FutureWarning")
X = torch.randn(2, 3, 28, 35, generator=torch.Generator().manual_seed(2))


@pytest.fixture(params=FUSED)
def models(request: pytest.FixtureRequest) -> tuple[nn.Module, nn.Module]:
    return fused_and_plain(request.param)


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


@torch.no_grad()
def test_defaults_of_the_process(models: tuple[nn.Module, nn.Module]) -> None:
    fused, plain = models
    try:
        torch.set_default_dtype(torch.float64)
        check_against(fused(X), plain, X)
    finally:
        torch.set_default_dtype(torch.float32)
    with torch.device("meta"):
        fused.blocks[0][1].weight.mul_(2) if hasattr(fused, "blocks") else fused[3][1].weight.mul_(2)
        out = fused(X)
    plain.load_state_dict(fused.state_dict())
    check_against(out, plain, X)


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
    fused.train()(X)
    with pytest.raises(RuntimeError, match="training mode"):
        fused.double()(X.double())
