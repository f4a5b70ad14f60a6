"""fuse and unfuse: a model keeps its modules, parameters and keys, and gets another forward, in place."""

from typing import TypeVar

from torch import nn

from cmx_kernels import backends
from cmx_kernels.models.conversion import convert, revert

Model = TypeVar("Model", bound=nn.Module)


def fuse(model: Model, *, strict: bool = False) -> Model:
    """Fuse a timm ConvMixer, the paper's nn.Sequential, or every ConvMixer and block inside ``model``, in place.

    Each part decides in every call whether it can run fused, and else runs as before: hooks fire, training is plain
    PyTorch, torch.export and scripting see the original modules. Inference keeps a second, packed copy of the weights,
    made again when they change.

    Args:
        strict: raise where something that looks like a ConvMixer cannot be fused, instead of saying so once.

    Returns:
        The same object. Its parameters and state dict are untouched.

    Raises:
        TypeError: ``model`` is no nn.Module. ValueError: with ``strict``, nothing or not everything could be fused.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: got {type(model).__name__}, wanted an nn.Module")
    fused, refused = convert(model)
    name = type(model).__name__
    problem = "; ".join(f"{part} is not fused: {reason}" for part, reason in refused.items())
    if not fused and not problem:
        problem = "found no ConvMixer block: Sequential(x + Sequential(depthwise conv, act, bn), conv 1x1, act, bn)"
    if problem and strict:
        raise ValueError(f"model: got a {name}, wanted one that can be fused; {problem}")
    if problem:
        backends.say_once(f"fuse({name}): {problem}")
    return model


def unfuse(model: Model) -> Model:
    """Make ``model`` exactly what it was before :func:`fuse`, in place; what is not fused is left alone."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: got {type(model).__name__}, wanted an nn.Module")
    revert(model)
    return model
