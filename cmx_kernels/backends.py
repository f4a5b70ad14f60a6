"""The table of backends, in order of preference: the first one with no reason against it runs.

``why_not(op, x, act)`` is a sentence or None. What it reads is constant after import, because torch.compile traces it.
"""

import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from cmx_kernels import cuda, registry, triton_kernels, tuned
from cmx_kernels.activations import ACTIVATIONS

Shape = Sequence[int] | None
FUSED = os.environ.get("CMX_FUSED", "1") != "0"
STRICT = os.environ.get("CMX_STRICT", "0") not in ("", "0")
_CPU_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
_CPU_ACTIVATIONS = frozenset(registry.C.activations()) if registry.C is not None else frozenset()


TRANSFORMED = "a torch.func transform or forward-mode differentiation is at work, which only PyTorch's operators follow"
# Private, so a torch without it is taken as one without transforms at work
_transforms = getattr(getattr(torch._C, "_functorch", None), "peek_interpreter_stack", lambda: None)


@registry.constant  # torch.compile guards the transforms that it traces under
def transformed() -> bool:
    """Whether torch.func or forward-mode differentiation is at work. A kernel would lose the derivative, silently."""
    return _transforms() is not None or getattr(torch.autograd.forward_ad, "_current_level", -1) >= 0


def exporting() -> bool:
    """torch.compiler.is_exporting(), which torch 2.11 takes for true in torch.compile too."""
    return getattr(torch.compiler, "_is_exporting_flag", False)


def _leaves_here() -> bool:
    """Whether a program is made of this call that has to run where this package is not installed."""
    return exporting() or torch.jit.is_tracing()


@dataclass(frozen=True)
class Backend:
    name: str
    why_not: Callable[[str, Tensor, str], str | None]
    why_not_unasked: Callable[[Tensor], str | None] = lambda x: None  # against taking it where nobody asks for it

    def reason(self, op: str, x: Tensor, act: str) -> str | None:
        if transformed() and self.name != "reference":
            return TRANSFORMED
        return self.why_not(op, x, act) or (None if _forced == self.name else self.why_not_unasked(x))


def _why_not_cuda(op: str, x: Tensor, act: str) -> str | None:
    if x.device.type != "cuda":
        return f"x is on {x.device.type}, the cuda backend wants a CUDA tensor"
    if op not in cuda.OPS:
        return f"this release has no CUDA kernel for {op}"
    if x.dtype not in cuda.DTYPES:
        return f"x is {x.dtype}, the CUDA kernels take float32, float16 and bfloat16"
    if act not in _CPU_ACTIVATIONS:
        return f"no CUDA kernel for the activation {act!r}"
    return cuda.why_not(x.device.index or 0)


def _why_not_cuda_unasked(x: Tensor) -> str | None:
    if torch.compiler.is_compiling():
        return "torch.compile around it is not yet proven on a GPU; use('cuda') runs it there too"
    return cuda.why_not_unasked(x.device.index or 0)


def _why_not_triton(op: str, x: Tensor, act: str) -> str | None:
    if x.device.type != "cuda" and not (triton_kernels.INTERPRETED and x.device.type == "cpu"):
        return f"x is on {x.device.type}, the triton backend wants a CUDA tensor"
    if op not in triton_kernels.OPS:
        return f"this release has no Triton kernel for {op}"
    if x.dtype not in triton_kernels.DTYPES:
        return f"x is {x.dtype}, the Triton kernels take float32, float16 and bfloat16"
    if act not in triton_kernels.ACTS:
        return f"no Triton kernel for the activation {act!r}"
    return triton_kernels.why_not(x.device.index or 0)


def _why_not_cpu(op: str, x: Tensor, act: str) -> str | None:
    if registry.C is None:
        return registry.WHY_NO_C
    if x.device.type != "cpu":
        return f"x is on {x.device.type}, the cpu backend wants a CPU tensor"
    if x.dtype not in _CPU_DTYPES:
        return f"x is {x.dtype}, the cpu kernels take float32, float16 and bfloat16"
    if act not in _CPU_ACTIVATIONS:
        return f"no cpu kernel for the activation {act!r}"
    return None


def _why_not_reference(op: str, x: Tensor, act: str) -> str | None:
    return None


BACKENDS = (
    Backend("cuda", _why_not_cuda, _why_not_cuda_unasked),
    Backend(
        "triton",
        _why_not_triton,
        lambda x: "slower than cuda wherever both were measured; use('triton') runs it, tune() checks and measures it",
    ),
    Backend("cpu", _why_not_cpu),
    Backend("reference", _why_not_reference),
)
NAMES = tuple(backend.name for backend in BACKENDS)


def _known(name: str, source: str) -> str:
    if name not in NAMES:
        raise ValueError(f"{source}: got {name!r}, wanted one of {', '.join(NAMES)}")
    return name


