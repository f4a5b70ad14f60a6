"""What is invalid raises, names the argument, what it got, what it wants and the way out, and writes nothing."""

import re

import cases
import pytest
import torch
from compare import check, check_equal
from torch import Tensor, nn

from cmx_kernels import ops
from cmx_kernels.ops import batchnorm

BLOCKS = ("patch_embed", "depthwise_block", "pointwise_block")
ARGUMENTS = ("x", "weight", "bias", "scale", "shift", "act", "residual")


def _good(op: str, dtype: torch.dtype = torch.float32) -> dict[str, object]:
    names = ("x", "weight", "bias") if op == "pool_head" else ARGUMENTS
    return dict(zip(names, cases.inputs(op, cases.RAGGED[op], dtype), strict=False))


def _refused(op: str, error: type[Exception], message: str, **changes: object) -> None:
    """The call raises this error with this message, and no argument has changed."""
    args = _good(op) | changes
    tensors = [a for a in args.values() if type(a) is Tensor and a.layout == torch.strided and a.device.type == "cpu"]
    before = [(t._version, t.clone()) for t in tensors]
    with pytest.raises(error, match=message) as caught:
        getattr(ops, op)(*args.values())
    assert caught.type is error, f"got {caught.type.__name__}, wanted {error.__name__}"
    for tensor, (version, value) in zip(tensors, before, strict=True):
        assert tensor._version == version
        assert tensor.is_quantized or torch.equal(tensor, value)


@pytest.mark.parametrize("op", cases.OPS)
def test_rank_of_x(op: str) -> None:
    x = _good(op)["x"]
    _refused(
        op, ValueError, rf"x: got shape {re.escape(str(list(x[0].shape)))}, wanted .*\[N, C, H, W\].*x\[None\]", x=x[0]
    )
    for bad in (x[None], x[0, 0], x.flatten(), x.sum()):
        _refused(
            op,
            ValueError,
            rf"x: got shape {re.escape(str(list(bad.shape)))}, wanted 4 dimensions \[N, C, H, W\]",
            x=bad,
        )


@pytest.mark.parametrize("op", cases.OPS)
def test_rank_and_shape_of_the_weight(op: str) -> None:
    w = _good(op)["weight"]
    bad = [w[0], w[None], w[..., :-1] if op == "pool_head" else torch.cat([w, w], 1), w.flatten(), w.sum()]
    if op == "pointwise_block":
        bad += [w.expand(-1, -1, 3, 3), w.flatten(1)]
    if op == "depthwise_block":
        bad += [w[:-1], torch.cat([w, w]), w.expand(-1, 19, -1, -1), w[:, 0], w[:, :0]]
    for weight in bad:
        shape = re.escape(str(list(weight.shape)))
        _refused(op, ValueError, rf"weight: got shape {shape}, wanted \[\w+, .*\(x has \d+ channels\)", weight=weight)


@pytest.mark.parametrize("op", cases.OPS)
def test_channels_of_x(op: str) -> None:
    x = _good(op)["x"]
    for bad in (x[:, :-1], torch.cat([x, x], 1)):
        _refused(op, ValueError, rf"weight: got shape .*wanted .*x has {bad.shape[1]} channels", x=bad)
    _refused(op, ValueError, r"x: got shape .*wanted at least one channel", x=x[:, :0])


@pytest.mark.parametrize(
    "dtype",
    (torch.int64, torch.int32, torch.uint8, torch.bool, torch.complex64, torch.complex128, torch.float8_e4m3fn),
    ids=cases.name,
)
@pytest.mark.parametrize("op", cases.OPS)
def test_dtype_of_x(op: str, dtype: torch.dtype) -> None:
    good = _good(op)
    wanted = rf"x: got dtype {dtype}, wanted float32, float16, bfloat16 or float64; .*\.to\(\)"
    _refused(op, TypeError, wanted, x=good["x"].to(dtype))
    _refused(op, TypeError, wanted, x=good["x"].to(dtype), weight=good["weight"].to(dtype))


@pytest.mark.parametrize(
    "dtype", (torch.float64, torch.float16, torch.bfloat16, torch.int64, torch.complex64), ids=cases.name
)
@pytest.mark.parametrize("op", cases.OPS)
def test_mixed_dtypes(op: str, dtype: torch.dtype) -> None:
    weight = _good(op)["weight"].to(dtype)
    _refused(
        op, TypeError, rf"weight: got dtype {dtype} with x in torch.float32, wanted the same.*autocast", weight=weight
    )


@pytest.mark.parametrize("op", cases.OPS)
def test_vectors(op: str) -> None:
    good = _good(op)
    rows = len(good["weight"])
    for name in ("bias",) if op == "pool_head" else ("bias", "scale", "shift"):
        v = good[name]
        for bad in (v[:-1], torch.cat([v, v]), v[:0], v[:1], v[:, None], v.view(1, -1, 1, 1), v.sum()):
            shape = re.escape(str(list(bad.shape)))
            _refused(op, ValueError, rf"{name}: got shape {shape}, wanted \[{rows}\], one value per", **{name: bad})
        for dtype in (torch.float64, torch.float16, torch.int64, torch.bool, torch.complex64):
            wanted = rf"{name}: got dtype {dtype} with x in torch.float32, wanted torch.float32"
            _refused(op, TypeError, wanted, **{name: v.to(dtype)})
        _refused(op, TypeError, rf"{name}: got float, wanted a torch.Tensor \[{rows}\] or None", **{name: 1.0})
        _refused(
            op, ValueError, rf"{name}: got device meta with x on cpu, wanted the same.*\.to\(\)", **{name: v.to("meta")}
        )


