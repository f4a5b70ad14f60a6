"""pointwise_block, patch_embed and pool_head on a GPU, as tests/test_cuda_device.py."""

from collections.abc import Iterator

import cases
import pytest
import torch
from compare import check, check_equal
from test_cuda_device import DEVICE_DTYPES, on_gpu
from torch import Tensor

from cmx_kernels import backends, ops

pytestmark = [pytest.mark.gpu, on_gpu]
OPS = ("pointwise_block", "patch_embed", "pool_head")
SHAPES = [(op, shape) for op in OPS for shape in cases.SHAPES[op]]
LARGE = [(n, c, c, size, size) for c, size in ((1536, 32), (768, 32), (1024, 16)) for n in (1, 8)]


@pytest.fixture(autouse=True)
def strict_float32() -> Iterator[None]:
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        yield


def run(op: str, args: tuple, x: Tensor | None = None) -> Tensor:
    moved = [a.cuda() if isinstance(a, Tensor) else a for a in args]
    if x is not None:
        moved[0] = x
    with backends.use("cuda"):
        return getattr(ops, op)(*moved).cpu()


@pytest.mark.parametrize("dtype", DEVICE_DTYPES, ids=cases.name)
@pytest.mark.parametrize(("op", "shape"), SHAPES, ids=cases.name)
def test_shapes(op: str, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    args, expected = cases.problem(op, shape, dtype)
    check(run(op, args), expected)
    last = args[0].cuda().contiguous(memory_format=torch.channels_last)
    check(run(op, args, last), expected, "channels_last")


@pytest.mark.parametrize("dtype", DEVICE_DTYPES, ids=cases.name)
@pytest.mark.parametrize("shape", LARGE, ids=cases.name)
def test_layers_of_the_models(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    args, expected = cases.problem("pointwise_block", shape, dtype)
    check(run("pointwise_block", args), expected)
    last = args[0].cuda().contiguous(memory_format=torch.channels_last)
    check(run("pointwise_block", args, last), expected, "channels_last")
    inside = args[0].cuda().transpose(0, 1).contiguous().transpose(0, 1)
    check(run("pointwise_block", args, inside), expected, "images inside of channels, as training has them")


@pytest.mark.parametrize("act", cases.ACTS)
@pytest.mark.parametrize("dtype", DEVICE_DTYPES, ids=cases.name)
def test_activations(dtype: torch.dtype, act: str) -> None:
    for op in ("pointwise_block", "patch_embed"):
        args, expected = cases.problem(op, cases.RAGGED[op], dtype, act)
        check(run(op, args), expected)


@pytest.mark.parametrize("dtype", (torch.float16, torch.bfloat16), ids=cases.name)
def test_integers_are_exact(dtype: torch.dtype) -> None:
    for n, c_in, c_out, h, w in ((64, 512, 384, 32, 32), (3, 100, 130, 14, 14), (5, 33, 70, 7, 7)):
        x, weight = torch.randint(-2, 3, (n, c_in, h, w)).to(dtype), torch.randint(-1, 2, (c_out, c_in, 1, 1)).to(dtype)
        args = (x, weight, None, None, None, "relu")
        wanted = cases.formula(torch.float32, "pointwise_block", *args).to(dtype)
        check_equal(run("pointwise_block", args), wanted)
        check_equal(run("pointwise_block", args, x.cuda().contiguous(memory_format=torch.channels_last)), wanted)


@pytest.mark.parametrize("layout", cases.LAYOUTS)
@pytest.mark.parametrize("op", OPS)
def test_layouts(op: str, layout: str) -> None:
    args = cases.inputs(op, cases.RAGGED[op], torch.bfloat16)
    x = cases.LAYOUTS[layout](args[0].cuda())
    check(run(op, args, x), cases.expect(op, (x.cpu(), *args[1:])))


def test_repeats_are_equal() -> None:
    for op in OPS:
        args = cases.inputs(op, cases.RAGGED[op], torch.bfloat16)
        first = run(op, args)
        for _ in range(20):
            check_equal(run(op, args), first)


def test_a_network_in_a_graph() -> None:
    """Stem, blocks and head captured in a CUDA graph give what they give outside."""
    shapes = {
        "patch_embed": (4, 3, 64, 64, 64, 2, 2),
        "depthwise_block": (4, 64, 32, 32, 9, 9),
        "pointwise_block": (4, 64, 64, 32, 32),
        "pool_head": (4, 64, 10, 32, 32),
    }
    moved = {
        op: [a.cuda() if isinstance(a, Tensor) else a for a in cases.inputs(op, shape, torch.bfloat16)]
        for op, shape in shapes.items()
    }

    def network(x: Tensor) -> Tensor:
        for op, args in moved.items():
            x = getattr(ops, op)(x, *args[1:])
        return x

    with backends.use("cuda"):
        x = moved["patch_embed"][0]
        wanted = network(x)
        torch.cuda.synchronize()
        stream = torch.cuda.Stream()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.stream(stream), torch.cuda.graph(graph, stream=stream):
            out = network(x)
        graph.replay()
        torch.cuda.synchronize()
    check_equal(out.cpu(), wanted.cpu())


def test_autocast() -> None:
    """The public function follows autocast; the bare operator on float32 refuses rather than mix dtypes."""
    args = [a.cuda() if isinstance(a, Tensor) else a for a in cases.inputs("pointwise_block", (2, 16, 24, 4, 8))]
    with backends.use("cuda"), torch.autocast("cuda", dtype=torch.bfloat16):
        assert ops.pointwise_block(*args).dtype == torch.bfloat16
        with pytest.raises(RuntimeError, match="under autocast"):
            torch.ops.cmx.pointwise_block(*args)
