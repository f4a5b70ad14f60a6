"""Every Triton kernel on the repaired interpreter, against float64: shapes, layouts, activations, what is not finite.

TRITON_INTERPRET=1 pytest tests/interpreted      (test_triton.py does that)

Every launch also checks that loads and stores stay inside their tensors, and that no element is stored to twice.
"""

import cases
import plain_models
import pytest
import torch
import triton_simulator
from called import Called
from cases import LAYOUTS, RAGGED
from compare import Expected, check, check_nonfinite
from torch import Tensor
from transforms import check_forward_mode_is_refused

from cmx_kernels import ConvMixer, backends, ops
from cmx_kernels.triton_kernels import config, launch

triton_simulator.install()
BF16, FP16, F32 = torch.bfloat16, torch.float16, torch.float32
BLOCKS = ("patch_embed", "depthwise_block", "pointwise_block")
# beyond one tile in every direction, below it, single elements, nothing
SHAPES = {
    "depthwise_block": (  # n, c, h, w, kh, kw
        (1, 1, 1, 1, 1, 1), (2, 3, 1, 5, 3, 3), (3, 2, 7, 7, 8, 6), (3, 3, 9, 16, 4, 9), (1, 2, 4, 32, 1, 7),
        (1, 2, 4, 37, 3, 17), (1, 1, 5, 65, 3, 18), (1, 1, 3, 36, 3, 31), (1, 1, 3, 2, 31, 1), (0, 4, 7, 7, 3, 3),
    ),
    "pointwise_block": (  # n, cin, cout, h, w
        (1, 1, 1, 1, 1), (3, 17, 33, 7, 5), (1, 65, 7, 3, 11), (2, 40, 24, 8, 8), (1, 2, 70, 3, 13), (0, 16, 16, 7, 7),
    ),
    "patch_embed": (  # n, cin, cout, h, w, p, q
        (1, 1, 1, 1, 1, 1, 1), (2, 3, 17, 15, 17, 7, 7), (1, 4, 66, 17, 19, 4, 3), (1, 1, 3, 9, 41, 1, 2),
        (0, 3, 4, 4, 4, 2, 2),
    ),
    "pool_head": ((1, 1, 1, 1, 1), (3, 17, 33, 5, 9), (17, 33, 18, 1, 4), (1, 40, 3, 7, 14), (0, 16, 10, 7, 7)),
}  # fmt: skip
EVERY_SHAPE = [(op, shape) for op in cases.OPS for shape in SHAPES[op]]


def run(op: str, *args: object) -> Tensor:
    before = triton_simulator.launches.total()
    with backends.use("triton"):
        out = getattr(ops, op)(*args)
    assert triton_simulator.launches.total() > before or not out.numel(), "a kernel ran"
    return out


