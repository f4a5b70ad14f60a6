"""State dicts of ConvMixer: the keys of timm and of the paper's nn.Sequential, training wrappers, files.

    timm                     paper (d blocks)
    stem.{0,2}.*             {0,2}.*
    blocks.{i}.*             {3 + i}.*
    head.*                   {5 + d}.*

Activations have no keys: nothing here can tell a ReLU model from a GELU model.
"""

import argparse
import pickle
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

StateDict = dict[str, Tensor]
_WRAPPERS = ("state_dict_ema", "model_ema", "state_dict", "model")  # timm's order: the average is what one evaluates
_PREFIXES = ("module.", "_orig_mod.")


def clean(state_dict: Mapping[str, Any]) -> Mapping[str, Any]:
    """Without the dict that a training script wraps it in, and the prefixes of DataParallel and torch.compile."""
    if not isinstance(state_dict, Mapping):
        raise TypeError(
            f"state_dict: got {type(state_dict).__name__}, wanted a dict of tensors; load files with load_checkpoint"
        )
    for name in _WRAPPERS:
        if isinstance(state_dict.get(name), Mapping):
            return clean(state_dict[name])
    for prefix in _PREFIXES:
        if state_dict and all(str(key).startswith(prefix) for key in state_dict):
            return clean({key.removeprefix(prefix): value for key, value in state_dict.items()})
    return state_dict


def layout(keys: Any) -> str | None:
    """ "timm" or "paper", by the keys; None for anything else."""
    if "stem.0.weight" in keys:
        return "timm"
    return "paper" if "0.weight" in keys and "2.running_var" in keys else None


def convert_state_dict(state_dict: Mapping[str, Any], to: str) -> StateDict:
    """The same tensors under the keys of ``to``, "timm" or "paper"; a wrapper is taken off.

    Raises:
        ValueError: ``to`` is unknown, or the keys are not exactly those of a ConvMixer.
    """
    if to not in ("timm", "paper"):
        raise ValueError(f"to: got {to!r}, wanted 'timm' or 'paper'")
    state_dict = clean(state_dict)
    source = layout(state_dict)
    if source is None:
        some = ", ".join(list(map(str, state_dict))[:3]) or "none"
        raise ValueError(
            f"state_dict: got the keys {some}, ..., wanted those of a ConvMixer, as timm or the paper names them"
        )
    parsed = {key: _parse(key, source) for key in state_dict}
    depth = 1 + max((index for part, index, _ in parsed.values() if part == "blocks"), default=-1)
    converted = {}
    for key, (part, index, rest) in parsed.items():
        if part == "after":  # in the paper's layout: the pool and the flatten have no keys
            if index != depth + 2:
                raise ValueError(
                    f"state_dict: got the key {key}, wanted the classifier at {5 + depth} after {depth} blocks"
                )
            part = "head"
        place = {"stem": index, "blocks": 3 + index, "head": 5 + depth}[part]
        name = {"stem": f"stem.{index}", "blocks": f"blocks.{index}", "head": "head"}[part]
        converted[f"{name if to == 'timm' else place}.{rest}"] = state_dict[key]
    return converted


def _parse(key: str, source: str) -> tuple[str, int, str]:
    """(stem | blocks | head | after, index, rest of the key)"""
    if source == "timm":
        match = re.fullmatch(r"(?:(stem|blocks)\.(\d+)|(head))\.(.+)", key)
        if match:
            return match[1] or match[3], int(match[2] or 0), match[4]
    else:
        match = re.fullmatch(r"(\d+)\.(.+)", key)
        if match and match[1] in ("0", "2"):
            return "stem", int(match[1]), match[2]
        if match and re.match(r"(0\.fn|1|3)\.", match[2]):
            return "blocks", int(match[1]) - 3, match[2]
        if match and match[2] in ("weight", "bias"):
            return "after", int(match[1]) - 3, match[2]
    raise ValueError(f"state_dict: got the key {key}, which a ConvMixer with the keys of {source} does not have")


def fit(state_dict: Mapping[str, Any], model: nn.Module, strict: bool) -> Mapping[str, Any]:
    """``state_dict`` under the keys of ``model``, checked against it before anything is written.

    Raises:
        RuntimeError: a key is missing or unexpected (``strict``), or a shape differs.
    """
    own = model.state_dict()
    if not (isinstance(state_dict, Mapping) and own.keys() == state_dict.keys()):
        state_dict = clean(state_dict)
        wanted = layout(own)
        if wanted is not None and layout(state_dict) not in (None, wanted):
            state_dict = convert_state_dict(state_dict, wanted)
    if not any(module._load_state_dict_pre_hooks for module in model.modules()):  # which may change keys and shapes
        _check(state_dict, own, type(model).__name__, strict)
    return state_dict


