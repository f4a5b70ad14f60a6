"""Whole models on a GPU, with both backends: logits, CUDA graphs, torch.compile, side streams, a second device, a step.

Skipped where there is no GPU; `make gpu-check PART=correct` runs this.
"""

import copy
from collections.abc import Callable, Iterator

import cases
import pytest
import torch
from called import Called
from compare import check, check_equal
from gradient_cases import expected_gradients, leaves_of
from plain_models import check_against, check_step, trained
from torch import Tensor, nn
from training_twins import twins

from cmx_kernels import ConvMixer, cuda, fuse, ops, triton_kernels, use

CUDA = torch.cuda.is_available()
WHY_NOT = {
    "cuda": cuda.why_not(0) if CUDA else "torch sees no CUDA device",
    "triton": triton_kernels.why_not(0) if CUDA else "torch sees no CUDA device",
}
pytestmark = pytest.mark.gpu
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


@pytest.fixture(params=WHY_NOT)
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    if WHY_NOT[request.param] is not None:
        pytest.skip(f"needs a GPU: {WHY_NOT[request.param]}")
    with use(request.param), torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        yield request.param


def pair(dtype: torch.dtype = torch.bfloat16, device: str = "cuda") -> tuple[nn.Module, nn.Module, Tensor]:
    """A fused model, its plain twin, images."""
    torch.manual_seed(0)
    plain = trained(ConvMixer(64, 3, kernel_size=9, patch_size=7, num_classes=10, fused=False))
    plain = plain.to(device, dtype).requires_grad_(False)
    return fuse(copy.deepcopy(plain), strict=True), plain, torch.randn(4, 3, 112, 112).to(device, dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@torch.no_grad()
def test_logits(backend: str, dtype: torch.dtype) -> None:
    fused, plain, x = pair(dtype)
    check_against(fused(x), plain, x)
    check_against(fused(x.to(memory_format=torch.channels_last)), plain, x)


@torch.no_grad()
def test_two_launches_a_block(backend: str) -> None:
    """Of three blocks more, six kernels more."""
    torch.utils.deterministic.fill_uninitialized_memory = False  # which is a kernel for each tensor that is allocated
    counts = []
    for depth in (2, 5):
        model = trained(ConvMixer(64, depth, kernel_size=9, patch_size=7, num_classes=10)).to("cuda", torch.bfloat16)
        x = torch.randn(2, 3, 112, 112, device="cuda", dtype=torch.bfloat16)
        model(x)
        torch.cuda.synchronize()
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
            model(x)
            torch.cuda.synchronize()
        found = [e.name for e in profile.events() if e.device_type == torch.autograd.DeviceType.CUDA]
        counts.append(sum(not name.startswith("cmx_kernels.") for name in found))  # ranges have these names
    assert counts[1] - counts[0] == 6, counts


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
@torch.no_grad()
def test_micro_batches(backend: str, layout: torch.memory_format) -> None:
    """Three of four images, then one, and the same in a graph."""
    fused, plain, x = pair()
    x = x.contiguous(memory_format=layout)
    fused.micro_batch = 3
    out = fused(x)
    check_against(out, plain, x)
    torch.cuda.synchronize()
    before = torch.cuda.memory_stats()["num_alloc_retries"], torch.cuda.memory_reserved()
    check_equal(fused(x), out)
    assert before == (torch.cuda.memory_stats()["num_alloc_retries"], torch.cuda.memory_reserved())
    stream, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream), torch.cuda.graph(graph, stream=stream):
        captured = fused(x)
    graph.replay()
    torch.cuda.synchronize()
    check_equal(captured, out)


@torch.no_grad()
def test_a_captured_graph_reads_what_is_written_later(backend: str) -> None:
    fused, _, x = pair()
    wanted, given = fused(x), torch.zeros_like(x)
    stream, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        fused(given)  # compiles and packs outside of the graph
        with torch.cuda.graph(graph, stream=stream):
            out = fused(given)
    given.copy_(x)
    graph.replay()
    torch.cuda.synchronize()
    check_equal(out, wanted)


