"""Repairs Triton's interpreter (TRITON_INTERPRET=1, Triton 3.6 to 3.9), so that what runs on the CPU can be believed.

The interpreter as shipped multiplies bfloat16 by its bits in tl.dot, truncates float32 to bfloat16, keeps tf32 operands
in float32, and lets loads and stores go anywhere. Here:

products    bfloat16 as numbers; "tf32" operands rounded to 10 bits, so that its error shows
casts       to the nearest even bfloat16; arithmetic on bfloat16, which would be on its bits, raises TypeError
scalars     are indices with NumPy 2.4 too, which Triton 3.6 does not know
comparisons of scalars are bools after they are broadcast, too
addresses   every load, store and atomic must stay inside a tensor of the launch: its own extent, not its storage's
races       no element is stored to by two programs, nor twice by one, nor loaded by one and stored to by another
launches    counted, so that a test can tell that a kernel ran
"""

import math
from collections import Counter
from collections.abc import Callable
from typing import Any

import numpy as np
import triton.language as tl
from torch import Tensor
from triton.runtime import interpreter
from triton.runtime.interpreter import GridExecutor, InterpretedFunction, InterpreterBuilder, TensorHandle

launches: Counter[str] = Counter()


class WrongAccess(Exception):
    """A kernel touched what it may not."""


def _float(handle: TensorHandle) -> np.ndarray:
    if handle.dtype.scalar == tl.bfloat16:
        return (handle.data.astype(np.uint32) << 16).view(np.float32)
    return handle.data


def to_tf32(x: np.ndarray) -> np.ndarray:
    """To 10 bits of mantissa, ties away from zero, as cvt.rna does."""
    bits = np.ascontiguousarray(x, np.float32).view(np.uint32)
    rounded = ((bits + np.uint32(0x1000)) & np.uint32(0xFFFFE000)).view(np.float32)
    return np.where(np.isfinite(x), rounded, x).reshape(np.shape(x))


def to_bfloat16(x: np.ndarray) -> np.ndarray:
    """The bits of the nearest bfloat16, ties to even."""
    bits = np.ascontiguousarray(x, np.float32).view(np.uint32)
    rounded = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
    return np.where(np.isnan(x), np.uint16(0x7FC0), rounded.reshape(np.shape(x)))


def _dot(self: Any, a: TensorHandle, b: TensorHandle, d: TensorHandle, precision: Any, _: int) -> TensorHandle:
    left, right = _float(a), _float(b)
    if a.dtype.scalar == tl.float32 and "TF32" in str(precision):
        assert "x3" not in str(precision), "tf32x3 is not modelled"
        left, right = to_tf32(left), to_tf32(right)
    return TensorHandle(np.matmul(left, right, dtype=np.float32) + d.data, d.dtype.scalar)


def _cast(cast: Callable[..., TensorHandle]) -> Callable[..., TensorHandle]:
    def to(self: Any, source: TensorHandle, target: Any) -> TensorHandle:
        types = source.dtype.scalar, target.scalar
        if types == (tl.float32, tl.bfloat16):
            return TensorHandle(to_bfloat16(source.data), tl.bfloat16)
        if types == (tl.bfloat16, tl.float32):
            return TensorHandle(_float(source), tl.float32)
        if types[0] == types[1]:
            return source
        if tl.bfloat16 in types:  # an integer constant, or fp16
            middle = TensorHandle(_float(source).astype(np.float32), tl.float32)
            return to(self, middle, target)
        return cast(self, source, target)

    return to


def _arithmetic(operation: Callable[..., TensorHandle]) -> Callable[..., TensorHandle]:
    def checked(self: Any, *operands: Any) -> TensorHandle:
        if any(isinstance(o, TensorHandle) and o.dtype.scalar == tl.bfloat16 for o in operands):
            raise TypeError("bfloat16 arithmetic in the interpreter is on bits; convert to float32 first")
        result = operation(self, *operands)
        # a comparison keeps the type of its operands otherwise, and a scalar one that is broadcast becomes int32
        return TensorHandle(result.data, tl.int1) if result.data.dtype == np.bool_ else result

    return checked