@pytest.mark.parametrize("op", cases.OPS)
def test_mixed_devices(op: str) -> None:
    good = _good(op)
    _refused(
        op,
        ValueError,
        r"weight: got device meta with x on cpu, wanted the same; .*\.to\(\)",
        weight=good["weight"].to("meta"),
    )
    _refused(
        op, ValueError, r"weight: got device cpu with x on meta, wanted the same; .*\.to\(\)", x=good["x"].to("meta")
    )


@pytest.mark.parametrize("op", cases.OPS)
def test_everything_on_meta_is_fine(op: str) -> None:
    args = [a.to("meta") if isinstance(a, Tensor) else a for a in _good(op).values()]
    out = getattr(ops, op)(*args)
    assert out.is_meta
    assert out.shape == cases.problem(op, cases.RAGGED[op])[1].ref.shape


@pytest.mark.parametrize("op", cases.OPS)
def test_layouts_that_are_not_dense(op: str) -> None:
    good = _good(op)
    for name in ("x", "weight"):
        t = good[name]
        for sparse in (t.to_sparse(), t.to_mkldnn(), *((t.to_sparse_csr(),) if t.dim() == 2 else ())):
            layout = re.escape(str(sparse.layout))
            _refused(
                op, TypeError, rf"{name}: got layout {layout}, wanted a dense tensor; .*to_dense\(\)", **{name: sparse}
            )
        quantized = torch.quantize_per_tensor(t, 0.1, 0, torch.qint8)
        _refused(
            op, TypeError, rf"{name}: got .*quantized.*, wanted a dense tensor; .*dequantize\(\)", **{name: quantized}
        )


@pytest.mark.parametrize("op", cases.OPS)
def test_things_that_are_not_tensors(op: str) -> None:
    good = _good(op)
    for name in ("x", "weight"):
        for thing in (good[name].tolist(), good[name].numpy(), None, 3.0):
            _refused(op, TypeError, rf"{name}: got {type(thing).__name__}, wanted a torch.Tensor", **{name: thing})


@pytest.mark.parametrize("act", ("swish", "GELU", "", None, 3, nn.GELU()), ids=str)
@pytest.mark.parametrize("op", BLOCKS)
def test_activation(op: str, act: object) -> None:
    _refused(op, ValueError, r"act: got .*, wanted one of gelu, gelu_tanh, relu, none", act=act)


@pytest.mark.parametrize("kernel", ((32, 3), (3, 32), (33, 33), (0, 3), (3, 0)), ids=cases.name)
def test_kernel_size(kernel: tuple[int, int]) -> None:
    kh, kw = kernel
    wanted = rf"weight: got a {kh}x{kw} kernel, wanted 1 to 31 on each side; use nn.Conv2d"
    _refused("depthwise_block", ValueError, wanted, weight=torch.zeros(19, 1, kh, kw))


def test_image_smaller_than_a_patch() -> None:
    x = _good("patch_embed")["x"]
    for bad in (x[:, :, :3], x[..., :2], x[:, :, :0]):
        pixels = f"{bad.shape[2]}x{bad.shape[3]}"
        _refused(
            "patch_embed", ValueError, rf"x: got an image of {pixels} pixels, wanted .*patch of 4x3; resize", x=bad
        )


def test_nothing_to_average() -> None:
    _refused(
        "pool_head", ValueError, r"x: got shape \[2, 19, 0, 7\], wanted at least one pixel", x=torch.zeros(2, 19, 0, 7)
    )


def test_batchnorm_without_statistics() -> None:
    bn = nn.BatchNorm2d(4, track_running_stats=False).eval()
    with pytest.raises(
        ValueError, match=r"running_mean: got None, wanted the running statistics.*track_running_stats=True"
    ):
        batchnorm.fold(bn)
    assert "track_running_stats" in batchnorm.why_not_fold(bn)
    assert "training mode" in batchnorm.why_not_fold(nn.BatchNorm2d(4))
    assert "InstanceNorm2d" in batchnorm.why_not_fold(nn.InstanceNorm2d(4).eval())
    for bn in (nn.BatchNorm2d(4), nn.SyncBatchNorm(4)):
        assert batchnorm.why_not_fold(bn.eval()) is None


@pytest.mark.parametrize("dtype", (torch.float32, torch.float64, torch.bfloat16), ids=cases.name)
@pytest.mark.parametrize("affine", (True, False))
def test_batchnorm_folds_to_what_it_computes(affine: bool, dtype: torch.dtype) -> None:
    bn = nn.BatchNorm2d(4, affine=affine).to(dtype).eval()
    with torch.no_grad():
        for t in bn.state_dict().values():
            t.copy_(torch.rand(t.shape) + 0.5)
    scale, shift = batchnorm.fold(bn)
    assert scale.dtype == shift.dtype == torch.promote_types(dtype, torch.float32)
    x = torch.randn(2, 4, 3, 3, dtype=torch.float64)
    got = x * scale.double()[:, None, None] + shift.double()[:, None, None]
    torch.testing.assert_close(got, bn.double()(x), rtol=1e-6 if dtype != torch.float64 else 1e-14, atol=1e-6)


def test_a_refused_call_leaves_the_next_one_right() -> None:
    args, expected = cases.problem("depthwise_block", cases.RAGGED["depthwise_block"])
    with pytest.raises(ValueError):
        ops.depthwise_block(args[0], args[1], act="swish")
    check(ops.depthwise_block(*args), expected)
    check_equal(ops.depthwise_block(*args), torch.ops.cmx.depthwise_block(*args))
