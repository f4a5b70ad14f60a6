"""Single layers: their arithmetic, and the same in plain PyTorch and fused, on the same weights."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import prod
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.fields import Work
from benchmarks.networks import DTYPES

CLASSES = 1000
MODULES = ("depthwise_layer", "depthwise_train_layer")
Run = Callable[[Tensor], Sequence[Tensor]]


class Shape(NamedTuple):
    """c, h, w: of the output; of the input for pool_head. k: the kernel, or the side of a patch."""

    op: str
    k: int
    batch: int
    c: int
    h: int
    w: int
    dtype: str

    def __str__(self) -> str:
        return f"{self.op}-k{self.k}-n{self.batch}-c{self.c}-{self.h}x{self.w}-{self.dtype}"

    @property
    def trains(self) -> bool:
        """Forward, on the statistics of the batch where there is a BatchNorm, and backward."""
        return "_train" in self.op

    @property
    def input(self) -> tuple[int, ...]:
        if self.op == "patch_embed":
            return self.batch, 3, self.h * self.k, self.w * self.k
        return self.batch, self.c, self.h, self.w

    @property
    def weight(self) -> tuple[int, ...]:
        if self.op == "pool_head":
            return CLASSES, self.c
        return self.c, {"pointwise_block": self.c, "patch_embed": 3}.get(self.op, 1), self.k, self.k

    @property
    def output(self) -> tuple[int, ...]:
        return (self.batch, CLASSES) if self.op == "pool_head" else (self.batch, self.c, self.h, self.w)

    @property
    def work(self) -> Work:
        """x, y and the weight, each moved once; backward is twice the work of forward."""
        times = 3 if self.trains else 1
        flop = 2 * times * prod(self.output) * prod(self.weight[1:])
        moved = times * DTYPES[self.dtype].itemsize * sum(map(prod, (self.input, self.output, self.weight)))
        depthwise = self.op.startswith("depthwise")
        return Work(self.batch, flop if depthwise else 0, 0 if depthwise else flop, moved)


@dataclass
class Layer:
    """A layer in plain PyTorch, in one dtype; its BatchNorm in float32 at least, as under autocast."""

    shape: Shape
    weight: Tensor
    bias: Tensor
    norm: tuple[Tensor, ...]  # mean, variance, weight, bias

    @staticmethod
    def random(s: Shape) -> "Layer":
        torch.manual_seed(0)
        weight = torch.randn(s.weight) / prod(s.weight[1:]) ** 0.5
        c = s.weight[0]
        norm = (torch.randn(c) / 4, torch.rand(c) + 0.5, torch.rand(c) + 0.5, torch.randn(c) / 4)
        return Layer(s, weight, torch.randn(c) / 4, norm).to(DTYPES[s.dtype])

    def to(self, dtype: torch.dtype) -> "Layer":
        norm = tuple(t.to(torch.promote_types(torch.float32, dtype)) for t in self.norm)
        return Layer(self.shape, self.weight.to(dtype), self.bias.to(dtype), norm)

    def plain(self) -> Run:
        """A module against a module: both have the same way to their convolution."""
        s = self.shape
        if s.op in MODULES:
            return self._run(self._module(nn.Conv2d(s.c, s.c, s.k, groups=s.c, padding="same")))
        return self._step(_plain_train) if s.trains else _several(self._plain)

    def fused(self) -> Run:
        from cmx_kernels import ops

        s = self.shape
        if s.op in MODULES:
            return self._run(self.fused_module())
        op = getattr(ops, s.op)
        if s.trains:
            return self._step(lambda *leaves: op(*leaves)[0])
        if s.op == "pool_head":
            return _several(lambda x: op(x, self.weight, self.bias))
        mean, variance, gamma, beta = self.norm
        scale = gamma / (variance + 1e-5).sqrt()  # the folding that fuse() does once
        shift = beta - mean * scale
        return _several(lambda x: op(x, self.weight, self.bias, scale, shift))

    def fused_module(self) -> nn.Module:
        from cmx_kernels import LargeKernelDepthwiseConv2d

        return self._module(LargeKernelDepthwiseConv2d(self.shape.c, self.shape.k))

    def _plain(self, x: Tensor) -> Tensor:
        s = self.shape
        if s.op == "pool_head":
            return F.linear(x.mean((2, 3)), self.weight, self.bias)
        if s.op == "patch_embed":
            y = F.conv2d(x, self.weight, self.bias, stride=s.k)
        else:
            groups = s.c // s.weight[1]
            y = F.conv2d(x, self.weight, self.bias, padding="same", groups=groups)
        y = F.batch_norm(F.gelu(y), *self.norm)
        return x + y if s.op == "depthwise_block" else y

    def _module(self, module: nn.Module) -> nn.Module:
        module.to(self.weight.dtype).load_state_dict({"weight": self.weight, "bias": self.bias})
        return module.requires_grad_(False)

    def _run(self, module: nn.Module) -> Run:
        if not self.shape.trains:
            return _several(module)
        parameters = tuple(module.requires_grad_().parameters())
        return self._step(lambda x, *_: module(x), parameters)

    def _step(self, forward: Callable[..., Tensor], parameters: Sequence[Tensor] | None = None) -> Run:
        """The output, and the gradients of x and all parameters for one and the same gradient of the output."""
        grad = torch.randn(self.shape.output, generator=torch.Generator().manual_seed(1)).to(self.weight.dtype)
        if parameters is None:
            parameters = [t.detach().requires_grad_() for t in (self.weight, self.bias, *self.norm[2:])]

        def run(x: Tensor) -> Sequence[Tensor]:
            with torch.enable_grad():
                leaves = [x.detach().requires_grad_(), *parameters]
                y = forward(*leaves)
                return y.detach(), *torch.autograd.grad(y, leaves, grad[: len(x)].to(y.dtype))

        return run


def _plain_train(x: Tensor, weight: Tensor, bias: Tensor, gamma: Tensor, beta: Tensor) -> Tensor:
    y = F.gelu(F.conv2d(x, weight, bias, padding="same", groups=len(weight)))
    return x + F.batch_norm(y, None, None, gamma, beta, training=True)


def _several(run: Callable[[Tensor], Tensor]) -> Run:
    return lambda x: (run(x),)
