"""The last layer inside the one call of a network: when it joins, that it computes the same, and when it must not."""

from collections.abc import Callable
from types import MethodType

import cases
import pytest
import torch
from compare import Expected, check, check_equal
from plain_models import check_against, counted, fused_and_plain, needs_kernels
from test_block_stack import F32, F64, STACKS, Case, _layers, _one_by_one
from torch import nn

from cmx_kernels import explain
from cmx_kernels.ops import block_stack as stack

X = torch.randn(2, 3, 28, 35, generator=torch.Generator().manual_seed(2))


@pytest.mark.parametrize("classes", (1, 3, 10, 21))
@pytest.mark.parametrize("dtype", cases.DTYPES, ids=cases.name)
@pytest.mark.parametrize("case", (STACKS[0], STACKS[1], STACKS[4], STACKS[9]), ids=str)
def test_error_rule(isa: str, case: Case, dtype: torch.dtype, classes: int) -> None:
    """Against float64; and the bits of the mean, in float32 as it is kept, multiplied by itself."""
    x, layers = torch.randn(case[0]).to(dtype), _layers(case, dtype)
    weight, bias = (torch.randn(classes, case[1]) * case[1] ** -0.5).to(dtype), torch.randn(classes).to(dtype)
    for b in (bias, None):
        packed = stack.pack(*layers, "gelu", dtype)
        out = stack.block_stack(x, packed, True, weight, b)
        exact, plain = (
            nn.functional.linear(
                _one_by_one(x, layers, "gelu", True, c, s).to(c), weight.to(c), b if b is None else b.to(c)
            )
            for c, s in ((F64, F64), (F32, dtype))
        )
        largest = exact.abs().max().expand(exact.shape) if exact.numel() else exact
        check(out, Expected(exact, plain.to(dtype).to(F32), largest, case[1], dtype))
        for i in range(min(len(x), 3)):
            check_equal(out[i], stack.block_stack(x[i : i + 1], packed, True, weight, b)[0], f"image {i} by itself")


def _hook(net: nn.Module) -> None:
    net.head.register_forward_hook(lambda module, args, out: out + 1)


def _replace_forward(net: nn.Module) -> None:
    net.head.forward = MethodType(lambda self, x: nn.Linear.forward(self, x) + 1, net.head)


def _derive(net: nn.Module) -> None:
    kind = type("Doubled", (nn.Linear,), {"forward": lambda self, x: 2 * nn.Linear.forward(self, x)})
    net.head.__class__ = kind


def _hook_before(net: nn.Module) -> None:
    net.head_drop.register_forward_hook(lambda module, args, out: out + 1)


def _method(net: nn.Module) -> None:
    net.forward_head = MethodType(lambda self, x: type(self).forward_head(self, x) + 1, net)


def _rows_apart(net: nn.Module) -> None:
    net.head.weight = nn.Parameter(torch.cat([net.head.weight] * 2, 1).detach()[:, ::2], requires_grad=False)


ASIDE: dict[str, Callable[[nn.Module], object]] = {
    "hook": _hook,
    "hook before it": _hook_before,
    "forward": _replace_forward,
    "class": _derive,
    "forward_head": _method,
    "strides": _rows_apart,
    "no head": lambda net: net.reset_classifier(0),
    "two layers": lambda net: setattr(net, "head", nn.Sequential(net.head, nn.ReLU())),
}
JOINS: dict[str, Callable[[nn.Module], object]] = {
    "as it is": lambda net: None,
    "no bias": lambda net: net.head.register_parameter("bias", None),
    "new values": lambda net: net.head.weight.mul_(2),
    "values behind the counter": lambda net: net.head.weight.data.mul_(2),
    "another weight": lambda net: setattr(net, "head", nn.Linear(32, 7).eval()),
}


@needs_kernels
@pytest.mark.parametrize("name", (*ASIDE, *JOINS))
@pytest.mark.parametrize("kind", ("ours", "timm"))
@torch.no_grad()
def test_changes_of_the_head_are_followed(kind: str, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    fused, plain = fused_and_plain(kind)
    with counted(monkeypatch, heads=True) as joined:
        fused(X)
        assert joined == [True]
        for net in (fused, plain):
            torch.manual_seed(3)
            (ASIDE | JOINS)[name](net)
        check_against(fused(X), plain, X)
        assert joined == [True, name in JOINS]
    rows = [row.backend for row in explain(fused, X)]
    assert rows[:4] == ["cpu"] * 4
    if name not in ("forward_head", "no head"):
        assert (rows[-1] == "cpu") == (name in JOINS)


@needs_kernels
def test_calls_that_keep_it_aside(monkeypatch: pytest.MonkeyPatch) -> None:
    """A gradient of it alone, dropout before it, autocast: each with the plain model's result."""
    fused, plain = fused_and_plain("ours")
    for net in (fused, plain):
        net.requires_grad_(False).head.requires_grad_()
    with counted(monkeypatch, heads=True) as joined:
        fused(X).sum().backward()
        plain(X).sum().backward()
        assert not any(row.backend == "cpu" for row in explain(fused, X) if row.part == "head")
        torch.testing.assert_close(fused.head.weight.grad, plain.head.weight.grad)
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            assert fused(X).dtype == torch.bfloat16
        with torch.no_grad():
            fused.head_drop = nn.Dropout(0.9)  # in training mode
            assert not torch.equal(fused(X), fused(X))
            assert joined == [False] * 4
            fused.head_drop.eval()
            check_against(fused(X), plain, X)
        assert joined == [False] * 4 + [True]


@needs_kernels
@torch.no_grad()
def test_the_papers_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """What stands behind the pool in an nn.Sequential, and more behind that."""
    fused, plain = fused_and_plain("paper")
    with counted(monkeypatch, heads=True) as joined:
        check_against(fused(X), plain, X)
        for net in (fused, plain):
            net.append(nn.Sequential(nn.ReLU(), nn.Linear(10, 3)).requires_grad_(False))
            torch.nn.init.ones_(net[-1][1].weight), torch.nn.init.ones_(net[-1][1].bias)
        check_against(fused(X), plain, X)
        assert [row.backend for row in explain(fused, X)][-2:] == ["cpu", "torch"]
        assert joined == [True, True]


def test_errors(isa: str) -> None:
    packed = stack.pack(*_layers(STACKS[0], F32), "gelu", F32)
    x, weight, bias = torch.randn(STACKS[0][0]), torch.randn(10, 19), torch.randn(10)
    for args, says in (
        ((False, weight), r"head: got a weight with pool=False"),
        ((True, None, bias), r"head_bias: got a tensor without a head"),
        ((True, weight[:, :18]), r"weight: got .*, wanted .*\[classes, C\]"),
        ((True, weight.double()), r"weight: wanted a CPU tensor in x's dtype"),
        ((True, weight, bias[:9]), r"head_bias: got"),
    ):
        with pytest.raises(RuntimeError, match=says):
            stack.block_stack(x, packed, *args)
