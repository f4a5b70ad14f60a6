"""What stands against calling kernels in the place of modules: who else watches, follows or has replaced a call."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules import module as module_globals

from cmx_kernels import backends
from cmx_kernels.models.structure import Refusal, Unit
from cmx_kernels.ops.checks import check_activations

PLAIN = frozenset((Tensor, nn.Parameter))
_AFFINE, _STATISTICS = ("bias", "weight"), ("running_mean", "running_var")
_OF_TORCH = (
    *(
        (kind, "forward")
        for kind in (nn.Conv2d, nn.BatchNorm2d, nn.SyncBatchNorm, nn.GELU, nn.ReLU, nn.Linear, nn.Sequential)
    ),
    (nn.Conv2d, "_conv_forward"),
)
_KINDS, _NAMES = zip(*_OF_TORCH, strict=True)
_found = [*map(getattr, _KINDS, _NAMES)]
_AS_TORCH_HAS_THEM = [f if f.__module__.startswith("torch.nn.") else None for f in _found]
# Private, so a torch without them is taken as one without transforms at work
_dispatch_modes: Callable[[], int] = getattr(torch._C, "_len_torch_dispatch_stack", lambda: 0)
_function_modes: Callable[[], int] = getattr(torch._C, "_len_torch_function_stack", lambda: 0)
HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_GLOBAL_HOOKS = [getattr(module_globals, f"_global{hooks}", {}) for hooks in HOOKS]


def plain_is_wanted(x: Any) -> bool:
    """Whether somebody traces, exports or counts the operators of PyTorch, or has turned fusion off.

    An exported program has to run where this package is not installed; with a backend forced by name it keeps ours.
    """
    if not backends.FUSED or not isinstance(x, Tensor):
        return True
    if torch.compiler.is_compiling():
        return backends.exporting() and not backends.kernels_are_forced()
    if torch.jit.is_tracing() or _dispatch_modes() > 0 or (_function_modes() > 0 and _functions_are_followed()):
        return True
    return x.is_mkldnn  # as modules want it that torch.utils.mkldnn has replaced


def _functions_are_followed() -> bool:
    """Whether somebody sees each call of torch's functions; a default device only says where new tensors live."""
    modes = (torch._C._get_function_stack_at(i) for i in range(_function_modes()))
    return any(type(mode).__name__ != "DeviceContext" for mode in modes)


def check_call(x: Tensor) -> None:
    """Refuse what no kernel follows: transforms, tensor subclasses, hooks on every module; TypeError for no dense x."""
    if backends.exporting():  # with tensors without memory
        return
    if type(x) not in PLAIN:
        raise Refusal(f"x is a {type(x).__name__}, a subclass of torch.Tensor")
    if backends.transformed():
        raise Refusal(backends.TRANSFORMED)
    if torch.compiler.is_compiling():
        return
    if [*map(getattr, _KINDS, _NAMES)] != _AS_TORCH_HAS_THEM:
        raise Refusal("somebody replaced a method of a class in torch.nn")
    if x.is_nested or x.layout is not torch.strided:
        check_activations(x)
    if any(_GLOBAL_HOOKS):
        raise Refusal("a hook for all modules is registered")


def check_bypass(module: nn.Module) -> None:
    """Refuse to replace a call of ``module`` where that call does more than its class's forward."""
    if module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks:
        raise Refusal(f"a hook is attached to its {type(module).__name__}")
    for name in methods(type(module)):
        if name in module.__dict__:
            raise Refusal(f"the {name} of its {type(module).__name__} was replaced")


def bypassable(module: nn.Module) -> bool:
    try:
        check_bypass(module)
    except Refusal:
        return False
    return True


def check_unit(unit: Unit) -> None:
    for module in unit:
        check_bypass(module)
    conv, norm = unit.conv, unit.norm
    for owner, names in ((conv._parameters, _AFFINE), (norm._parameters, _AFFINE), (norm._buffers, _STATISTICS)):
        missing = [name for name in names if name not in owner]  # torch 2.11 compiles no sets of keys
        if missing:
            raise Refusal(f"{', '.join(missing)} of a layer was replaced by something computed")
    for tensor in (conv.weight, conv.bias, norm.weight, norm.bias, norm.running_mean, norm.running_var):
        check_tensor(tensor)


def check_tensor(tensor: Tensor | None) -> None:
    if backends.exporting():
        return
    if tensor is not None and type(tensor) not in PLAIN:
        raise Refusal(f"a parameter is a {type(tensor).__name__}, a subclass of torch.Tensor")
    if tensor is not None and not tensor.is_floating_point():
        raise Refusal(f"a parameter is {tensor.dtype}")


def methods(kind: type) -> tuple[str, ...]:
    """What somebody may have replaced in one module of a class."""
    return ("forward", "_conv_forward") if issubclass(kind, nn.Conv2d) else ("forward",)
