"""ConvMixer as other people write it, and the error rule for whole networks."""

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from cmx_kernels import ConvMixer, backends, fuse
from cmx_kernels.ops import block_stack

NATIVE = backends.registry.C is not None


class Residual(nn.Module):
    def __init__(self, fn: nn.Module) -> None:
        super().__init__()
        self.fn = fn

    def forward(self, x: Tensor) -> Tensor:
        return self.fn(x) + x


def paper(
    dim: int, depth: int, kernel: int = 9, patch: int = 7, classes: int = 1000, padding: Any = "same"
) -> nn.Sequential:
    """The layout of the authors' repository: everything in one nn.Sequential."""

    def block() -> nn.Sequential:
        inner = nn.Sequential(nn.Conv2d(dim, dim, kernel, groups=dim, padding=padding), nn.GELU(), nn.BatchNorm2d(dim))
        return nn.Sequential(Residual(inner), nn.Conv2d(dim, dim, 1), nn.GELU(), nn.BatchNorm2d(dim))

    return nn.Sequential(
        nn.Conv2d(3, dim, patch, stride=patch),
        nn.GELU(),
        nn.BatchNorm2d(dim),
        *(block() for _ in range(depth)),
        nn.AdaptiveAvgPool2d((1, 1)),
        nn.Flatten(),
        nn.Linear(dim, classes),
    )