@torch.no_grad()
def test_autocast_in_a_graph(backend: str) -> None:
    """A replay sees what was written to a weight since, also where PyTorch counts no change."""
    fused, _, x = pair(torch.float32)
    stream, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
    with torch.autocast("cuda", torch.bfloat16, cache_enabled=False):
        wanted = fused(x)
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream), torch.cuda.graph(graph, stream=stream):
            out = fused(x)
        for change in (lambda w: None, lambda w: w.data.mul_(1.5), lambda w: w.mul_(1.5)):
            change(fused.blocks[1][1].weight)
            graph.replay()
            torch.cuda.synchronize()
            check_equal(out, fused(x))
    assert not torch.equal(out, wanted)


@torch.no_grad()
def test_autocast_on_two_streams(backend: str) -> None:
    """What one stream still converts, the other waits for."""
    fused, _, x = pair(torch.float32)
    side = torch.cuda.Stream()
    torch.cuda.synchronize()
    torch.cuda._sleep(20_000_000)
    with torch.autocast("cuda", torch.bfloat16):
        first = fused(x)
        with torch.cuda.stream(side):
            second = fused(x)
    torch.cuda.synchronize()
    check_equal(first, second)


def test_graphed_callables(backend: str) -> None:
    fused, _, x = pair()
    wanted = fused(x)
    check_equal(torch.cuda.make_graphed_callables(fused, (x.clone(),))(x), wanted)


@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
@torch.no_grad()
def test_compiled(backend: str, mode: str) -> None:
    fused, plain, x = pair()
    compiled: Callable[[Tensor], Tensor] = torch.compile(fused, mode=mode, fullgraph=True)
    for _ in range(3):  # warm-up, record, replay
        out = compiled(x).clone()
    check_against(out, plain, x)


@torch.no_grad()
def test_a_side_stream(backend: str) -> None:
    """What another stream still computes is not read before it is there."""
    fused, _, x = pair()
    wanted, side = fused(x), torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        late = torch.zeros_like(x)
        torch.cuda._sleep(20_000_000)
        late += x
        out = fused(late)
    torch.cuda.current_stream().wait_stream(side)
    check_equal(out, wanted)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@torch.no_grad()
def test_the_second_device(backend: str) -> None:
    """The current device is the first one; weights and images are on the other."""
    fused, plain, x = pair(device="cuda:1")
    check_against(fused(x), plain, x)
    assert torch.cuda.current_device() == 0


LAYOUTS: tuple[Callable[[Tensor], Tensor], ...] = (
    torch.clone,
    lambda grad: grad[:, :1, :1, :1].expand(grad.shape),
    lambda grad: grad.contiguous(memory_format=torch.channels_last),
)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("act", ["gelu", "none"])
@pytest.mark.parametrize("op", ["patch_embed", "depthwise_block", "pointwise_block"])
def test_gradients_of_operators(backend: str, op: str, act: str, dtype: torch.dtype) -> None:
    """By the kernels of training, in the backward pass of an operator that is called by hand."""
    args = cases.inputs(op, cases.RAGGED[op], dtype, act, (dtype, torch.float32, torch.float32))
    leaves = leaves_of(args)
    moved = [a.detach().cuda().requires_grad_() if isinstance(a, Tensor) else a for a in args]
    y = getattr(ops, op)(*moved)
    grad = torch.randn(y.shape).to(dtype)
    tensors = [m for m in moved if isinstance(m, Tensor)]
    for layout in LAYOUTS:
        expected = expected_gradients(op, args, layout(grad))
        with Called() as called:
            found = torch.autograd.grad(y, tensors, layout(grad.cuda()), retain_graph=True)
        assert any(name.endswith(f"{op}_backward.default") for name in called.names)
        for leaf, out, want in zip(leaves, found, expected, strict=True):
            check(out.cpu(), want, f"gradient of a tensor {list(leaf.shape)}")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
def test_a_training_step(backend: str, dtype: torch.dtype, layout: torch.memory_format) -> None:
    fused, plain = (model.to("cuda", dtype) for model in twins())
    check_step(fused, plain, torch.randn(4, 3, 28, 21).to("cuda", dtype).contiguous(memory_format=layout))
