"""Operators under torch.func, forward-mode differentiation, counters, profilers, and deterministic algorithms."""

import subprocess
import sys

import cases
import pytest
import torch
from cases import RAGGED
from plain_models import FUSED, fused_and_plain, needs_kernels
from torch import Tensor
from torch.autograd import forward_ad
from torch.utils.flop_counter import FlopCounterMode, flop_registry
from transforms import TRANSFORMS, check_forward_mode_is_refused, tangent

from cmx_kernels import ConvMixer, backends, ops, unfuse, use

pytestmark = pytest.mark.filterwarnings("ignore:cmx_kernels", "ignore::DeprecationWarning")
X = torch.randn(2, 3, 28, 35, generator=torch.Generator().manual_seed(2))


def _loss(op: str) -> tuple[object, Tensor, Tensor]:
    """(a scalar function of x, x, a direction), in float64 in which differences are exact enough."""
    x, *rest = cases.inputs(op, RAGGED[op], torch.float64)
    return lambda v: getattr(ops, op)(v.float(), *_single(rest)).double().square().sum(), x, torch.randn_like(x)


def _single(rest: list[object]) -> list[object]:
    return [a.float() if isinstance(a, Tensor) else a for a in rest]


@pytest.mark.parametrize("op", cases.OPS)
def test_derivatives_agree(op: str) -> None:
    """Forward mode, torch.func and backward: one directional derivative, taken four ways; a kernel would lose it."""
    loss, x, v = _loss(op)
    leaf = x.clone().requires_grad_()
    wanted = (torch.autograd.grad(loss(leaf), leaf)[0] * v).sum()
    with forward_ad.dual_level():
        dual = forward_ad.unpack_dual(loss(forward_ad.make_dual(x, v))).tangent
    assert dual is not None, "the tangent is lost"
    for got in (dual, torch.func.jvp(loss, (x,), (v,))[1], (torch.func.grad(loss)(x) * v).sum()):
        torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("op", cases.OPS)
def test_vmap_over_every_argument(op: str) -> None:
    args = cases.inputs(op, RAGGED[op])
    for i, arg in enumerate(args):
        if not isinstance(arg, Tensor):
            continue

        def call(v: Tensor, i: int = i) -> Tensor:
            return getattr(ops, op)(*args[:i], v, *args[i + 1 :])

        several = torch.stack([arg, 2 * arg, -arg])
        torch.testing.assert_close(torch.vmap(call)(several), torch.stack([call(v) for v in several]))


@needs_kernels
def test_forced_kernels_refuse_transforms() -> None:
    args = cases.inputs("pool_head", RAGGED["pool_head"])
    with use("cpu"), pytest.raises(RuntimeError, match="forward-mode differentiation is at work"):
        torch.func.jvp(lambda v: ops.pool_head(v, *args[1:]), args[:1], args[:1])
    assert not backends.transformed()


TRAINED = ("patch_embed", "depthwise_block", "pointwise_block")


@pytest.mark.parametrize("transform", ("jvp", "forward mode"))
@pytest.mark.parametrize("op", cases.OPS)
def test_dispatcher_operators_refuse_forward_mode(op: str, transform: str) -> None:
    check_forward_mode_is_refused("cmx", op, transform)


@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("op", TRAINED)
def test_training_forms_refuse_transforms(op: str, transform: str) -> None:
    """In a sentence, whose way out gives the same values and takes the transform."""
    x, weight, bias, gamma, beta, *_ = cases.inputs(op, RAGGED[op])
    train = getattr(ops, f"{op}_train")
    residual = {"residual": False} if op == "depthwise_block" else {}
    with pytest.raises(RuntimeError, match=f"^{op}_train: a torch.func transform .*batch_norm"):
        TRANSFORMS[transform](lambda v: train(v, weight, bias, gamma, beta)[0], x)

    def way_out(v: Tensor) -> Tensor:
        a = getattr(ops, op)(v, weight, bias, **residual)
        return torch.nn.functional.batch_norm(a, None, None, gamma, beta, training=True)

    torch.testing.assert_close(way_out(x), train(x, weight, bias, gamma, beta, **residual)[0], rtol=1e-4, atol=1e-4)
    assert torch.isfinite(TRANSFORMS[transform](way_out, x)).all()


@pytest.mark.parametrize("op", cases.OPS)
def test_batches_of_gradients_of_operators(op: str) -> None:
    x, *rest = cases.inputs(op, RAGGED[op])
    y = getattr(ops, op)(x.requires_grad_(), *rest)
    grads = torch.stack([torch.ones_like(y), y.detach()])
    (got,) = torch.autograd.grad(y, x, grads, retain_graph=True, is_grads_batched=True)
    wanted = [torch.autograd.grad(y, x, grad, retain_graph=True)[0] for grad in grads]
    torch.testing.assert_close(got, torch.stack(wanted))