class _Launch:
    """What the running launch may touch, and which program has stored where, or loaded from."""

    def __init__(self, tensors: list[Tensor]) -> None:
        spans = []
        for t in tensors:
            elements = 1 + sum((n - 1) * s for n, s in zip(t.shape, t.stride(), strict=True)) if t.numel() else 0
            spans.append((t.data_ptr(), t.data_ptr() + elements * t.element_size()))
        self.spans = np.array(sorted(spans), np.uint64).reshape(-1, 2)
        self.ends = np.maximum.accumulate(self.spans[:, 1]) if len(spans) else self.spans[:, 1]
        self.writer: dict[int, tuple[int, ...]] = {}
        self.stored: set[int] = set()  # spans
        self.loads: list[tuple[tuple[int, ...], int, int, np.ndarray]] = []  # program, spans from and to, addresses

    def check(self, what: str, program: tuple[int, ...], pointers: TensorHandle, mask: TensorHandle) -> None:
        inside = np.broadcast_to(np.asarray(mask.data, bool), pointers.data.shape)
        addresses = pointers.data[inside].astype(np.uint64)
        if not addresses.size:
            return
        bits = pointers.get_element_ty().primitive_bitwidth
        at = np.searchsorted(self.spans[:, 0], addresses, side="right").astype(int) - 1
        good = (at >= 0) & (addresses + np.uint64(max(1, bits // 8)) <= self.ends[np.maximum(at, 0)])
        if not good.all():
            first, span = int(addresses[~good][0]), self.spans[max(0, int(at[~good][0]))]
            raise WrongAccess(
                f"{what} out of bounds: {int((~good).sum())} of {good.size} addresses, "
                f"the first {first - int(span[1])} bytes past the end of a tensor, program {program}"
            )
        if what == "load":
            self.loads.append((program, int(at.min()), int(at.max()), addresses))
        if what == "store":
            self.stored.update(np.unique(at).tolist())
            elements = np.unique(addresses)
            if elements.size != addresses.size:
                raise WrongAccess(f"store race: program {program} stores twice to one element")
            for address in elements.tolist():
                other = self.writer.setdefault(address, program)
                if other != program:
                    raise WrongAccess(f"store race: programs {other} and {program} store to one element")

    def check_loads(self) -> None:
        """No program has loaded what another one stores, before or after it: on a GPU there is no such order."""
        for program, first, last, addresses in self.loads:
            if any(first <= span <= last for span in self.stored):
                for other in {self.writer.get(address, program) for address in addresses.tolist()} - {program}:
                    raise WrongAccess(f"load race: program {program} loads an element that {other} stores to")


_now: _Launch | None = None


def _watched(what: str, access: Callable[..., Any], mask_at: int) -> Callable[..., Any]:
    def checked(self: Any, *operands: Any, **options: Any) -> Any:
        if _now is not None:
            pointers = operands[1] if what == "atomic" else operands[0]
            _now.check(what, self.grid_idx, pointers, operands[mask_at])
        return access(self, *operands, **options)

    return checked


def _launch(run: Callable[..., None]) -> Callable[..., None]:
    def watched(self: GridExecutor, *args: Any, **kwargs: Any) -> None:
        global _now
        grid = self.grid if not callable(self.grid) else ()
        assert all(0 < n < 2**31 for n in grid) and math.prod(grid[1:]) < 2**16, f"a GPU refuses the grid {grid}"
        given = [*args, *kwargs.values()]
        _now = _Launch([getattr(a, "base", a) for a in given if hasattr(getattr(a, "base", a), "data_ptr")])
        launches[self.fn.__name__] += 1
        try:
            run(self, *args, **kwargs)
            _now.check_loads()
        finally:
            _now = None

    return watched


def _called(call: Callable[..., Any]) -> Callable[..., Any]:
    """A launch has patched triton.language already: not again for each function of ours that a kernel calls."""

    def quick(self: InterpretedFunction, *args: Any, **kwargs: Any) -> Any:
        ours = self.fn.__globals__.get("tl") is tl
        return self.rewrite()(*args, **kwargs) if ours else call(self, *args, **kwargs)

    return quick


def _scalars(patch: Callable[..., None]) -> Callable[..., None]:
    def also(tensor: type, scope: Any) -> None:
        patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    return also


def _same_memory(self: GridExecutor, args: Any, kwargs: Any) -> tuple[Any, Any]:
    """The tensors themselves: they are on the CPU, and copies would have other addresses."""
    return args, kwargs


def install() -> None:
    """Patch the interpreter of this process, once."""
    if hasattr(InterpreterBuilder, "cmx_repaired"):
        return
    InterpreterBuilder.cmx_repaired = True
    InterpreterBuilder.create_dot = _dot
    InterpreterBuilder.cast_impl = _cast(InterpreterBuilder.cast_impl)
    for name in ("binary_op", "unary_op", "ternary_op"):
        setattr(InterpreterBuilder, name, _arithmetic(getattr(InterpreterBuilder, name)))
    for name, what, mask_at in (
        ("create_masked_load", "load", 1),
        ("create_masked_store", "store", 2),
        ("create_atomic_rmw", "atomic", 3),
    ):
        setattr(InterpreterBuilder, name, _watched(what, getattr(InterpreterBuilder, name), mask_at))
    interpreter._patch_lang_tensor = _scalars(interpreter._patch_lang_tensor)
    InterpretedFunction.__call__ = _called(InterpretedFunction.__call__)
    GridExecutor._init_args_hst = _same_memory
    GridExecutor._restore_args_dev = lambda *_: None
    GridExecutor.__call__ = _launch(GridExecutor.__call__)
    interpreter.np.seterr(all="ignore")  # overflow to inf is what a GPU does, silently
