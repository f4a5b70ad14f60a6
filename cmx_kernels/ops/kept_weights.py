"""recast: float32 parameters in autocast's 16-bit type, converted once and kept between calls. On GPUs, for inference.

A copy is made again when PyTorch has counted a change of its parameter, in the same memory, which a captured graph may
read. What PyTorch does not count (writes through ``.data``, replays of a graph) each call finds on the device: a run
of RUN numbers is converted again where one of its first SAMPLES has changed. A copy lives as long as its parameter.
"""

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary

from cmx_kernels import cuda
from cmx_kernels.ops.checks import autocast_is_on, wants_grad
from cmx_kernels.registry import below_autograd, define

RUN, SAMPLES = 8192, 128  # as csrc/cuda/recast.h has them
_NARROW = (torch.float16, torch.bfloat16)


def reference(weights: Sequence[Tensor], kept: Sequence[Tensor], samples: Sequence[Tensor], all: bool) -> None:
    torch._foreach_copy_(list(kept), list(weights))


recast = define(
    "recast",
    "(Tensor[] weights, Tensor(a!)[] kept, Tensor(b!)[] samples, bool all) -> ()",
    lambda weights, kept, samples, all: None,
    reference,
    flops=lambda weights, kept, samples, all, out_shape: 0,
).default


class _Copy:
    """seen: of the parameter when it was last converted. made: the stream that did so, and an event behind it."""

    def __init__(self, weight: Tensor, dtype: torch.dtype) -> None:
        self.tensor = torch.empty_strided(weight.shape, weight.stride(), dtype=dtype, device=weight.device)
        runs = -(-weight.numel() // RUN)
        self.samples = torch.empty(runs * SAMPLES, dtype=torch.int32, device=weight.device)
        self.seen: tuple[Any, ...] = ()
        self.made: tuple[Any, Any] = (None, None)


_copies: Any = WeakTensorKeyDictionary()  # parameter -> dtype -> _Copy


def converted(weights: Sequence[Tensor], dtype: torch.dtype) -> list[Tensor]:
    """Weights of one device in ``dtype``: themselves, kept copies, or new ones where none are kept. Without gradients.

    Kept ones are read-only, and right on the current stream.
    """
    keep = [w for w in weights if _is_kept(w, dtype)]
    with torch.no_grad(), torch.inference_mode(False):
        found = dict(zip(map(id, keep), _kept(keep, dtype), strict=True)) if keep else {}
    return [found[id(w)] if id(w) in found else w.detach().to(dtype) for w in weights]


def for_autocast(x: Tensor, weight: Tensor, *others: Tensor | None) -> Tensor:
    """``weight`` for an operator on ``x`` and ``others``: in autocast's type where that copy is kept, else as it is."""
    if torch.compiler.is_compiling() or not autocast_is_on(x) or x.dtype == torch.float64:
        return weight
    dtype = torch.get_autocast_dtype(x.device.type)
    if wants_grad(x, weight, *others) or not _is_kept(weight, dtype):
        return weight
    return converted([weight], dtype)[0]


def forget_moved(parameters: Iterable[Tensor]) -> None:
    """Free the copies of parameters that have other memory now: no graph of theirs is of use any more."""
    for parameter in parameters:
        copies = _copies.get(parameter) or {}
        if any(copy.seen[0] != parameter.data_ptr() for copy in copies.values()):
            del _copies[parameter]


def _is_kept(weight: Tensor, dtype: torch.dtype) -> bool:
    plain = type(weight) is nn.Parameter and weight.dtype == torch.float32 and not weight.is_inference()
    return plain and dtype in _NARROW and weight.numel() > 0 and _on_gpu(weight) and _is_dense(weight)


def _on_gpu(weight: Tensor) -> bool:
    return weight.is_cuda and cuda.why_not(weight.device.index or 0) is None


def _is_dense(weight: Tensor) -> bool:
    last = weight.dim() == 4 and weight.is_contiguous(memory_format=torch.channels_last)
    return last or weight.is_contiguous()


def _kept(weights: Sequence[Tensor], dtype: torch.dtype) -> list[Tensor]:
    stream, capturing = _stream(weights[0].device)
    copies = [(_copies.get(w) or {}).get(dtype) for w in weights]
    seen = [(w.data_ptr(), w._version, w.device, w.stride()) for w in weights]
    old = [i for i, copy in enumerate(copies) if copy is None or copy.seen != seen[i]]
    if capturing and old:  # what is made within a graph has no values before its first replay
        return [w.detach().to(dtype) for w in weights]
    _wait({id(copy.made): copy.made for copy in copies if copy is not None}.values(), stream, capturing)
    fresh = [_refitted(w, copy, dtype) for w, copy in zip(weights, copies, strict=True)]
    with below_autograd():
        recast(weights, [c.tensor for c in fresh], [c.samples for c in fresh], bool(old))
    if old:
        made = (stream, stream.record_event() if stream is not None else None)
        for i, (weight, copy) in enumerate(zip(weights, fresh, strict=True)):
            copy.seen, copy.made = seen[i], made
            _copies.setdefault(weight, {})[dtype] = copy
    return [copy.tensor for copy in fresh]


def _stream(device: torch.device) -> tuple[Any, bool]:
    """The current one, and whether a graph captures it."""
    stream: Any = torch.cuda.current_stream(device) if device.type == "cuda" else None
    return stream, stream is not None and _is_capturing(device)


def _wait(made: Iterable[tuple[Any, Any]], stream: Any, capturing: bool) -> None:
    for first, event in made:
        if first != stream and not capturing:  # whoever captures has synchronised before
            stream.wait_event(event)


class Group:
    """Weights that are converted together in every call: their copies are looked up only after a change of one.

    The caller makes another group when one of them has another place in memory.
    """

    def __init__(self, weights: Sequence[Tensor], dtype: torch.dtype) -> None:
        self.weights, self.dtype = weights, dtype
        self.all_kept = all(_is_kept(w, dtype) for w in weights)
        self.state: tuple[Any, ...] = (None,)  # versions; of the copies who made them, tensors and samples

    def converted(self) -> list[Tensor]:
        """As converted() of the weights."""
        if not self.all_kept:
            return converted(self.weights, self.dtype)
        versions, state = [w._version for w in self.weights], self.state  # read once: other threads may write it
        if versions != state[0]:
            found = converted(self.weights, self.dtype)
            copies = [(_copies.get(w) or {}).get(self.dtype) for w in self.weights]
            kept = [c for c, t in zip(copies, found, strict=True) if c is not None and c.tensor is t]
            if len(kept) == len(found):  # not while a graph is captured whose weights have changed
                made = list({id(c.made): c.made for c in kept}.values())
                self.state = versions, made, found, [c.samples for c in kept]
            return found
        _, made, kept, samples = state
        _wait(made, *_stream(self.weights[0].device))
        with torch.no_grad(), below_autograd():
            recast(self.weights, kept, samples, False)
        return kept


def _is_capturing(device: torch.device) -> bool:
    with torch.cuda.device(device):  # the question is about its stream
        return torch.cuda.is_current_stream_capturing()


def _refitted(weight: Tensor, copy: _Copy | None, dtype: torch.dtype) -> _Copy:
    """The copy, or a new one where it has another shape or place."""
    same = copy is not None and (copy.tensor.shape, copy.tensor.stride()) == (weight.shape, weight.stride())
    return copy if copy is not None and same and copy.tensor.device == weight.device else _Copy(weight, dtype)
