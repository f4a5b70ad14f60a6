"""Two processes with gloo against one process with the whole batch."""

import copy
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from plain_models import one_step
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from training_twins import DEPTH, fused_step, nodes, norms, twins

pytestmark = [
    pytest.mark.filterwarnings("ignore"),
    pytest.mark.skipif(not (dist.is_available() and dist.is_gloo_available()), reason="this torch has no gloo"),
]
BATCH = 8
X = torch.randn(BATCH, 3, 28, 21, generator=torch.Generator().manual_seed(2))
LR = 0.05
SHARES = {"even": [4, 4], "uneven": [5, 3], "one_value": [7, 1]}


def loss_of(y: Tensor) -> Tensor:
    """A sum over images, so that the whole batch is the sum of its parts."""
    target = torch.linspace(-1, 1, y.shape[1], dtype=y.dtype)
    return ((y - target) ** 2).sum() / BATCH


def synchronised(model: nn.Module) -> nn.Module:
    return nn.SyncBatchNorm.convert_sync_batchnorm(model)


def train(model: nn.Module, parts: list[Tensor], steps: int = 2, scale: float = 1.0) -> None:
    """SGD; each step accumulates over the parts, without synchronisation of gradients before the last of them."""
    optimizer = torch.optim.SGD(model.parameters(), LR)
    for _ in range(steps):
        optimizer.zero_grad()
        for i, part in enumerate(parts):
            last = i == len(parts) - 1
            if hasattr(model, "require_backward_grad_sync"):
                model.require_backward_grad_sync = last  # what no_sync() sets
            (loss_of(model(part)) * scale).backward()
        optimizer.step()


def shards(rank: int, shares: list[int]) -> Tensor:
    return X.split(shares)[rank]


def ddp(rank: int, shares: list[int], stride: int = 1) -> dict[str, Tensor]:
    """DistributedDataParallel takes the mean over processes, hence the scale.

    It refuses a SyncBatchNorm on the CPU, where PyTorch's own does not run; a fused one does: converted afterwards.
    """
    model = twins("ours")[0]
    wrapped = DistributedDataParallel(model)
    synchronised(model)
    mine = shards(rank, shares)
    train(wrapped, [mine[i::stride] for i in range(stride)], scale=2.0)
    y = model(mine)
    assert sum(name.startswith("BlockBackward") for name in nodes(y)) == DEPTH
    return model.state_dict()


def fsdp(rank: int, shares: list[int]) -> dict[str, Tensor]:
    """Parameters in shards; each block and the model gather their own."""
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
    from torch.distributed.fsdp import fully_shard

    model = synchronised(twins("ours")[0])
    mesh = dist.init_device_mesh("cpu", (2,))
    for block in model.blocks:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    train(model, [shards(rank, shares)], scale=2.0)
    y = model(shards(rank, shares))
    assert sum(name.startswith("BlockBackward") for name in nodes(y)) == DEPTH
    return get_model_state_dict(model, options=StateDictOptions(full_state_dict=True))


def local(rank: int, shares: list[int]) -> dict[str, Tensor]:
    """Without SyncBatchNorm every process keeps statistics of its own; gradients are averaged all the same."""
    model = twins("ours")[0]
    wrapped = DistributedDataParallel(model, broadcast_buffers=False)
    train(wrapped, [shards(rank, shares)], steps=1, scale=2.0)
    return model.state_dict()


SCENARIOS: dict[str, Callable[..., dict[str, Tensor]]] = {
    "even": lambda rank: ddp(rank, SHARES["even"]),
    "uneven": lambda rank: ddp(rank, SHARES["uneven"]),
    "one_value": lambda rank: ddp(rank, SHARES["one_value"]),
    "accumulated": lambda rank: ddp(rank, SHARES["even"], stride=2),
    "fsdp": lambda rank: fsdp(rank, SHARES["even"]),
    "local": lambda rank: local(rank, SHARES["even"]),
}


def work(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    found: dict[str, Any] = {}
    for name, scenario in SCENARIOS.items():
        try:
            found[name] = {k: v.detach().clone() for k, v in scenario(rank).items()}
        except Exception as error:
            raise RuntimeError(f"{name}: {error}") from error
    torch.save(found, f"{folder}/{rank}.pt")
    dist.destroy_process_group()
    os._exit(0)  # FSDP keeps the group, whose threads can abort a process that ends before them


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, dict[str, Tensor]]]:
    """What the two processes ended with, scenario by scenario."""
    folder: Path = tmp_path_factory.mktemp("processes")
    torch.multiprocessing.spawn(work, (str(folder),), nprocs=2)
    return [torch.load(folder / f"{rank}.pt") for rank in range(2)]


def check(found: dict[str, Tensor], run: Callable[[nn.Module, Tensor], Any]) -> None:
    """Against the plain model in one process: off by no more than twice what float32 there is off from float64."""
    _, plain = twins("ours")
    exact = copy.deepcopy(plain).double()
    for model in (exact, plain):
        run(model, X.to(next(model.parameters()).dtype))
    for key, ref in exact.state_dict().items():
        error = (found[key].double() - ref).abs().max()
        allowed = 2 * (plain.state_dict()[key].double() - ref).abs().max()
        assert error <= allowed + 16 * torch.finfo(torch.float32).eps * ref.abs().max(), f"{key}: {error} {allowed}"


@pytest.mark.parametrize("name", ["even", "uneven", "one_value", "fsdp"])
def test_synchronised_statistics(found: list[dict[str, dict[str, Tensor]]], name: str) -> None:

    def run(model: nn.Module, x: Tensor) -> None:
        train(model, [x])
        model(x)

    check(found[0][name], run)
    for key, value in found[0][name].items():
        assert torch.equal(value, found[1][name][key]), f"{key} differs between the processes"


def test_accumulation_without_synchronisation(found: list[dict[str, dict[str, Tensor]]]) -> None:
    """no_sync(): gradients add up in each process and are averaged once; statistics are synchronised always."""

    def run(model: nn.Module, x: Tensor) -> None:
        first, second = x.split(SHARES["even"])
        train(model, [torch.cat((first[i::2], second[i::2])) for i in range(2)])
        model(x)

    check(found[0]["accumulated"], run)


def test_statistics_of_each_process(found: list[dict[str, dict[str, Tensor]]]) -> None:
    """Gradients are averaged, running statistics are those of a process's own part."""
    _, plain = twins("ours")
    train(plain, list(X.split(SHARES["even"])), steps=1)
    for key, value in found[0]["local"].items():
        assert torch.equal(value, found[1]["local"][key]) == ("running" not in key)
    for name, parameter in plain.named_parameters():
        torch.testing.assert_close(found[0]["local"][name], parameter.detach(), rtol=1e-4, atol=1e-5)


def test_without_processes() -> None:
    """A SyncBatchNorm where there is no process group takes the statistics of its batch."""
    fused, plain = twins("ours")
    fused_step(synchronised(fused), X)
    one_step(plain, X)
    assert len(norms(fused)) == 0
    for (name, a), b in zip(fused.named_parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-3, atol=1e-3, msg=lambda m, name=name: f"{name}: {m}")
