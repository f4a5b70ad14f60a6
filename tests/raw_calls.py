"""Calls of the dispatcher operators that must be refused, run in a process of their own: a mistake would crash it.

``python raw_calls.py LEVEL FIRST`` makes the calls from number FIRST on and prints a JSON line before each, its number,
and one after it, [error type or null, message]. ``REFUSED`` must raise, ``EITHER`` may also finish.
"""

import json
import re
import sys
from collections.abc import Callable
from functools import partial
from typing import Any

import cases
import torch
from torch import Tensor

from cmx_kernels import ops, registry
from cmx_kernels.ops import block_stack as stack

OPS = torch.ops.cmx
Calls = dict[str, Callable[[], Any]]


def _zeros(*size: int, dtype: torch.dtype = torch.float32, device: str = "cpu") -> Tensor:
    return torch.zeros(size, dtype=dtype, device=device)


def _with(op: str, dtype: torch.dtype, **changes: object) -> Callable[[], Any]:
    """A good call with some arguments replaced."""
    names = (
        ("x", "weight", "bias") if op == "pool_head" else ("x", "weight", "bias", "scale", "shift", "act", "residual")
    )
    args = list(cases.inputs(op, cases.RAGGED[op], dtype))
    for argument, value in changes.items():
        args[names.index(argument)] = value
    return lambda: getattr(OPS, op)(*args)


def blocks(refused: Calls, either: Calls) -> None:
    for op in cases.OPS:
        for dtype in (torch.float32, torch.bfloat16, torch.float64):
            x, w = cases.inputs(op, cases.RAGGED[op], dtype)[:2]

            def add(
                what: str, calls: Calls = refused, op: str = op, dtype: torch.dtype = dtype, **changes: object
            ) -> None:
                calls[f"{op} {cases.name(dtype)}: {what}"] = _with(op, dtype, **changes)

            for rank in (0, 1, 2, 3, 5):
                add(f"x of rank {rank}", x=_zeros(*[19] * rank, dtype=dtype))
            for rank in {0, 1, 2, 3, 4, 5} - {w.dim()}:
                add(f"weight of rank {rank}", weight=_zeros(*[5] * rank, dtype=dtype))
            add("fewer channels in x", x=x[:, :-1])
            add("more channels in x", x=torch.cat([x, x], 1))
            add("fewer weight rows, vectors as they were", weight=w[:-2])
            add("more weight rows, vectors as they were", weight=torch.cat([w, w]))
            add("a wider weight", weight=torch.cat([w, w], 1))
            add("x of integers", x=x.int())
            add("x of bool", x=x > 0)
            add("complex x", x=x + 1j)
            add("weight of integers", weight=w.int())
            add("another float for the weight", weight=w.half())
            add("everything of integers", x=x.int(), weight=w.int())
            add("weight on meta", weight=w.to("meta"))
            add("sparse x", x=x.to_sparse())
            add("sparse weight", weight=w.to_sparse())
            add("no pixels", either, x=x[..., :0])
            if op == "depthwise_block":
                add("no channels", either, x=x[:, :0], weight=w[:0], bias=None, scale=None, shift=None)
            else:
                add("no channels", either, x=x[:, :0], weight=w[:, :0])
            vectors = ("bias",) if op == "pool_head" else ("bias", "scale", "shift")
            add("no weight rows", either, weight=w[:0], **dict.fromkeys(vectors))
            for vector in vectors:
                rows = len(w)
                for bad in ((rows - 1,), (rows + 1,), (1,), (0,), (), (rows, 1), (1, rows, 1, 1)):
                    add(f"{vector} of shape {list(bad)}", **{vector: _zeros(*bad, dtype=dtype)})
                add(f"{vector} of integers", **{vector: _zeros(rows, dtype=torch.int64)})
                add(f"complex {vector}", **{vector: _zeros(rows, dtype=torch.complex64)})
                add(f"{vector} on meta", **{vector: _zeros(rows, dtype=dtype, device="meta")})
            if op == "pool_head":
                continue
            for act in ("swish", "", "GELU", "gelu\0", "relu6"):
                add(f"act {act!r}", act=act)
            for k in (0, 32, 33, 64):
                if op == "depthwise_block":  # float64 goes through plain loops, which take any size
                    calls = either if dtype == torch.float64 else refused
                    add(f"a {k}x3 kernel", calls, weight=_zeros(19, 1, k, 3, dtype=dtype))
                    add(f"a 3x{k} kernel", calls, weight=_zeros(19, 1, 3, k, dtype=dtype))
                elif op == "pointwise_block":
                    add(f"a {k}x1 kernel", weight=_zeros(37, 19, k, 1, dtype=dtype))
                else:
                    add(f"a patch of {k}x3", weight=_zeros(21, 3, k, 3, dtype=dtype))
                    add(f"a patch of 3x{k}", weight=_zeros(21, 3, 3, k, dtype=dtype))


