"""Every operator on inputs that end, or begin, at a page nobody may touch: one element too far and the process dies.

``python guarded_calls.py LEVEL`` prints each call before it is made and "done" at the end. Outputs and scratch memory
come from malloc; tests/test_memory.py runs this under glibc's checking malloc, which notices writes behind a block.
"""

import ctypes
import mmap
import sys

import cases
import torch
from cases import LAYOUTS
from compare import check
from conftest import Runner
from torch import Tensor

from cmx_kernels import registry
from cmx_kernels.ops import block_stack as stack

PAGE = mmap.PAGESIZE
_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long]
_libc.mprotect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]


def guarded(t: Tensor, at_end: bool) -> Tensor:
    """The same values and strides, flush with a protected page behind (or before) them."""
    if not t.numel():
        return t
    span = 1 + sum((size - 1) * stride for size, stride in zip(t.shape, t.stride(), strict=True))
    inner = -(-span * t.element_size() // PAGE) * PAGE
    start = _libc.mmap(
        None, inner + 2 * PAGE, mmap.PROT_READ | mmap.PROT_WRITE, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS, -1, 0
    )
    assert start not in (None, ctypes.c_void_p(-1).value), "mmap failed"
    for guard in (start, start + PAGE + inner):
        assert _libc.mprotect(guard, PAGE, 0) == 0, "mprotect failed"
    first = start + PAGE + (inner - span * t.element_size() if at_end else 0)
    buffer = (ctypes.c_char * (span * t.element_size())).from_address(first)
    flat = torch.frombuffer(buffer, dtype=t.dtype)
    flat.copy_(t.as_strided((span,), (1,)))
    return flat.as_strided(t.shape, t.stride())


def operators(run: Runner) -> None:
    for op in cases.OPS:
        for dtype in cases.DTYPES:
            for shape in (cases.RAGGED[op], cases.SHAPES[op][3]):
                x, weight, *rest = cases.inputs(op, shape, dtype)
                for layout in LAYOUTS:
                    args = (LAYOUTS[layout](x), weight, *rest)
                    expected = cases.expect(op, args)
                    for at_end in (True, False):
                        print(op, cases.name(dtype), shape, layout, "end" if at_end else "begin", flush=True)
                        out = run(op, *(guarded(a, at_end) if isinstance(a, Tensor) else a for a in args))
                        check(out, expected)


def stacks() -> None:
    for dtype in cases.DTYPES:
        for channels, kernel, pixels in ((19, (5, 4), (13, 11)), (16, (9, 9), (7, 8)), (33, (7, 7), (9, 5))):

            def conv(*size: int, dtype: torch.dtype = dtype) -> stack.ConvParams:
                return stack.ConvParams(torch.randn(size).to(dtype), *(torch.randn(size[0]) for _ in range(3)))

            blocks = [(conv(channels, 1, *kernel), conv(channels, channels, 1, 1))] * 2
            packed = stack.pack(conv(channels, 3, 2, 3), blocks, "gelu", dtype)
            x = torch.randn(3, 3, *pixels).to(dtype)
            for pool in (True, False):
                for at_end in (True, False):
                    print("block_stack", cases.name(dtype), channels, pool, "end" if at_end else "begin", flush=True)
                    held = packed._replace(tensors=[guarded(t, at_end) for t in packed.tensors])
                    out = stack.block_stack(guarded(x, at_end), held, pool)
                    assert torch.equal(out, stack.block_stack(x, packed, pool))
                    if pool:
                        head = torch.randn(7, channels).to(dtype), torch.randn(7).to(dtype)
                        out = stack.block_stack(x, packed, True, *(guarded(t, at_end) for t in head))
                        assert torch.equal(out, stack.block_stack(x, packed, True, *head))


if __name__ == "__main__":
    torch.set_num_threads(2)
    registry.C.set_isa_level(sys.argv[1])
    operators(Runner("cpu", sys.argv[1]))
    stacks()
    print("done", flush=True)
