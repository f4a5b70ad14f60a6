"""The list of activations: name -> torch function. A row here is enough; a kernel without it refuses and falls back."""

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def identity(x: Tensor) -> Tensor:
    return x


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu,  # x * Phi(x), exact erf
    "gelu_tanh": partial(F.gelu, approximate="tanh"),
    "relu": F.relu,
    "none": identity,
}


# (gradient of act(x), x) -> gradient of x: rows need none, it saves the forward pass
_BACKWARD: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "gelu": torch.ops.aten.gelu_backward,
    "gelu_tanh": partial(torch.ops.aten.gelu_backward, approximate="tanh"),
    "relu": lambda grad, x: torch.where(x > 0, grad, torch.zeros_like(grad)),
    "none": lambda grad, x: grad,
}


def activation(name: str) -> Callable[[Tensor], Tensor]:
    """The torch function of an activation; ValueError for an unknown name."""
    if name not in ACTIVATIONS:
        raise ValueError(f"act: got {name!r}, wanted one of {', '.join(ACTIVATIONS)}")
    return ACTIVATIONS[name]


def activation_backward(name: str, grad: Tensor, x: Tensor) -> Tensor:
    """Gradient with respect to the pre-activation ``x``: by the row's formula, or differentiated by torch.func.

    Both can be traced, and called inside of operators, where torch.autograd records nothing.
    """
    if name in _BACKWARD:
        return _BACKWARD[name](grad, x)
    backward: Callable[[Tensor], tuple[Tensor]] = torch.func.vjp(activation(name), x)[1]
    return backward(grad)[0]


def name_of(module: nn.Module) -> str | None:
    """The name of a module's activation, None when the list has none for exactly this class."""
    if type(module) is nn.GELU:
        return "gelu" if module.approximate == "none" else "gelu_tanh"
    return {nn.ReLU: "relu", nn.Identity: "none"}.get(type(module))
