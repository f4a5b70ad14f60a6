"""A training step under torch.compile: the operators of training in one graph, the same step as without it."""

import copy
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pytest
import torch
from plain_models import check_step, needs_kernels, one_step
from torch import Tensor, nn
from torch._dynamo.backends.common import aot_autograd
from torch._dynamo.utils import counters
from torch._functorch.aot_autograd import make_boxed_func
from torch._functorch.partitioners import min_cut_rematerialization_partition
from training_twins import DEPTH, X, norms, twins

from cmx_kernels import backends
from cmx_kernels.models.training import TRACEABLE

pytestmark = [
    needs_kernels,
    pytest.mark.skipif(not TRACEABLE, reason="the modules train in a graph of torch before 2.13"),
    pytest.mark.filterwarnings("ignore:cmx_kernels"),
]
F32, BF16 = torch.float32, torch.bfloat16
UNITS = 2 * DEPTH + 1
FORWARD = Counter(patch_embed_train=1, depthwise_block_train=DEPTH, pointwise_block_train=DEPTH, batchnorm_rows=UNITS)
BACKWARD = Counter(
    patch_embed_backward=1, depthwise_block_backward=DEPTH, pointwise_block_backward=DEPTH, batchnorm_gradients=UNITS
)


@pytest.fixture(autouse=True)
def no_graphs() -> Iterator[None]:
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


class Recorder:
    """A backend that runs the operators one by one and notes them; Inductor's partition of the two passes."""

    def __init__(self) -> None:
        self.forward: list[torch.fx.GraphModule] = []
        self.backward: list[torch.fx.GraphModule] = []
        self.backend = aot_autograd(
            fw_compiler=partial(self.note, self.forward),
            bw_compiler=partial(self.note, self.backward),
            partition_fn=min_cut_rematerialization_partition,
        )

    def note(self, graphs: list[torch.fx.GraphModule], graph: torch.fx.GraphModule, _: Any) -> Any:
        graphs.append(graph)
        return make_boxed_func(graph.forward)


def ours(graph: torch.fx.GraphModule) -> Counter[str]:
    """How often a graph calls each operator of ours. It calls no convolution of PyTorch."""
    called = [str(node.target) for node in graph.graph.nodes if node.op == "call_function"]
    assert not [name for name in called if "convolution" in name]
    return Counter(name.split(".")[1] for name in called if name.startswith("cmx."))


def pixels_kept(graph: torch.fx.GraphModule) -> int:
    """How many activations [N, C, H', W'] the forward pass hands to the backward pass."""
    (output,) = graph.graph.find_nodes(op="output")
    given = [node.meta["val"] for node in output.args[0] if node is not None]
    return sum(isinstance(t, Tensor) and t.shape == (4, 16, 4, 3) for t in given)


def compiled_run(fused: nn.Module, compiled: Callable[[Tensor], Tensor]) -> Any:
    """For check_step: the plain models as they are, the fused one compiled."""
    return lambda model, image: one_step(compiled if model is fused else model, image)


def tracked(model: nn.Module) -> list[int]:
    return [int(norm.num_batches_tracked) for norm in norms(model)]


def averaging(model: nn.Module) -> None:
    """momentum=None: the factor of an update is a tensor, whose value a graph cannot ask for."""
    for norm in norms(model):
        norm.momentum = None


CASES = {
    "float32": ("timm", lambda model: None, F32, None),
    "bfloat16": ("paper", lambda model: None, BF16, None),
    "autocast": ("short", averaging, F32, BF16),
}


@pytest.mark.parametrize("case", CASES)
def test_a_step(case: str) -> None:
    """Output, gradients and statistics under the error rule; every part is an operator of ours; two tensors a block."""
    family, change, dtype, autocast = CASES[case]
    fused, plain = (model.to(dtype) for model in twins(family, change))
    seen = Recorder()
    run = compiled_run(fused, torch.compile(fused, fullgraph=True, backend=seen.backend))
    for step in (1, 2, 3):
        check_step(fused, plain, X.to(dtype), autocast, run)
        assert tracked(fused) == tracked(plain) == [step] * (2 * DEPTH + 1)
    ((forward,), (backward,)) = seen.forward, seen.backward
    assert ours(forward) == FORWARD and ours(backward) == BACKWARD
    assert pixels_kept(forward) == 2 * DEPTH + 1
    layouts = [n for n in backward.graph.nodes if n.kwargs.get("memory_format") == torch.contiguous_format]
    assert not layouts  # gradients travel from block to block as they are


def test_inductor() -> None:
    fused, plain = twins("ours")
    check_step(fused, plain, X, BF16, compiled_run(fused, torch.compile(fused, fullgraph=True)))


