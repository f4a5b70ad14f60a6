"""The CUDA kernels on a GPU: instruction models of the emulator against the hardware, then the operator.

Skipped where there is no GPU; `make gpu-check` runs this first.
"""

import re
import struct
import subprocess
from collections.abc import Callable
from pathlib import Path

import cases
import cuda_facts
import emulated
import pytest
import torch
import training_cases as problems
from compare import Expected, check, check_equal
from torch import Tensor

from cmx_kernels import _build_info, backends, cuda, ops
from cmx_kernels.ops import training, training_products

WHY_NOT = "torch sees no CUDA device" if not torch.cuda.is_available() else cuda.why_not(0)
on_gpu = pytest.mark.skipif(WHY_NOT is not None, reason=f"needs a GPU: {WHY_NOT}")
pytestmark = pytest.mark.gpu
DEVICE_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def _lines(program: Path) -> dict[str, list[int]]:
    text = subprocess.run([program], capture_output=True, text=True, check=True).stdout
    return {
        name: [int(w, 16) for w in words.split()] for name, words in re.findall(r"^(.+?):((?: \w{8})+)$", text, re.M)
    }


PROGRAMS = {"instructions": 16, "hopper_instructions": 10}  # and their lines
# The size of what a number is summed from: the hardware cuts off the sum of every 16 products. wgmma sums 112 of size 1
_SIZES = {"ex": 1e-3, "wg": 64}
on_hopper = WHY_NOT is None and torch.cuda.get_device_capability() == (9, 0)


def _source(program: str) -> str:
    return f"tests/emulator/{program}.cpp"


@pytest.mark.parametrize(
    "program", [pytest.param(name, marks=emulated.needs(emulated.build, "program", _source(name))) for name in PROGRAMS]
)
def test_instructions_compile_and_run_emulated(program: str) -> None:
    found = _lines(emulated.build("program", _source(program)))
    assert len(found) == PROGRAMS[program]
    assert all(any(words) for words in found.values())


@emulated.needs(emulated.build, "program", _source("hopper_instructions"))
def test_a_cluster_emulated() -> None:
    """Of three tiles two went to both blocks, and the third of each is the other's."""
    found = _lines(emulated.build("program", _source("hopper_instructions")))
    for dtype in ("bf16", "fp16"):
        words = torch.tensor(found[f"cp.async.bulk.tensor multicast {dtype}"]).view(2, 3, -1)
        assert torch.equal(words[0, :2], words[1, :2])
        assert not torch.equal(words[0, 0], words[0, 1])
        assert not torch.equal(words[0, 2], words[1, 2])


@on_gpu
@pytest.mark.parametrize("program", PROGRAMS)
def test_instruction_models(program: str, tmp_path: Path) -> None:
    """Copies and ldmatrix bit for bit; arithmetic to the last places, in which sums and approximations may differ."""
    if program == "hopper_instructions" and not on_hopper:
        pytest.skip("these instructions are of compute capability 9.0 only")
    try:
        nvcc = cuda_facts.nvcc()[0]
    except cuda_facts.Missing as why:
        pytest.skip(f"needs nvcc: {why}")
    binary = tmp_path / program
    command = [nvcc, "-std=c++20", "-O2", *_build_info.for_device(torch.cuda.get_device_capability()), "-Icsrc"]
    subprocess.run([*command, "-x", "cu", _source(program), "-o", str(binary)], cwd=emulated.ROOT, check=True)
    hardware, model = _lines(binary), _lines(emulated.build("program", _source(program)))
    assert hardware.keys() == model.keys()
    for name, words in model.items():
        if name.startswith(("cp.async", "prmt")):
            assert hardware[name] == words, name
            continue
        got, wanted = (
            torch.tensor([struct.unpack("f", struct.pack("I", w))[0] for w in v], dtype=torch.float64)
            for v in (hardware[name], words)
        )
        same = (got == wanted) | (got.isnan() & wanted.isnan())
        close = (got - wanted).abs() <= 2e-6 * wanted.abs().clamp_min(_SIZES.get(name[:2], 8))
        assert (same | close).all(), f"{name}: {got[~(same | close)][:4]} for {wanted[~(same | close)][:4]}"