def _stack(dtype: torch.dtype = torch.float32, channels: int = 19, kernel: int = 5) -> tuple[Tensor, Any]:
    def conv(*size: int) -> stack.ConvParams:
        return stack.ConvParams(torch.randn(size).to(dtype), torch.randn(size[0]), None, torch.randn(size[0]))

    block = (conv(channels, 1, kernel, kernel), conv(channels, channels, 1, 1))
    packed = stack.pack(conv(channels, 3, 2, 2), [block] * 2, "gelu", dtype)
    return torch.randn(2, 3, 13, 11).to(dtype), packed


def _shifted(t: Tensor) -> Tensor:
    """The same values one element off the start of their memory."""
    memory = torch.zeros(t.numel() + 1, dtype=t.dtype)
    memory[1:] = t.flatten()
    return memory[1:].view(t.shape)


def stacks(refused: Calls, either: Calls) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        x, packed = _stack(dtype)
        good = {**packed._asdict(), "packed": packed.tensors, "x": x, "pool": False, "head": None, "head_bias": None}

        def add(what: str, calls: Calls = refused, good: dict[str, Any] = good, **changes: object) -> None:
            args = {**good, **changes}
            order = ("x", "packed", "channels", "patch", "kernel", "act", "pool", "head", "head_bias")
            dtype = cases.name(good["x"].dtype)
            calls[f"block_stack {dtype}: {what}"] = lambda: OPS.block_stack(*(args[name] for name in order))

        layer = (x.new_zeros(2, 19, 6, 5), *packed.tensors[2:4], list(packed.kernel), "gelu", True)
        for at, value in enumerate((x, packed.tensors[0], packed.tensors[3][:2], [5, 32], "swish")):
            changed = [*layer[:at], value, *layer[at + 1 :]]
            refused[f"depthwise_packed {dtype}: argument {at}"] = partial(OPS.depthwise_packed, *changed)
        tensors = packed.tensors
        for keep in (0, 1, 3, 5, 7, 8, 9):
            add(f"{keep} of 10 tensors", packed=tensors[:keep])
        add("a stem only", either, packed=tensors[:2])
        add("tensors in another order", packed=tensors[::-1])
        add("one tensor too many", packed=[*tensors, tensors[0]])
        for i, t in enumerate(tensors):
            part = "constants" if i % 2 else "weight"
            changed: dict[str, Tensor] = {"short": t[..., :-1], "empty": t[:0], "a scalar": t.sum()}
            changed["double"], changed["transposed"] = t.double(), t.t() if t.dim() == 2 else t[:, None].t()[:, ::2]
            changed["sparse"], changed["of rank 3"] = t.to_sparse(), t[None, ..., :-1]
            if i % 2:
                changed["with two rows"], changed["flat"] = t[:2], t.flatten()
            for how, value in changed.items():
                add(f"tensor {i}, {part}, {how}", packed=[*tensors[:i], value, *tensors[i + 1 :]])
            add(f"tensor {i}, {part}, on meta", either, packed=[*tensors[:i], t.to("meta"), *tensors[i + 1 :]])
            add(f"tensor {i}, {part}, misaligned", either, packed=[*tensors[:i], _shifted(t), *tensors[i + 1 :]])
        for channels in (-1, 0, 1, 18, 20, 48, 2**31, 2**40, 2**62):
            add(f"{channels} channels", either if channels in (18, 20) else refused, channels=channels)
        for patch in ([2], [2, 2, 2], [0, 2], [2, 0], [-2, 2], [4, 3], [2**31, 2**31], [2**62, 4]):
            add(f"patch {patch}", patch=patch)
        add("no patch for a stem", patch=[])
        head = {"pool": True, "head": _zeros(7, 19, dtype=dtype), "head_bias": _zeros(7, dtype=dtype)}
        add("a head without pool", **head | {"pool": False})
        add("a bias without a head", **head | {"head": None})
        for part, sizes in (
            ("head", ((7, 18), (7, 20), (0, 19), (7,), (7, 19, 1))),
            ("head_bias", ((6,), (8,), (7, 1))),
        ):
            for size in sizes:
                add(f"a {part} of {size}", **head | {part: _zeros(*size, dtype=dtype)})
            add(f"a {part} on meta", either, **head | {part: head[part].to("meta")})
            add(f"a {part} sparse", **head | {part: head[part].to_sparse()})
        add("a head of another dtype", **head | {"head": _zeros(7, 19, dtype=torch.float16)})
        for kernel in ([], [5], [5, 5, 5], [0, 5], [5, 0], [-5, -5], [33, 5], [5, 33], [7, 7], [2**31, 5], [2**62, 4]):
            add(f"kernel {kernel}", kernel=kernel)
        add("kernel 1x25, as large as 5x5", either, kernel=[1, 25])
        for act in ("swish", "", "GELU"):
            add(f"act {act!r}", act=act)
        for rank in (0, 1, 2, 3, 5):
            add(f"x of rank {rank}", x=_zeros(*[3] * rank, dtype=dtype))
        add("more channels in x", x=torch.cat([x] * 4, 1))
        add("fewer channels in x", either, x=x[:, :1])
        add("x smaller than a patch", x=x[..., :1])
        add("x of integers", x=x.int())
        add("complex x", x=x + 1j)
        add("x in float64", x=x.double())
        add("x on meta, weights on the CPU", either, x=x.to("meta"))
        add("no images", either, x=x[:0])
        add("no pixels", x=x[..., :0, :])
        bare = good | {"patch": [], "packed": tensors[2:]}
        add("without a stem, wrong channels", good=bare)
        add("without a stem, no pixels", either, good=bare | {"x": _zeros(2, 19, 0, 4, dtype=dtype)})
        add(
            "without a stem and pooled, no pixels",
            either,
            good=bare | {"x": _zeros(2, 19, 0, 4, dtype=dtype), "pool": True},
        )
        other = torch.bfloat16 if dtype == torch.float32 else torch.float32
        add("packed for another dtype", either, x=x.to(other))
    packs(refused, either)


