"""Loads the native library and defines every operator once: schema, fake, Python fall-back, gradient.

Schemas live in Python, so the operators exist without any compiled code; ``_C`` only adds kernels to them. The same
definition serves torch.ops.cmx_triton, which ``implement`` fills once Triton has been imported.
"""

import importlib
import inspect
import os
import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any, NamedTuple

import torch
from torch.autograd import forward_ad

from cmx_kernels.flops import count

# Private, so a torch without it takes the longer way
below_autograd: Callable[[], AbstractContextManager[None]]
below_autograd = getattr(torch._C, "_AutoDispatchBelowAutograd", nullcontext)
# Without it torch.ops.cmx_triton loses tangents
make_autograd_impl: Callable[..., Any] | None
make_autograd_impl = getattr(torch._library.autograd, "make_autograd_impl", None)
_TAGS = (torch.Tag.pt2_compliant_tag, torch.Tag.needs_exact_strides)


class _Definition(NamedTuple):
    schema: str
    fake: Callable[..., Any]
    setup_context: Callable[..., None] | None
    backward: Callable[..., Any] | None
    flops: Callable[..., int] | None


_definitions: dict[str, _Definition] = {}


class _ForwardModeRefused(torch.library.Library):
    """PyTorch gives its custom operators no tangents, and none is taken for zero: the derivative would be lost."""

    def impl(self, op_name: Any, fn: Any, *args: Any, **keywords: Any) -> Any:
        def call(keyset: Any, *inputs: Any) -> Any:
            if forward_ad._current_level >= 0 and any(map(_has_tangent, inputs)):
                raise RuntimeError(
                    f"torch.ops.{self.ns}.{op_name} has no forward-mode derivative; call cmx_kernels.ops.{op_name}, "
                    f"which runs in PyTorch there"
                )
            return fn(keyset, *inputs)

        return super().impl(op_name, call, *args, **keywords)


_gradients, _triton_gradients = _ForwardModeRefused("cmx", "FRAGMENT"), _ForwardModeRefused("cmx_triton", "FRAGMENT")


def _has_tangent(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and forward_ad.unpack_dual(value).tangent is not None


def define(
    name: str,
    schema: str,
    fake: Callable[..., Any],
    reference: Callable[..., Any] | None,
    setup_context: Callable[..., None] | None = None,
    backward: Callable[..., Any] | None = None,
    flops: Callable[..., int] | None = None,
) -> Any:
    """Define ``torch.ops.cmx.<name>``. ``reference``, if any, serves every device that has no kernel.

    ``backward``: with the operators, of torch.ops.cmx or cmx_triton, as its first argument.
    ``flops``: the formula for torch.utils.flop_counter, see flops.count.
    """
    qualified = f"cmx::{name}"
    torch.library.define(qualified, schema, tags=_TAGS)
    torch.library.register_fake(qualified, fake)
    if reference is not None:
        torch.library.impl(qualified, "CompositeExplicitAutograd", reference)
    if backward is not None:
        gradient = partial(backward, torch.ops.cmx)
        torch.library.register_autograd(qualified, gradient, setup_context=setup_context, lib=_gradients)
    _definitions[name] = _Definition(schema, fake, setup_context, backward, flops)
    operator = getattr(torch.ops.cmx, name)
    if flops is not None:
        count(operator, flops)
    return operator


_compositions: dict[str, Callable[..., Any]] = {}


def compose(name: str, function: Callable[..., Any]) -> None:
    """A defined operator as ``function(operators, ...)``, Python around torch.ops.cmx on CUDA, or around cmx_triton."""
    torch.library.impl(f"cmx::{name}", "CUDA", _bound(function, torch.ops.cmx))
    _compositions[name] = function


def constant(function: Callable[..., Any]) -> Callable[..., Any]:
    """torch.compiler.assume_constant_result, which would import torch._dynamo and with it Triton."""
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


def implement_compositions() -> None:
    """Define in torch.ops.cmx_triton what is Python around its other operators."""
    for name, function in _compositions.items():
        implement(name, _bound(function, torch.ops.cmx_triton))


def _bound(function: Callable[..., Any], operators: Any) -> Callable[..., Any]:
    """functools.partial with a signature, from which a schema can be read."""

    def call(*args: Any) -> Any:
        return function(operators, *args)

    _, *parameters = inspect.signature(function).parameters.values()
    call.__signature__ = inspect.signature(function).replace(parameters=parameters)  # type: ignore[attr-defined]
    return call


def implement(name: str, kernel: Callable[..., Any]) -> None:
    """Define ``torch.ops.cmx_triton.<name>`` by a function that launches Triton kernels; torch.compile sees them."""
    definition = _definitions[name]
    op: Any = torch.library.triton_op(f"cmx_triton::{name}", kernel, mutates_args=())
    found = str(op._opoverload._schema)
    if found != f"cmx_triton::{name}{definition.schema}":
        raise TypeError(f"{inspect.getsourcefile(kernel)}: {found} implements {name}{definition.schema}")
    op.register_fake(definition.fake)
    if definition.backward is not None:
        gradient = partial(definition.backward, torch.ops.cmx_triton)
        op.register_autograd(gradient, setup_context=definition.setup_context)
        if make_autograd_impl is not None:  # again, with a question before it, of which PyTorch warns
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                of_torch = make_autograd_impl(op._opoverload, op)
                _triton_gradients.impl(name, of_torch, "Autograd", with_keyset=True, allow_override=True)
    if definition.flops is not None:
        count(getattr(torch.ops.cmx_triton, name), definition.flops)


def new_output(name: str, *args: Any) -> Any:
    """What ``name`` returns, not yet written; raises what its arguments deserve."""
    return _definitions[name].fake(*args)


def _load() -> tuple[Any, str | None]:
    """The native library, or None and the reason in a sentence."""
    try:
        native = importlib.import_module("cmx_kernels._C")
    except ModuleNotFoundError as error:
        if error.name != "cmx_kernels._C":
            return None, f"the native library needs a module that is missing: {error}"
        return None, "the native library was not built (python -m cmx_kernels info says why)"
    except (ImportError, OSError) as error:
        reason = f"the native library does not load in torch {torch.__version__}: {error}"
        warnings.warn(f"cmx_kernels: {reason}. Running on the reference; rebuild with `pip install .`", stacklevel=2)
        return None, reason
    if level := os.environ.get("CMX_ISA"):
        try:
            native.set_isa_level(level)
        except ValueError as error:
            raise ValueError(f"CMX_ISA: {error}") from None
    return native, None


# Loaded before any define(): a kernel that disagrees with its schema is then an ordinary error at import.
C, WHY_NO_C = _load()


def isa_level() -> str | None:
    """The instruction set whose CPU kernels run now: baseline, avx2, avx512, avx512bf16, amx; None without kernels."""
    return C.isa_level() if C is not None else None


def packing() -> tuple[str | None, bool]:
    """What the packed form of weights depends on besides them: the instruction set, and Strassen's products or not."""
    return (C.isa_level(), C.strassen()) if C is not None else (None, False)