def run(args: tuple) -> Tensor:
    moved = [a.cuda() if isinstance(a, Tensor) else a for a in args]
    if isinstance(args[0], Tensor) and not args[0].is_contiguous():
        moved[0] = args[0].cuda().as_strided(args[0].shape, args[0].cuda().stride())
    with backends.use("cuda"):
        return ops.depthwise_block(*moved).cpu()


@on_gpu
@pytest.mark.parametrize("dtype", DEVICE_DTYPES, ids=cases.name)
@pytest.mark.parametrize("shape", cases.DEPTHWISE, ids=cases.name)
def test_shapes(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    args, expected = cases.problem("depthwise_block", shape, dtype)
    check(run(args), expected)
    last = args[0].contiguous(memory_format=torch.channels_last)
    check(run((last, *args[1:])), expected, "channels_last")


@on_gpu
@pytest.mark.parametrize("k", range(1, 32))
@pytest.mark.parametrize("dtype", DEVICE_DTYPES, ids=cases.name)
def test_every_kernel_size(k: int, dtype: torch.dtype) -> None:
    for kernel in ((k, k), (k, 32 - k)):
        for size in ((1, 18, 9, 14), (5, 3, 36, 33)):
            args, expected = cases.problem("depthwise_block", (*size, *kernel), dtype)
            check(run(args), expected, f"{size} {kernel}")
            last = args[0].contiguous(memory_format=torch.channels_last)
            check(run((last, *args[1:])), expected, f"{size} {kernel}, channels_last")


@on_gpu
@pytest.mark.parametrize("residual", (True, False))
@pytest.mark.parametrize("act", cases.ACTS)
@pytest.mark.parametrize("dtype", DEVICE_DTYPES, ids=cases.name)
def test_activations(dtype: torch.dtype, act: str, residual: bool) -> None:
    for shape in ((7, 40, 32, 32, 9, 9), (7, 40, 16, 16, 7, 7), (2, 19, 9, 11, 5, 4)):
        args, expected = cases.problem("depthwise_block", shape, dtype, act, None, residual)
        check(run(args), expected, f"{shape}")


@on_gpu
@pytest.mark.parametrize("dtype", DEVICE_DTYPES, ids=cases.name)
def test_integers_are_exact(dtype: torch.dtype) -> None:
    for n, c, h, w, k in ((64, 64, 32, 32, 9), (64, 64, 16, 16, 7), (3, 33, 56, 56, 7), (2, 5, 70, 71, 31)):
        x, weight = torch.randint(-3, 4, (n, c, h, w)).to(dtype), torch.randint(-2, 3, (c, 1, k, k)).to(dtype)
        args = (x, weight, None, None, None, "relu", True)
        check_equal(run(args), cases.formula(torch.float64, "depthwise_block", *args).to(dtype))


@on_gpu
@pytest.mark.parametrize("layout", cases.LAYOUTS)
def test_layouts(layout: str) -> None:
    args = cases.inputs("depthwise_block", cases.RAGGED["depthwise_block"], torch.bfloat16)
    x = cases.LAYOUTS[layout](args[0].cuda())
    with backends.use("cuda"):
        out = ops.depthwise_block(x, *(a.cuda() if isinstance(a, Tensor) else a for a in args[1:]))
    check(out.cpu(), cases.expect("depthwise_block", (x.cpu(), *args[1:])))


@on_gpu
def test_streams_graphs_and_memory() -> None:
    """Runs on the current stream, can be captured, and allocates its result only."""
    args, expected = cases.problem("depthwise_block", (4, 16, 32, 32, 9, 9), torch.bfloat16)
    moved = [
        a.cuda().float() if i in (2, 3, 4) else a.cuda() if isinstance(a, Tensor) else a for i, a in enumerate(args)
    ]
    with backends.use("cuda"):
        ops.depthwise_block(*moved)
        torch.cuda.synchronize()
        before = torch.cuda.memory_stats()["allocation.all.allocated"]
        out = ops.depthwise_block(*moved)
        assert torch.cuda.memory_stats()["allocation.all.allocated"] == before + 1
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, stream=stream):
                out = ops.depthwise_block(*moved)
        moved[0].zero_()
        graph.replay()
        torch.cuda.synchronize()
    zero = (torch.zeros_like(args[0]), *args[1:])
    check(out.cpu(), cases.expect("depthwise_block", zero))
    assert expected.dtype == out.dtype


