"""Training a fused model as people do: scaled losses, hooks, averages, checkpoints, less memory, compiled."""

import copy

import pytest
import torch
import torch.utils.checkpoint
from plain_models import check_against, check_step, one_step
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from training_twins import DEPTH, X, nodes, norms, twins

from cmx_kernels import ConvMixer

pytestmark = pytest.mark.filterwarnings("ignore:cmx_kernels")


def test_grad_scaler() -> None:
    """A step with an overflow is left out and halves the scale; the next one is taken."""
    fused, plain = twins()
    found = []
    for model in (fused, plain):
        optimizer = torch.optim.SGD(model.parameters(), 0.1)
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**60, growth_interval=100)
        before = [p.clone() for p in model.parameters()]
        scales, moved = [], []
        for step in range(2):
            with torch.autocast("cpu", torch.float16):
                loss = model(X).float().square().mean()
            optimizer.zero_grad()
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update(None if step else 2.0**8)
            scales.append(scaler.get_scale())
            moved.append([not torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True)])
        assert not any(moved[0]) and all(moved[1])
        found.append((scales, [p.detach() for p in model.parameters()]))
    assert found[0][0] == found[1][0]
    for a, b in zip(found[0][1], found[1][1], strict=True):
        torch.testing.assert_close(a, b, rtol=0.02, atol=2e-3)


def test_tensor_hooks() -> None:
    fused, plain = twins()
    seen: list[list[str]] = [[], []]
    for model, log in zip((fused, plain), seen, strict=True):
        for name, parameter in model.named_parameters():
            parameter.register_hook(lambda grad, log=log, name=name: log.append(name))
            parameter.register_post_accumulate_grad_hook(
                lambda p, log=log, name=name: log.append(f"{name} {list(p.grad.shape)}")
            )
        weight = model.blocks[0][1].weight
        weight.register_hook(lambda grad: 2 * grad)
    one_step(fused, X)
    one_step(plain, X)
    assert sorted(seen[0]) == sorted(seen[1])
    for hooked in (fused, plain):
        hooked.zero_grad()
    torch.testing.assert_close(
        *(torch.autograd.grad(m(X).square().sum(), m.blocks[0][1].weight)[0] for m in (fused, plain)),
        rtol=1e-3,
        atol=1e-3,
    )


@pytest.mark.parametrize("where", ["", "stem", "blocks", "blocks.0", "blocks.1.0", "blocks.0.0.fn.0", "blocks.1.3"])
@pytest.mark.parametrize("kind", ["forward", "forward_pre", "full_backward", "full_backward_pre"])
def test_module_hooks(where: str, kind: str) -> None:
    """They fire as often as in the plain model, and the step stays right."""
    fused, plain = twins()
    calls: list[nn.Module] = []
    for model in (fused, plain):
        register = getattr(model.get_submodule(where), f"register_{kind}_hook")
        register(lambda *_, model=model: calls.append(model))
    check_step(fused, plain, X)  # the float64 copy of the plain model counts as that
    assert [model is fused for model in calls] == [False, False, True]