def _pack(name: str, weight: Tensor) -> Callable[[], Any]:
    return lambda: getattr(OPS, name)(weight)


def packs(refused: Calls, either: Calls) -> None:
    for size in (
        (),
        (5,),
        (5, 1, 3),
        (5, 2, 3, 3),
        (5, 1, 33, 3),
        (5, 1, 3, 33),
        (5, 1, 0, 3),
        (5, 1, 3, 0),
        (5, 1, 3, 3, 1),
    ):
        refused[f"pack_depthwise: {list(size)}"] = _pack("pack_depthwise", _zeros(*size))
    for size in ((), (5,), (5, 5, 1), (5, 5, 1, 1)):
        refused[f"pack_pointwise: {list(size)}"] = _pack("pack_pointwise", _zeros(*size))
    for name, size in (("pack_depthwise", (5, 1, 3, 3)), ("pack_pointwise", (5, 5))):
        for dtype in (torch.int32, torch.complex64, torch.float64):
            refused[f"{name}: {cases.name(dtype)}"] = _pack(name, _zeros(*size, dtype=dtype))
        refused[f"{name}: sparse"] = _pack(name, _zeros(*size).to_sparse())
        either[f"{name}: nothing"] = _pack(name, _zeros(0, *size[1:]))
    either["pack_pointwise: no inputs"] = _pack("pack_pointwise", _zeros(5, 0))


def _as_its_fake(op: str, args: tuple[object, ...]) -> None:
    """Both raise a ValueError that names an argument, or both give the same shape."""
    outcomes = []
    for call, device in ((getattr(ops, op), "cpu"), (getattr(OPS, op), "meta")):
        try:
            outcomes.append(list(call(*(a.to(device) if isinstance(a, Tensor) else a for a in args)).shape))
        except Exception as error:
            outcomes.append(f"{type(error).__name__} {error}")
    assert outcomes[0] == outcomes[1], f"{outcomes[0]}, and its fake {outcomes[1]}"
    named = re.match(r"ValueError (x|weight): got .*wanted", str(outcomes[0]))
    assert named or isinstance(outcomes[0], list), outcomes[0]


def degenerate(either: Calls) -> None:
    """The public functions on no channels or no pixels."""
    for op, shape in cases.NOTHING:
        either[f"{op} public: {shape}"] = partial(_as_its_fake, op, cases.inputs(op, shape))


REFUSED: Calls = {}
EITHER: Calls = {}
blocks(REFUSED, EITHER)
degenerate(EITHER)
if registry.C is not None:
    stacks(REFUSED, EITHER)
CALLS = list({**REFUSED, **EITHER}.items())

if __name__ == "__main__":
    if registry.C is not None:
        registry.C.set_isa_level(sys.argv[1])
    for number, (_, call) in enumerate(CALLS):
        if number < int(sys.argv[2]):
            continue
        print(number, flush=True)
        try:
            call()
            print(json.dumps([None, ""]), flush=True)
        except Exception as error:
            print(json.dumps([type(error).__name__, str(error)]), flush=True)