@pytest.mark.parametrize("dtype", cases.DTYPES, ids=cases.name)
@pytest.mark.parametrize(("op", "shape"), EVERY_SHAPE, ids=cases.name)
def test_shapes(op: str, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    args, expected = cases.problem(op, shape, dtype)
    check(run(op, *args), expected)
    if dtype != FP16:
        last = args[0].contiguous(memory_format=torch.channels_last)
        check(run(op, last, *args[1:]), expected, "channels_last")


@pytest.mark.parametrize("transform", ("jvp", "forward mode"))
@pytest.mark.parametrize("op", cases.OPS)
def test_dispatcher_operators_refuse_forward_mode(op: str, transform: str) -> None:
    check_forward_mode_is_refused("cmx_triton", op, transform)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("op", cases.OPS)
def test_layouts(op: str, layout: str) -> None:
    """Any strides, NaN around the view; and the weight and the vectors in such a layout."""
    args = cases.inputs(op, RAGGED[op], BF16)
    x = LAYOUTS[layout](args[0])
    weight = LAYOUTS[layout](args[1]) if args[1].dim() == 4 else args[1].t().contiguous().t()
    vectors = [torch.stack([v, v], 1)[:, 0] if isinstance(v, Tensor) else v for v in args[2:]]
    args = (x, weight, *vectors)
    check(run(op, *args), cases.expect(op, args))


@pytest.mark.parametrize("act", cases.ACTS)
@pytest.mark.parametrize("op", BLOCKS)
def test_activations_and_vectors(op: str, act: str) -> None:
    for dtype, vectors in ((F32, None), (FP16, (F32, None, FP16)), (BF16, (None, F32, None)), (F32, (None,) * 3)):
        residual = act in ("relu", "gelu")
        args, expected = cases.problem(op, RAGGED[op], dtype, act, vectors, residual)
        check(run(op, *args), expected, f"{dtype} {vectors}")


@pytest.mark.parametrize("dtype", (F32, BF16), ids=cases.name)
@pytest.mark.parametrize(("op", "act"), [*((op, act) for op in BLOCKS for act in cases.ACTS), ("pool_head", "none")])
def test_not_finite(op: str, act: str, dtype: torch.dtype) -> None:
    """inf and NaN are where eager has them, which the zeros of a band would spread; the rest is right."""
    x, *rest = cases.inputs(op, RAGGED[op], dtype, act)
    x = x.clone()
    for index, value in (((0, 3, 2, 1), torch.inf), ((0, 7, 0, 0), -torch.inf), ((1, 1, -1, -1), torch.nan)):
        x[(index[0], index[1] % x.shape[1], *index[2:])] = value
    args = (x, *rest)
    out, eager = run(op, *args), cases.formula(torch.float64, op, *args).to(dtype)
    check_nonfinite(out, eager, cases.formula(F32, op, *args).to(dtype))
    finite = torch.isfinite(eager)
    expected = cases.expect(op, args)
    magnitude = cases.expect(op, (x.nan_to_num(0, 0, 0), *rest)).magnitude.max().expand(int(finite.sum()))
    parts = (expected.ref[finite], expected.plain[finite], magnitude, expected.terms, dtype)
    check(out[finite], Expected(*parts), "the finite part")


@pytest.mark.parametrize(("op", "arch"), [*((op, 80) for op in cases.OPS), ("pointwise_block", 90)])
def test_tiles_of_a_gpu(op: str, arch: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The tiles that GPUs get, with and without tensor descriptors, channels_last too."""
    monkeypatch.setattr(launch, "arch", lambda x: arch)
    shape = {
        "depthwise_block": (2, 2, 9, 12, 3, 3),
        "pointwise_block": (2, 80, 136, 8, 16),
        "patch_embed": (2, 3, 72, 42, 56, 7, 7),
        "pool_head": (3, 40, 33, 16, 17),
    }[op]
    for dtype in (BF16, F32):
        args, expected = cases.problem(op, shape, dtype)
        check(run(op, *args), expected)
        check(run(op, args[0].contiguous(memory_format=torch.channels_last), *args[1:]), expected, "channels_last")


def test_head_in_one_launch_and_in_two(monkeypatch: pytest.MonkeyPatch) -> None:
    for one, names in ((True, {"pool_head_fwd_kernel"}), (False, {"pool_fwd_kernel", "head_fwd_kernel"})):
        monkeypatch.setattr(config, "head_is_one_launch", lambda *sizes, one=one: one)
        for shape in (*SHAPES["pool_head"][:-1], (2, 3, 130, 1, 2)):
            for dtype in (F32, BF16):
                args, expected = cases.problem("pool_head", shape, dtype)
                before = triton_simulator.launches.copy()
                check(run("pool_head", *args), expected)
                assert set(triton_simulator.launches - before) == names


def test_head_by_cost() -> None:
    """256/8 on CIFAR-10 takes one launch at small batches, 1536/20 none."""
    for images in (1, 64):
        assert config.head_is_one_launch(images, 2 * 256 * 256, 2 * 256 * 10, 10, 132)
        assert not config.head_is_one_launch(images, 2 * 1536 * 1024, 2 * 1536 * 1000, 1000, 132)


def test_descriptors_are_used() -> None:
    launches = triton_simulator.launches
    for layout in (torch.contiguous_format, torch.channels_last):
        args, expected = cases.problem("pointwise_block", (2, 40, 24, 8, 8), BF16)
        before = launches["pointwise_fwd_descriptor_kernel"]
        check(run("pointwise_block", args[0].contiguous(memory_format=layout), *args[1:]), expected)
        assert launches["pointwise_fwd_descriptor_kernel"] == before + 1
    slices = LAYOUTS["misaligned"](args[0])
    check(run("pointwise_block", slices, *args[1:]), expected)
    assert launches["pointwise_fwd_descriptor_kernel"] == before + 1, "the address is no multiple of 16 bytes"


def test_many_tiles_a_program(monkeypatch: pytest.MonkeyPatch) -> None:
    """Groups of tiles of every size reach every tile once."""
    args, expected = cases.problem("pointwise_block", (1, 3, 70, 9, 11), F32)
    for group in (1, 2, 3, 100):
        tile = config.Gemm(32, 32, 32, group, 1, 1, 2)
        monkeypatch.setattr(config, "pointwise", lambda *sizes, tile=tile: tile)
        check(run("pointwise_block", *args), expected, f"group {group}")


@pytest.mark.parametrize("op", cases.OPS)
def test_far_apart(op: str) -> None:
    """Images and channels beyond 2^31 elements: memory that is reserved, and touched in a few places."""
    args = cases.inputs(op, RAGGED[op], BF16)
    x = args[0]
    n, c, _, w = x.shape
    torch.utils.deterministic.fill_uninitialized_memory = False  # 5 GB, of which some pages are touched
    memory = torch.empty((n - 1) * (2**31 + 8) + 2**24 * c, dtype=BF16)
    torch.utils.deterministic.fill_uninitialized_memory = True
    far = memory.as_strided(x.shape, (2**31 + 8, 2**24, w, 1))
    for image in range(n):
        far[image] = x[image]
    check(run(op, far, *args[1:]), cases.expect(op, args))


def test_tf32_follows_torch() -> None:
    """With torch's flag the products are TF32, and not more precise than asked for; without it, float32."""
    errors = {}
    for op in ("pointwise_block", "patch_embed"):
        args, expected = cases.problem(op, RAGGED[op], F32, "none", (None,) * 3)
        for allowed in (False, True):
            torch.backends.cudnn.allow_tf32 = allowed
            errors[allowed] = float((run(op, *args).double() - expected.ref).abs().max())
        check(run(op, *args).to(BF16).float(), expected._replace(plain=expected.ref.to(BF16)), "TF32")
        assert errors[False] < 1e-5 < 1e-4 < errors[True] < 1e-2, errors


@pytest.mark.parametrize("op", cases.OPS)
def test_gradients_and_fakes(op: str) -> None:
    """The operator of cmx_triton differentiates, fakes and compiles like the one of cmx."""
    args = cases.with_layout(op, "contiguous", grad=True)
    run(op, *args)
    kernel = getattr(torch.ops.cmx_triton, op)
    checks = ("test_schema", "test_faketensor", "test_autograd_registration")
    result = torch.library.opcheck(kernel.default, args, test_utils=checks)
    assert set(result.values()) == {"SUCCESS"}
    leaves = [a for a in args if isinstance(a, Tensor)]
    with backends.use("reference"):
        wanted = torch.autograd.grad(getattr(ops, op)(*args).sum(), leaves)
    out = kernel(*args).sum()
    with Called() as called:
        found = torch.autograd.grad(out, leaves)
    for grad, want in zip(found, wanted, strict=True):
        torch.testing.assert_close(grad, want)
    assert op == "pool_head" or f"cmx_triton.{op}_backward.default" in called.names


@torch.no_grad()
def test_micro_batches() -> None:
    """Two images and then one through all blocks: what all of them together become."""
    net, x, results, launches = plain_models.trained(ConvMixer(8, 2, 3, 7, 10)), torch.randn(3, 3, 14, 7), [], []
    with backends.use("triton"):
        for images in (0, 2):
            net.micro_batch = images
            before = triton_simulator.launches.total()
            results.append(net(x))
            launches.append(triton_simulator.launches.total() - before)
    torch.testing.assert_close(*results, rtol=1e-6, atol=1e-6)
    assert launches == [5, 10]