# ---- training: the operators on the device against their references on the CPU


def on_device(operator: Callable[..., tuple], args: tuple) -> list[Tensor]:
    found = operator(*(a.cuda() if isinstance(a, Tensor) else a for a in args))
    return [t.cpu() for t in found]


@on_gpu
@pytest.mark.parametrize("dtype", DEVICE_DTYPES, ids=cases.name)
@pytest.mark.parametrize("layout", (torch.contiguous_format, torch.channels_last), ids=str)
@pytest.mark.parametrize(
    "shape",
    [
        (7, 40, 32, 32, 9, 9),
        (7, 40, 16, 16, 7, 7),
        (2, 19, 9, 11, 5, 4),
        (2, 9, 40, 35, 31, 31),
        (5, 9, 14, 14, 13, 20),
    ],
    ids=cases.name,
)
def test_depthwise_training(shape: tuple[int, ...], layout: torch.memory_format, dtype: torch.dtype) -> None:
    """Forward without an affine, so that no kernel rounds X; backward with one. Twice the same bits."""
    x, *rest = problems.depthwise_inputs(shape, dtype, affine=False)
    args = (x.contiguous(memory_format=layout), *rest)
    a, moments = on_device(training.depthwise_train, args)
    check(a, problems.expect_pre_activation(args))
    check(moments, problems.expect_moments(a, "gelu"), "moments")
    back = problems.backward_inputs(problems.depthwise_inputs(shape, dtype), a)
    images = [i for i, t in enumerate(back) if isinstance(t, Tensor) and t.shape == x.shape]
    back = tuple(t.contiguous(memory_format=layout) if i in images else t for i, t in enumerate(back))
    found = on_device(training.depthwise_backward, back)
    # which round what they multiply; large filters' gradients are copied to NCHW for them
    tensor_cores = dtype != torch.float32 and (layout is torch.contiguous_format or max(shape[4:]) > 9)
    wanted = problems.expect_gradients(back, rounded=tensor_cores)
    for expected, out, what in zip(wanted, found, ("dx", "dweight", "dbias"), strict=False):
        check(out, expected, what)
    check(found[3], problems.expect_sums(found[0], back[3], back[4], "gelu", rounded=tensor_cores), "sums")
    for out, same in zip(on_device(training.depthwise_backward, back), found, strict=True):
        check_equal(out, same)


@on_gpu
@pytest.mark.parametrize("layout", (torch.contiguous_format, torch.channels_last), ids=str)
@pytest.mark.parametrize("dtype", DEVICE_DTYPES, ids=cases.name)
def test_pointwise_training(dtype: torch.dtype, layout: torch.memory_format) -> None:
    """Composed of passes and products: torch on the CPU in the same dtype rounds at the same places."""
    n, cin, cout = 4, 24, 40
    x, skip = (problems.normal(n, cin, 9, 8, seed=i).to(dtype).contiguous(memory_format=layout) for i in range(2))
    weight = (problems.normal(cout, cin, 1, 1) * cin**-0.5).to(dtype)
    given = (x, problems.rows(3, cin), skip, problems.rows(3, cin, 1), weight)
    a, moments = on_device(training.pointwise_train, (*given, problems.rows(1, cout)[0], "gelu"))
    check(moments, problems.expect_moments(a, "gelu"), "moments")
    grad = problems.normal(*a.shape, seed=5).to(dtype).contiguous(memory_format=layout)
    back = (grad, a, problems.rows(4, cout), *given, "gelu", True, True)
    found = on_device(training.pointwise_backward, back)
    plain = training_products.pointwise_backward(torch.ops.cmx, *back)
    ref = training.pointwise_backward_reference(*problems.to(torch.float64, back))
    magnitude = training.pointwise_backward_reference(*problems.positive_pointwise_backward(back))
    for out, *expected in zip(found[:3], ref, plain, magnitude, strict=False):
        assert out.stride() == expected[1].stride()
        check(out, Expected(expected[0], expected[1].float(), expected[2], n * 72, expected[1].dtype))
    check(found[3], problems.expect_sums(found[0], x, given[1], "gelu"), "sums")