def short(dim: int, depth: int, kernel: int = 9, patch: int = 7, classes: int = 1000) -> nn.Sequential:
    """The layout of the paper's 280-character version: nested, symmetric padding, an anonymous residual class."""

    def unit(conv: nn.Conv2d) -> nn.Sequential:
        return nn.Sequential(conv, nn.GELU(), nn.BatchNorm2d(dim))

    residual = type("", (nn.Sequential,), {"forward": lambda self, x: self[0](x) + x})
    blocks = [
        nn.Sequential(
            residual(unit(nn.Conv2d(dim, dim, kernel, groups=dim, padding=kernel // 2))), unit(nn.Conv2d(dim, dim, 1))
        )
        for _ in range(depth)
    ]
    patches = nn.Conv2d(3, dim, patch, patch)
    return nn.Sequential(unit(patches), *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(dim, classes))


def timms(dim: int, depth: int, kernel: int = 9, patch: int = 7, classes: int = 1000, **kw: Any) -> nn.Module:
    convmixer = pytest.importorskip("timm.models.convmixer")
    return convmixer.ConvMixer(dim, depth, kernel_size=kernel, patch_size=patch, num_classes=classes, **kw)


FAMILY: dict[str, Callable[..., nn.Module]] = {
    "timm": timms,
    "paper": paper,
    "paper_symmetric": lambda dim, depth, kernel=9, *rest: paper(dim, depth, kernel, *rest, padding=kernel // 2),
    "short": short,
}


FUSED: dict[str, tuple[Callable[[], nn.Module], Callable[[], nn.Module]]] = {
    "ours": (lambda: ConvMixer(32, 3, 5, 7, 10), lambda: ConvMixer(32, 3, 5, 7, 10, fused=False)),
    "timm": (lambda: fuse(timms(32, 3, 5, 7, 10)), lambda: timms(32, 3, 5, 7, 10)),
    "paper": (lambda: fuse(paper(32, 3, 5, 7, 10)), lambda: paper(32, 3, 5, 7, 10)),
}


def fused_and_plain(name: str) -> tuple[nn.Module, nn.Module]:
    """A fused model and its equal that never was fused."""
    make_fused, make_plain = FUSED[name]
    fused, plain = trained(make_fused()), make_plain().eval()
    plain.load_state_dict(fused.state_dict())
    return fused, plain


def trained(model: nn.Module, seed: int = 1) -> nn.Module:
    """As if trained, in eval mode: BatchNorm with statistics and affine of its own, so that folding it matters."""
    draw = torch.Generator().manual_seed(seed)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            with torch.no_grad():
                for tensor, low, high in (
                    (module.weight, 0.5, 1.5),
                    (module.bias, -0.5, 0.5),
                    (module.running_mean, -0.5, 0.5),
                    (module.running_var, 0.25, 2.0),
                ):
                    if tensor is not None:
                        tensor.uniform_(low, high, generator=draw)
    return model.eval()


def check_against(out: Tensor, plain: nn.Module, x: Tensor, what: str = "logits") -> None:
    """|out - ref| <= 2 max|eager in this dtype - ref| + 8 ulp of the largest; ref is the eager model in float64."""
    with torch.no_grad():
        eager = plain(x)
        ref = copy.deepcopy(plain).double()(x.double())
    assert (out.dtype, out.shape) == (eager.dtype, eager.shape), f"{what}: {out.dtype} {list(out.shape)}"
    eps = 8 * torch.finfo(out.dtype).eps * ref.abs().max()
    error, allowed = (out.double() - ref).abs().max(), 2 * (eager.double() - ref).abs().max() + eps
    assert error <= allowed, f"{what}: wrong by {error:.3g}, allowed {allowed:.3g}, largest {ref.abs().max():.3g}"


def one_step(model: nn.Module, image: Tensor) -> Tensor:
    """Forward, and backward from random numbers; returns the output."""
    y = model(image)
    torch.manual_seed(5)
    y.backward(torch.randn(y.shape, dtype=torch.float64).to(y))
    return y


Run = Callable[[nn.Module, Tensor], Tensor]


def check_step(
    fused: nn.Module, plain: nn.Module, x: Tensor, autocast: torch.dtype | None = None, run: Run = one_step
) -> None:
    """``run`` both: output, gradients (of x too), parameters and buffers under the error rule.

    ref is the eager model in float64; a BatchNorm behind it makes gradients differences of sums, so that eps is 8 ulp
    of the largest gradient there is. Leaves the gradients in ``fused`` and ``plain``.
    """
    exact = copy.deepcopy(plain).double()
    found = []
    for model, input_dtype in ((exact, torch.float64), (plain, x.dtype), (fused, x.dtype)):
        image = x.detach().to(input_dtype).requires_grad_()
        with torch.autocast("cpu", autocast or torch.bfloat16, enabled=autocast is not None and model is not exact):
            y = run(model, image)
        gradients = {"x": image.grad} | {k: p.grad for k, p in model.named_parameters()}
        found.append(
            (
                {"output": y} | dict(model.named_buffers()) | {f"{k} itself": p for k, p in model.named_parameters()},
                {k: t for k, t in gradients.items() if t is not None},
            )
        )
    largest = max((t.abs().max() for t in found[0][1].values()), default=0.0)
    for ref, eager, out in zip(*found, strict=True):
        assert out.keys() == eager.keys()
        for key in ref:
            size = max(ref[key].abs().max(), largest if ref is found[0][1] else 0)
            eps = 8 * torch.finfo(autocast or x.dtype).eps * size
            error, allowed = (
                (out[key].double() - ref[key]).abs().max(),
                2 * (eager[key].double() - ref[key]).abs().max(),
            )
            assert (out[key].dtype, out[key].shape) == (eager[key].dtype, eager[key].shape), key
            assert error <= allowed + eps, f"{key}: wrong by {error:.3g}, allowed {allowed + eps:.3g}"


@contextmanager
def counted(monkeypatch: pytest.MonkeyPatch, heads: bool = False) -> Iterator[list[bool]]:
    """Collects one entry for each call of the whole-stack kernel: ``pool``, or whether it had the last layer."""
    calls: list[bool] = []
    real = block_stack.block_stack

    def counting(x: Tensor, packed: Any, pool: bool = False, *head: Tensor | None) -> Tensor:
        calls.append(bool(head) if heads else pool)
        return real(x, packed, pool, *head)

    with monkeypatch.context() as patch:
        patch.setattr(block_stack, "block_stack", counting)
        yield calls


needs_kernels = pytest.mark.skipif(not NATIVE, reason=f"no compiled kernels: {backends.registry.WHY_NO_C}")