@pytest.mark.parametrize("average", ["timm", "torch"])
def test_moving_average(average: str) -> None:
    """The averaged copies are fused models of their own, and follow."""
    utils = pytest.importorskip("timm.utils")
    found = []
    for model in twins():
        if average == "timm":
            mean = utils.ModelEmaV3(model, decay=0.7)
        else:
            mean = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.7), use_buffers=True)
        mean.module.eval()
        mean.module(X)
        optimizer = torch.optim.SGD(model.parameters(), 0.05)
        for _ in range(3):
            optimizer.zero_grad()
            one_step(model, X)
            optimizer.step()
            mean.update(model) if average == "timm" else mean.update_parameters(model)
        found.append(mean.module)
    fused, plain = found
    assert type(fused).__module__ == type(plain).__module__ and type(fused) is not type(plain)
    for a, b in zip(fused.state_dict().values(), plain.state_dict().values(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-3)
    plain.load_state_dict(fused.state_dict())
    with torch.no_grad():
        check_against(fused(X), plain, X)


# ---- memory


@pytest.mark.parametrize("make", ["timm", "ours"])
@pytest.mark.parametrize("early_stop", [True, False])
def test_grad_checkpointing(make: str, early_stop: bool) -> None:
    """Gradients are the same, and running statistics change once a step, also where a block is computed to its end."""
    fused, plain = twins()
    if make == "ours":
        model = ConvMixer(16, DEPTH, 5, 7, 10).train()
        model.load_state_dict(plain.state_dict())
        fused = model
    once = copy.deepcopy(fused)
    one_step(once, X)
    fused.set_grad_checkpointing()
    with torch.utils.checkpoint.set_checkpoint_early_stop(early_stop):
        check_step(fused, plain, X)
    for (name, a), b in zip(fused.named_buffers(), once.buffers(), strict=True):
        torch.testing.assert_close(a, b, msg=lambda m, name=name: f"{name}: {m}")
    assert {int(n.num_batches_tracked) for n in norms(fused)} == {1}


def kept(model: nn.Module, x: Tensor) -> int:
    """Bytes that autograd keeps for backward, besides parameters."""
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    storages: dict[int, int] = {}

    def pack(t: Tensor) -> Tensor:
        storage = t.untyped_storage()
        if storage.data_ptr() not in own:
            storages[storage.data_ptr()] = storage.nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        y = model(x)
    total = sum(storages.values())
    y.sum().backward()
    return total


@pytest.mark.parametrize("autocast", [False, True])
def test_saved_memory_of_a_block(autocast: bool) -> None:
    """Two pre-activations; eager keeps six. Recomputing the depthwise one leaves one."""

    def per_block(fused: bool, recompute: bool = False) -> int:
        found = []
        for depth in (1, 3):
            model = ConvMixer(32, depth, 3, 2, 10, fused=fused).train()
            if recompute:
                model.recompute_depthwise = True
            with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                found.append(kept(model, torch.randn(4, 3, 32, 32)))
        return (found[1] - found[0]) // 2

    eager = per_block(False)
    assert per_block(True) <= 0.36 * eager
    assert per_block(True, recompute=True) <= 0.19 * eager


def test_recompute_depthwise() -> None:
    """May be switched at any time; the same gradients, bit for bit."""
    fused, _ = twins()
    found = []
    for recompute in (False, True):
        fused.recompute_depthwise = recompute
        fused.zero_grad()
        size = kept(fused, X)
        fused.zero_grad()
        one_step(fused, X)
        found.append((size, [p.grad.clone() for p in fused.parameters()]))
    assert found[1][0] < found[0][0]
    assert all(torch.equal(a, b) for a, b in zip(found[0][1], found[1][1], strict=True))


# ---- compiled


def test_a_compiled_step() -> None:
    fused, plain = twins()
    compiled = torch.compile(fused, backend="aot_eager")

    def run(model: nn.Module, image: Tensor) -> Tensor:
        return one_step(compiled if model is fused else model, image)

    for _ in range(2):
        check_step(fused, plain, X, run=run)
    assert {int(n.num_batches_tracked) for n in norms(fused)} == {2}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("less_memory", ["", "recompute_depthwise", "grad_checkpointing"])
def test_deterministic_algorithms(less_memory: str, dtype: torch.dtype) -> None:
    """Strictly: nothing in a step is on PyTorch's list of what is not deterministic; two runs give the same bits."""
    fused, _ = twins()
    if less_memory:
        setattr(fused, less_memory, True)
    torch.use_deterministic_algorithms(True)
    assert not torch.is_deterministic_algorithms_warn_only_enabled()
    runs = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        model, image = copy.deepcopy(fused).to(dtype), X.to(dtype, copy=True).requires_grad_()
        optimizer = torch.optim.AdamW(model.parameters())
        assert sum(name.startswith("BlockBackward") for name in nodes(one_step(model, image))) == DEPTH
        grads = [image.grad, *(p.grad for p in model.parameters())]
        optimizer.step()
        runs.append([*grads, *model.state_dict().values()])
    assert all(torch.equal(first, second) for first, second in zip(*runs, strict=True))