def test_frozen() -> None:
    """A BatchNorm in eval mode, one with the batch's statistics, and parameters without a gradient."""
    fused, plain = twins()
    for model in (fused, plain):
        for norm in norms(model)[1:3]:
            norm.running_mean.uniform_(-0.1, 0.1, generator=torch.Generator().manual_seed(3))
            norm.eval()
        model.stem.requires_grad_(False)
        model.blocks[1][1].weight.requires_grad_(False)
    seen = Recorder()
    check_step(fused, plain, X, run=compiled_run(fused, torch.compile(fused, fullgraph=True, backend=seen.backend)))
    assert tracked(fused) == [1, 0, 0, 1, 1]
    assert ours(seen.forward[0]) == FORWARD and ours(seen.backward[0]) == BACKWARD


def test_training_goes_on() -> None:
    """Optimizer steps, eval and training again: bit for bit the model that is not compiled, in two graphs."""
    fused, _ = twins("ours")
    eager = copy.deepcopy(fused)
    compiled = torch.compile(fused, fullgraph=True, backend="aot_eager")
    optimizers = [torch.optim.AdamW(model.parameters(), 1e-2) for model in (fused, eager)]
    for _ in range(2):
        for model, optimizer in zip((compiled.train(), eager.train()), optimizers, strict=True):
            for _ in range(3):
                optimizer.zero_grad()
                model(X).square().mean().backward()
                optimizer.step()
        for (name, a), b in zip(fused.state_dict().items(), eager.state_dict().values(), strict=True):
            assert torch.equal(a, b), name
        with torch.no_grad():
            torch.testing.assert_close(compiled.eval()(X), eager.eval()(X))
    assert counters["stats"]["unique_graphs"] == 2
    assert tracked(fused) == [6] * (2 * DEPTH + 1)


@pytest.mark.parametrize("dynamic", [None, True])
def test_batches_of_any_size(dynamic: bool | None) -> None:
    """The second batch size makes a graph for all; with dynamic=True the first does, for image sizes too."""
    fused, _ = twins("ours")
    eager = copy.deepcopy(fused)
    compiled = torch.compile(fused, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    sizes = [(4, 28, 21), (3, 28, 21), (7, 28, 21), (2, 28, 21)]
    for n, h, w in sizes if dynamic is None else [*sizes, (3, 35, 42)]:
        for model in (compiled, eager):
            model.zero_grad()
            one_step(model, torch.randn(n, 3, h, w, generator=torch.Generator().manual_seed(n)))
        for (name, a), b in zip(fused.named_parameters(), eager.parameters(), strict=True):
            assert torch.equal(a.grad, b.grad), f"{name}, batch {n}"
    assert counters["stats"]["unique_graphs"] == (2 if dynamic is None else 1)


@pytest.mark.parametrize("how", ["recompute_depthwise", "grad_checkpointing"])
def test_less_memory(how: str) -> None:
    """The compiler would undo what is computed twice: it is told. One tensor a block is kept, depthwise runs twice."""
    fused, plain = twins()
    setattr(fused, how, True)
    seen = Recorder()
    check_step(fused, plain, X, run=compiled_run(fused, torch.compile(fused, fullgraph=True, backend=seen.backend)))
    assert tracked(fused) == [1] * (2 * DEPTH + 1)
    assert ours(seen.forward[0]) == FORWARD
    assert ours(seen.backward[0]) == BACKWARD + Counter(depthwise_block_train=DEPTH)
    assert pixels_kept(seen.forward[0]) == DEPTH + 1


def test_a_part_that_cannot(monkeypatch: pytest.MonkeyPatch) -> None:
    """A hook sends its block to the modules, which is said while the graph is made; the others stay fused."""
    monkeypatch.setattr(backends, "_said", set())
    fused, plain = twins()
    calls = []
    fused.blocks[0][0].fn[1].register_forward_hook(lambda *_: calls.append(1))
    compiled = torch.compile(fused, fullgraph=True, backend="aot_eager")
    with pytest.warns(UserWarning, match="plain PyTorch: a hook is attached to its GELU") as said:
        for _ in range(2):
            check_step(fused, plain, X, run=compiled_run(fused, compiled))
    assert len([w for w in said if "cmx_kernels" in str(w.message)]) == 1
    assert calls


def test_transforms_in_a_graph() -> None:
    """torch.func inside of torch.compile: PyTorch's operators, whose gradient is not lost."""
    fused, plain = (model.eval().requires_grad_(False) for model in twins("ours"))

    def gradient(model: nn.Module) -> Callable[[Tensor], Tensor]:
        return torch.func.grad(lambda x: model(x).square().sum())

    found = torch.compile(gradient(fused), backend="aot_eager")(X)
    torch.testing.assert_close(found, gradient(plain)(X), rtol=1e-4, atol=1e-6)
