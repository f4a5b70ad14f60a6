"""fuse and unfuse: a model keeps its modules, parameters and keys, and gets another forward, in place."""

from typing import TypeVar

from torch import nn

from cmx_kernels import backends
from cmx_kernels.layers import SwappedDepthwiseConv2d, swap, unswap
from cmx_kernels.models.conversion import convert, revert

Model = TypeVar("Model", bound=nn.Module)


def fuse(model: Model, *, strict: bool = False) -> Model:
    """Fuse a timm ConvMixer, the paper's nn.Sequential, or every ConvMixer and block inside ``model``, in place.

    Depthwise convolutions elsewhere, as in ConvNeXt and RepLKNet, become LargeKernelDepthwiseConv2d where they have
    stride 1 and "same" padding; what became of each one, and why not, is in ``explain(model, x)``.

    Each part decides in every call, in training too, whether it can run fused, and else runs as before: hooks fire,
    torch.export and scripting see the original modules. Inference keeps a second, packed copy of the weights, made
    again when they change.

    Args:
        strict: raise where there is nothing to fuse, or something that looks like a ConvMixer cannot be, instead of
            saying so once.

    Returns:
        The same object. Its parameters and state dict are untouched.

    Raises:
        TypeError: ``model`` is no nn.Module. ValueError: with ``strict``, as above.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: got {type(model).__name__}, wanted an nn.Module")
    unswap(model)  # a block that could not be fused may be one that can by now
    found = convert(model)
    swapped = [name for name, reason in swap(model).items() if reason is None]
    name = type(model).__name__
    problem = found.problem
    if not found.fused and not swapped and not problem:
        problem = (
            "found neither a ConvMixer block, Sequential(x + Sequential(depthwise conv, act, bn), conv 1x1, act, bn), "
            "nor a depthwise nn.Conv2d of stride 1 with 'same' padding"
        )
    if problem and strict:
        raise ValueError(f"model: got a {name}, wanted one that can be fused; {problem}")
    if problem:
        backends.say_once(f"fuse({name}): {problem}")
    return model


def unfuse(model: Model) -> Model:
    """Make ``model`` exactly what it was before :func:`fuse`, in place; what is not fused is left alone.

    Raises:
        TypeError: ``model`` is no nn.Module, or a class was derived from a fused one, as parametrizations do.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: got {type(model).__name__}, wanted an nn.Module")
    revert(model)
    unswap(model)
    left = next((m for m in model.modules() if isinstance(m, SwappedDepthwiseConv2d)), None)
    if left is not None:
        raise TypeError(
            f"model: got a {type(left).__name__}, derived from a fused class; remove its parametrizations before unfuse"
        )
    return model