@needs_kernels
@pytest.mark.parametrize("training", [False, True])
def test_fused_models_refuse_what_their_gradients_cannot(training: bool) -> None:
    """Batches of gradients, tangents of gradients, second derivatives; none is silently zero. Plain modules can."""
    model = ConvMixer(16, 1, 3, 7, 4).train(training)
    x = X.clone().requires_grad_()
    y = model(x)

    def vjp(grad: Tensor) -> Tensor:
        return torch.autograd.grad(y, x, grad, retain_graph=True)[0]

    several = torch.stack([torch.ones_like(y), y.detach()])
    for call in (
        lambda: torch.autograd.grad(y, x, several, retain_graph=True, is_grads_batched=True),
        lambda: torch.vmap(vjp)(several),
        lambda: tangent(vjp, torch.ones_like(y)),
        lambda: torch.autograd.functional.hvp(lambda v: model(v).square().sum(), X, X),
    ):
        with pytest.raises(RuntimeError, match=r"^grad: got a .*unfuse\(model\) trains in plain PyTorch"):
            call()
    plain = unfuse(model)
    y = plain(x)
    assert torch.isfinite(tangent(vjp, torch.ones_like(y))).all()
    assert torch.autograd.functional.hvp(lambda v: plain(v).square().sum(), X, X)[1].abs().max() > 0


def _flops(call: object, *args: object) -> int:
    with FlopCounterMode(display=False) as counter:
        call(*args)
    return counter.get_total_flops()


@pytest.mark.parametrize("op", cases.OPS)
@torch.no_grad()
def test_flops_of_operators(op: str) -> None:
    """What PyTorch counts in the reference, which is made of its own operators."""
    args = cases.inputs(op, RAGGED[op])
    with use("reference"):
        wanted = _flops(getattr(ops, op), *args)
    assert _flops(getattr(torch.ops.cmx, op), *args) == wanted > 0


@needs_kernels
def test_every_operator_has_a_formula() -> None:
    names = {name.partition("::")[2] for name in torch._C._dispatch_get_all_op_names() if name.startswith("cmx::")}
    assert not [name for name in names if getattr(torch.ops.cmx, name.partition(".")[0]) not in flop_registry]


@needs_kernels
@pytest.mark.parametrize("name", FUSED)
@torch.no_grad()
def test_flops_of_the_stack_are_those_of_the_plain_model(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A counter switches a model to PyTorch's operators; here the whole stack stays one operator."""
    fused, plain = fused_and_plain(name)
    wanted = _flops(plain, X)
    assert _flops(fused, X) == wanted
    monkeypatch.setattr("cmx_kernels.models.obstacles._dispatch_modes", lambda: 0)
    assert _flops(fused, X) == wanted


@needs_kernels
@pytest.mark.parametrize("op", TRAINED)
@pytest.mark.parametrize("need", [(True, True), (True, False), (False, True)])
@torch.no_grad()
def test_flops_of_training(op: str, need: tuple[bool, bool]) -> None:
    x, weight = cases.inputs(op, RAGGED[op])[:2]
    before = {"patch_embed": [], "depthwise_block": [None], "pointwise_block": [None, None, None]}[op]
    a, _ = getattr(torch.ops.cmx, f"{op}_train")(x, *before, weight, None, "gelu")
    wanted = _flops(getattr(torch.ops.cmx, op), x, weight, None, None, None, "gelu", *[False] * (op[0] == "d"))
    assert _flops(getattr(torch.ops.cmx, f"{op}_train"), x, *before, weight, None, "gelu") == wanted
    args = (a, a, torch.ones(4, a.shape[1]), x, *before, weight, "gelu", *[False] * (op[0] == "d"), *need)
    assert _flops(getattr(torch.ops.cmx, f"{op}_backward"), *args) == sum(need) * wanted


def test_formulas_reach_a_counter_that_is_imported_later() -> None:
    code = (
        "import sys, torch, cmx_kernels; assert 'torch.utils.flop_counter' not in sys.modules;"
        "from torch.utils.flop_counter import flop_registry; print(torch.ops.cmx.pool_head in flop_registry)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.strip() == "True", done.stderr


def _ranges(call: object, *args: object) -> set[str]:
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        call(*args)
    return {event.key for event in profile.key_averages() if event.key.startswith("cmx_kernels.")}


@needs_kernels
@torch.no_grad()
def test_profiler_shows_the_backend() -> None:
    for op in cases.OPS:
        args = cases.inputs(op, RAGGED[op])
        assert _ranges(getattr(ops, op), *args) == {f"cmx_kernels.{op} [cpu]"}
        with use("reference"):
            assert _ranges(getattr(ops, op), *args) == {f"cmx_kernels.{op} [reference]"}
    model = ConvMixer(16, 1, 3, 7, 4).eval()
    assert _ranges(model, X) == {"cmx_kernels.block_stack [cpu]"}
    with torch.enable_grad():
        found = _ranges(lambda x: model(x).sum().backward(), X)
    kinds = ("patch_embed", "depthwise_block", "pointwise_block")
    assert {f"cmx_kernels.{kind}_{way} [cpu]" for kind in kinds for way in ("train", "backward")} <= found


@torch.no_grad()
def test_no_ranges_without_a_profiler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.autograd.profiler, "record_function", None)
    args = cases.inputs("pool_head", RAGGED["pool_head"])
    assert ops.pool_head(*args).shape == torch.ops.cmx.pool_head(*args).shape


@pytest.mark.parametrize("op", cases.OPS)
def test_deterministic_algorithms(op: str) -> None:
    """Nothing in forward or backward is on PyTorch's list of what is not deterministic; two runs give the same bits."""
    torch.use_deterministic_algorithms(True)
    runs = []
    for _ in range(2):
        args = cases.with_layout(op, "contiguous", grad=True)
        out = getattr(ops, op)(*args)
        leaves = [a for a in args if isinstance(a, Tensor)]
        runs.append([out, *torch.autograd.grad(out, leaves, torch.ones_like(out))])
    for first, second in zip(*runs, strict=True):
        assert torch.equal(first, second)
