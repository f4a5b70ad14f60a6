"""The training forms of the Triton backend on the repaired interpreter, against float64; see test_triton_kernels.py.

For 16-bit types `plain` is torch in the same dtype: X and da are rounded where eager rounds them.
"""

import math
from functools import partial
from typing import Any

import cases
import plain_models
import pytest
import torch
import training_cases as problems
import triton_simulator
from compare import check, check_equal
from product_checks import check_passes, check_patch_embed, check_pointwise
from torch import Tensor
from training_twins import X, twins

from cmx_kernels import backends, triton_kernels
from cmx_kernels.ops import training
from cmx_kernels.triton_kernels import config, launch

triton_simulator.install()
assert triton_kernels.load() is None
BF16, FP16, F32, F64 = torch.bfloat16, torch.float16, torch.float32, torch.float64
TRITON = torch.ops.cmx_triton
train = partial(training.depthwise_train, backend="triton")
backward = partial(training.depthwise_backward, backend="triton")
LAYOUTS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}
SHAPES = (  # n, c, h, w, kh, kw: beyond one tile in every direction, single elements, even kernels
    (1, 1, 1, 2, 1, 1), (2, 17, 6, 5, 2, 3), (1, 1, 3, 36, 1, 18), (1, 2, 3, 2, 9, 1),
)  # fmt: skip


def check_forward(args: tuple, **keywords: Any) -> Tensor:
    a, moments = train(*args)
    check(a, problems.expect_rounded_pre_activation(args), f"a {keywords}")
    check(moments, problems.expect_moments(a, args[-1]), f"moments {keywords}")
    return a


def check_backward(args: tuple) -> tuple[Tensor, ...]:
    found = backward(*args)
    affine, *_, need_input, need_weight = args[4:]
    wanted = (need_input, need_weight, need_weight)
    for out, expected, want in zip(found, problems.expect_rounded_gradients(args), wanted, strict=False):
        if want:
            check(out, expected, "gradient")
        else:
            assert not out.numel()
    if need_input and affine is not None:
        check(found[3], problems.expect_sums(found[0], args[3], affine, args[6]), "sums")
    else:
        assert not found[3].numel()
    return found


@pytest.mark.parametrize(
    ("dtype", "layout"), [*((d, "contiguous") for d in cases.DTYPES), (BF16, "channels_last")], ids=cases.name
)
@pytest.mark.parametrize("shape", SHAPES, ids=cases.name)
def test_depthwise(shape: tuple[int, ...], dtype: torch.dtype, layout: str) -> None:
    affine = dtype != FP16
    x, *rest = problems.depthwise_inputs(shape, dtype, "gelu", affine)
    args = (x.contiguous(memory_format=LAYOUTS[layout]), *rest)
    a = check_forward(args)
    assert a.is_contiguous(memory_format=LAYOUTS[layout])
    check_backward(problems.backward_inputs(args, a, residual=affine))


@pytest.mark.parametrize("act", cases.ACTS)
def test_activations(act: str) -> None:
    for dtype, need in ((F32, (True, False)), (BF16, (False, True))):
        args = problems.depthwise_inputs((2, 3, 4, 5, 2, 2), dtype, act)
        check_backward(problems.backward_inputs(args, check_forward(args), need=need))


def test_any_strides() -> None:
    """Of x, and of the gradients, an expanded one too; where offsets are 64 bits wide."""
    args = problems.depthwise_inputs((2, 3, 6, 7, 3, 3), BF16, "gelu", False)
    a = check_forward(args)
    for layout in ("transposed_pixels", "channels_last_channel_slice"):
        strided = (cases.LAYOUTS[layout](args[0]), *args[1:])
        check_forward(strided, layout=layout)
        grad, *rest = problems.backward_inputs(strided, cases.LAYOUTS[layout](a))
        check_backward((grad[:, :, :1, :1].expand(grad.shape), *rest))


@pytest.mark.parametrize("dtype", (F32, BF16), ids=cases.name)
def test_wide_offsets(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    args = problems.depthwise_inputs((2, 3, 6, 7, 3, 3), dtype)
    a = train(*args)[0]
    back = problems.backward_inputs(args, a)
    narrow = backward(*back)
    monkeypatch.setattr(launch, "needs_wide_offsets", lambda *tensors: True)
    for out, same in zip((*train(*args)[:1], *backward(*back)), (a, *narrow), strict=True):
        check_equal(out, same)


def test_moments_far_from_zero(monkeypatch: pytest.MonkeyPatch) -> None:
    """A mean of 1e4 with a deviation of 1, from both kernels and from the pass, where a place sums many numbers."""
    monkeypatch.setattr(config, "splits", lambda *_: 1)
    x = problems.normal(4, 3, 9, 11).float()
    for layout in LAYOUTS.values():
        args = (x.contiguous(memory_format=layout), None, torch.ones(3, 1, 1, 1), torch.full((3,), 1e4), "relu")
        a, moments = train(*args)
        check(moments, problems.expect_moments(a, "relu"))
        for found in (moments, TRITON.training_moments(a, "relu")):
            torch.testing.assert_close(found[1], x.var((0, 2, 3), correction=0), rtol=2e-3, atol=0)
    half = (x.half(), *(t.half() for t in (torch.ones(3, 1, 1, 1), torch.full((3,), 1e3))))
    a, moments = train(half[0], None, *half[1:], "none")
    check(moments, problems.expect_moments(a, "none"), "the moments of the bands")


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("skips", "dtype"), ((2, BF16), (1, F32), (0, FP16)), ids=cases.name)
def test_pointwise(skips: int, dtype: torch.dtype, layout: str) -> None:
    check_pointwise(TRITON, (2, 5, 18, 3, 11), skips, dtype, layout)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_patch_embed(layout: str) -> None:
    check_patch_embed(TRITON, (2, 3, 10, 14, 14, 7, 7), BF16, layout)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("act", cases.ACTS)