_forced: str | None = _known(os.environ["CMX_BACKEND"], "CMX_BACKEND") if os.environ.get("CMX_BACKEND") else None


@contextmanager
def use(name: str) -> Iterator[None]:
    """Force one backend inside the block, in the whole process; a refusal raises RuntimeError with every reason."""
    global _forced
    before, _forced = _forced, _known(name, "use()")
    try:
        yield
    finally:
        _forced = before


def forced() -> str | None:
    """The backend that use() or CMX_BACKEND asks for."""
    return _forced


def kernels_are_forced() -> bool:
    return _forced not in (None, "reference")


def refusals(op: str, x: Tensor, act: str, weight: Shape = None) -> dict[str, str]:
    """Every backend that does not take this call, with its reason."""
    best = measured(op, x, act, weight)
    slower = None if best is None else f"tune() measured {best} as faster"
    found = {b.name: b.reason(op, x, act) or (None if b.name == best else slower) for b in BACKENDS}
    found |= {} if best is None else {best: None, "reference": None}
    return {name: reason for name, reason in found.items() if reason is not None}


def measured(op: str, x: Tensor, act: str, weight: Shape) -> str | None:
    """What tune() found to be the fastest, where it can run; it has checked the result of a backend that is new."""
    if weight is None or not (tuned.choices or tuned.of_gpus) or transformed():
        return None
    best = tuned.choice(op, x, weight, act)
    for backend in BACKENDS:
        if backend.name == best and backend.why_not(op, x, act) is None:
            return best
    return None


def select(op: str, x: Tensor, act: str, quiet: bool = False, weight: Shape = None) -> str:
    """The name of the backend that runs ``op`` on ``x``.

    quiet: say nothing of a fall-back.
    weight: the shape of the convolution's weight; with it a measurement of tune() counts.
    """
    if FUSED and not (_forced or tuned.choices or transformed() or _leaves_here()) and _why_not_cpu(op, x, act) is None:
        return "cpu"  # which no other backend takes unasked: found in a microsecond
    if _forced is not None:
        for backend in BACKENDS:
            if backend.name == _forced:
                reason = backend.reason(op, x, act)
                if reason is not None:
                    raise RuntimeError(f"{op}: the forced backend {_forced!r} refuses: {reason}; {_listed(op, x, act)}")
                return _forced
    if not FUSED or _leaves_here():
        return "reference"
    best = measured(op, x, act, weight)
    if best is not None:
        return best
    for backend in BACKENDS:
        if backend.reason(op, x, act) is None:
            if backend.name == "reference" and x.dtype != torch.float64 and not quiet:
                say_once(f"{op} runs in plain PyTorch: {_listed(op, x, act)}")
            return backend.name
    raise AssertionError("the reference takes everything")


def function(backend: str, op: str, reference: Callable[..., Any], compiled: Callable[..., Any]) -> Any:
    """What a selected backend runs ``op`` with: the reference, torch.ops.cmx (``compiled``) or torch.ops.cmx_triton."""
    if backend == "triton":
        return getattr(torch.ops.cmx_triton, op)
    return reference if backend == "reference" else compiled


def has_kernel(op: str, x: Tensor, act: str, quiet: bool = False, weight: Shape = None) -> bool:
    """Whether anything better than the reference runs ``op`` on ``x``."""
    return select(op, x, act, quiet, weight) != "reference"


def takes(name: str, op: str, x: Tensor, act: str) -> bool:
    """Whether the backend ``name``, if there is one, runs ``op`` on ``x``, asked for or not."""
    return any(b.name == name and b.why_not(op, x, act) is None for b in BACKENDS)


def _listed(op: str, x: Tensor, act: str) -> str:
    return "; ".join(f"{name}: {reason}" for name, reason in refusals(op, x, act).items())


def fall_back(what: str, reason: str) -> None:
    """Say once that ``what`` runs in plain PyTorch, unless that is forced; RuntimeError where kernels are."""
    if _forced == "reference":
        return
    if kernels_are_forced():
        raise RuntimeError(
            f"{what}: the forced backend {_forced!r} refuses: {reason}; plain PyTorch runs it where no backend is "
            f"forced, or under use('reference')"
        )
    say_once(f"{what} runs in plain PyTorch: {reason}")


_said: set[str] = set()


def say_once(message: str) -> None:
    """Warn about a fall-back, once a message; with CMX_STRICT=1 raise instead."""
    if STRICT:
        raise RuntimeError(f"cmx_kernels (CMX_STRICT=1): {message}")
    _warn_once(message)


@registry.constant  # torch.compile calls it while it traces
def _warn_once(message: str) -> None:
    if message not in _said:
        _said.add(message)
        warnings.warn(f"cmx_kernels: {message}", stacklevel=4)


assert set(_CPU_ACTIVATIONS) <= set(ACTIVATIONS)
