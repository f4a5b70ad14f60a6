"""A fused model and its plain twin in training mode, and a step that sees which of the two it runs."""

import copy
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from plain_models import FAMILY, one_step
from torch import Tensor, nn

from cmx_kernels import ConvMixer, fuse

X = torch.randn(4, 3, 28, 21, generator=torch.Generator().manual_seed(2))
DEPTH = 2
PLAIN = {**FAMILY, "ours": partial(ConvMixer, fused=False)}


def twins(family: str = "timm", change: Callable[[nn.Module], Any] = lambda model: None) -> tuple[nn.Module, nn.Module]:
    """(fused, plain) in training mode with the same parameters, none of which is at its default."""
    torch.manual_seed(1)
    plain = PLAIN[family](16, DEPTH, 5, 7, 10).train()
    with torch.no_grad():
        for norm in norms(plain):
            norm.weight.uniform_(0.5, 1.5)
            norm.bias.uniform_(-0.5, 0.5)
    change(plain)
    fused = fuse(copy.deepcopy(plain), strict=True)
    return fused, plain


def norms(model: nn.Module) -> list[nn.BatchNorm2d]:
    return [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]


def nodes(y: Tensor) -> Iterator[str]:
    """The names of the autograd nodes behind y."""
    seen, todo = set(), [y.grad_fn]
    while todo:
        node = todo.pop()
        if node is not None and node not in seen:
            seen.add(node)
            yield node.name()
            todo += [parent for parent, _ in node.next_functions]


def fused_step(model: nn.Module, image: Tensor) -> Tensor:
    """one_step, in which a fused model may not run a convolution of PyTorch."""
    y = one_step(model, image)
    names = list(nodes(y))
    fused = sum(name.startswith("BlockBackward") for name in names)
    assert fused in (0, DEPTH)
    assert bool(fused) != any(name.startswith("ConvolutionBackward") for name in names)
    assert bool(fused) == any(type(module).__module__.startswith("cmx_kernels") for module in model.modules())
    return y