def test_passes(act: str, layout: str) -> None:
    for dtype in (F32, BF16):
        check_passes(TRITON, (3, 18, 5, 7), dtype, act, layout)


def test_tiles_of_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "arch", lambda x: 80)
    for dtype, layout in ((BF16, "contiguous"), (F32, "channels_last")):
        x, *rest = problems.depthwise_inputs((2, 3, 5, 9, 2, 1), dtype)
        args = (x.contiguous(memory_format=LAYOUTS[layout]), *rest)
        check_backward(problems.backward_inputs(args, check_forward(args)))


def test_one_part_or_many(monkeypatch: pytest.MonkeyPatch) -> None:
    """However the tiles are shared out, every one of them is summed once."""
    args = problems.depthwise_inputs((2, 2, 6, 18, 1, 2), F32)
    for count in (1, 1000):
        monkeypatch.setattr(config, "splits", lambda tiles, *_, count=count: min(tiles, count))
        check_backward(problems.backward_inputs(args, check_forward(args)))


def test_fakes() -> None:
    """Shapes and strides of what torch.compile sees."""
    args = problems.depthwise_inputs((2, 3, 6, 7, 1, 1), F32)
    a = train(*args)[0]
    x, affine, weight = args[0], args[1], problems.normal(5, 3, 1, 1).float()
    out, k = torch.randn(2, 5, 6, 7), problems.rows(4, 5)
    image = problems.normal(5, 3, 2, 2).float()
    for name, given in (
        ("depthwise_block_train", args),
        ("depthwise_block_backward", problems.backward_inputs(args, a)),
        ("pointwise_block_train", (x, affine, x, None, weight, None, "gelu")),
        ("pointwise_block_backward", (out, out, k, x, affine, x, None, weight, "gelu", True, True)),
        ("patch_embed_train", (x, image, None, "gelu")),
        ("patch_embed_backward", (out[..., :3, :3], out[..., :3, :3], k, x, image, "gelu", True, True)),
    ):
        operator = getattr(TRITON, name).default
        found = torch.library.opcheck(operator, given, test_utils="test_faketensor")
        assert set(found.values()) == {"SUCCESS"}, name


def test_a_model() -> None:
    """Forward where Triton is asked for, backward after that: on the same kernels."""
    fused, plain = twins()
    fused.recompute_depthwise = True
    launches = triton_simulator.launches

    def step(model: torch.nn.Module, image: Tensor) -> Tensor:
        with backends.use("triton" if model is fused else "reference"):
            y = model(image)
        before = launches.copy()
        torch.manual_seed(5)
        y.backward(torch.randn(y.shape, dtype=F64).to(y.dtype))
        found = launches - before
        # a block: X again for the recomputed half, da twice, X + skip, sums; the stem: da
        wanted = {"depthwise_bwd_weight_kernel": 2, "training_rows_kernel": 2 * 5 + 1} if model is fused else {}
        assert {name: found[name] for name in wanted} == wanted, found
        assert bool(found) == bool(wanted)
        return y

    plain_models.check_step(fused, plain, X[:2, :, :14, :14], run=step)


def test_operators_alone() -> None:
    """The public training forms, with a gradient outside of use()."""
    from cmx_kernels import ops

    x = torch.randn(2, 3, 4, 5, requires_grad=True)
    weights = {"depthwise_block": (3, 1, 2, 2), "pointwise_block": (5, 3, 1, 1), "patch_embed": (5, 3, 2, 2)}
    for op, shape in weights.items():
        weight = (torch.randn(shape) / math.sqrt(math.prod(shape[1:]))).requires_grad_()
        results = []
        for name in ("triton", "reference"):
            with backends.use(name):
                y, mean, var = getattr(ops, f"{op}_train")(x, weight)
            results.append((y, mean, var, *torch.autograd.grad(y.square().sum() + (y**3).sum(), (x, weight))))
        for out, want in zip(*results, strict=True):
            torch.testing.assert_close(out, want, rtol=1e-4, atol=1e-4)