def _check(state_dict: Mapping[str, Any], own: Mapping[str, Tensor], name: str, strict: bool) -> None:
    problems = []
    for key, tensor in state_dict.items():
        if key in own and isinstance(tensor, Tensor) and tensor.shape != own[key].shape:
            problems.append(f"size mismatch for {key}: got {list(tensor.shape)}, wanted {list(own[key].shape)}")
    if strict:
        # BatchNorm itself makes up for a missing counter in files from before PyTorch had it
        missing = [key for key in own if key not in state_dict and not key.endswith("num_batches_tracked")]
        unexpected = [str(key) for key in state_dict if key not in own]
        problems += [f"Missing key(s) in state_dict: {_first(missing)}"] if missing else []
        problems += [f"Unexpected key(s) in state_dict: {_first(unexpected)}"] if unexpected else []
    if not problems:
        return
    more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
    raise RuntimeError(
        f"Error(s) in loading state_dict for {name}: {problems[0]}{more}. Nothing was loaded. The model is "
        f"{describe(own)}, the checkpoint {describe(state_dict)}: build the model with the checkpoint's sizes"
        + ("" if strict else ", or leave the keys that differ out")
    )


def _first(keys: list[str]) -> str:
    return ", ".join(keys[:2]) + (f", ... ({len(keys)})" if len(keys) > 2 else "")


def describe(state_dict: Mapping[str, Any]) -> str:
    """The architecture that a state dict belongs to, in words."""
    try:
        keys = convert_state_dict(state_dict, "timm")
        depth = sum(key.endswith(".0.fn.0.weight") for key in keys)
        (dim, _, p, q), (_, _, kh, kw) = keys["stem.0.weight"].shape, keys["blocks.0.0.fn.0.weight"].shape
        classes = len(keys["head.weight"]) if "head.weight" in keys else "no"
    except (ValueError, KeyError, AttributeError):
        return "no ConvMixer"
    return f"ConvMixer-{dim}/{depth} with {kh}x{kw} kernels, {p}x{q} patches and {classes} classes"


def load_checkpoint(path: str | Path) -> StateDict:
    """The tensors of a .safetensors file, or of a PyTorch file, read with weights_only=True; a wrapper is taken off.

    Raises:
        FileNotFoundError: there is no such file.
        ImportError: a safetensors file, and safetensors is not installed.
        ValueError: the file is truncated, holds more than tensors, or is no checkpoint.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(
            f"checkpoint: {path} is {'a folder' if path.is_dir() else 'missing'}, wanted a file of weights"
        )
    loaded = _load_safetensors(path) if path.suffix == ".safetensors" else _load_torch(path)
    state_dict = clean(loaded) if isinstance(loaded, Mapping) else {}
    if not state_dict or not all(isinstance(value, Tensor) for value in state_dict.values()):
        raise ValueError(f"checkpoint: {path} holds a {type(loaded).__name__} without weights, wanted a state dict")
    return dict(state_dict)


def _load_torch(path: Path) -> Any:
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):  # the settings that training scripts store
            return torch.load(path, map_location="cpu", weights_only=True)
    except (RuntimeError, EOFError, OSError, ValueError, KeyError, IndexError, pickle.UnpicklingError) as error:
        blocked = re.search(r"Unsupported (?:global|class|operand).*?(\S+\.\S+)", str(error))
        if blocked:
            reason = f"holds {blocked[1]}, which is not data; save the model's state_dict() alone"
        else:
            reason = (
                "is truncated or no PyTorch checkpoint; fetch it again, or save a model's state_dict() with torch.save"
            )
        raise ValueError(f"checkpoint: {path} {reason}") from error


def _load_safetensors(path: Path) -> Any:
    try:
        from safetensors import SafetensorError
        from safetensors.torch import load_file
    except ImportError as error:
        raise ImportError(f"checkpoint: {path} needs safetensors: pip install safetensors") from error
    try:
        return load_file(path)
    except (SafetensorError, OSError, ValueError) as error:
        raise ValueError(f"checkpoint: {path} is truncated or no safetensors file ({error}); fetch it again") from error
