"""Threads, batches and processes: the same bits whatever the number of threads, whatever else is in the batch."""

import os
import signal
import sys
import threading
import time
from collections.abc import Callable

import cases
import pytest
import torch
from compare import check_equal
from torch import Tensor

from cmx_kernels import ops, registry
from cmx_kernels.ops import block_stack as stack

F32, BF16 = torch.float32, torch.bfloat16
LARGE = {  # enough for several bands, parts and chunks
    "depthwise_block": ((3, 35, 36, 37, 9, 9), (1, 16, 70, 5, 3, 3), (2, 20, 23, 41, 6, 5)),
    "pointwise_block": ((3, 70, 67, 19, 23), (1, 600, 33, 30, 31), (7, 16, 64, 5, 5)),
    "patch_embed": ((3, 3, 50, 70, 72, 7, 7), (1, 3, 64, 96, 96, 2, 2), (5, 3, 17, 28, 28, 14, 14)),
    "pool_head": ((3, 70, 37, 19, 23), (1, 33, 1000, 14, 14), (9, 16, 10, 7, 7)),
}


def _call(op: str, args: tuple[object, ...]) -> Tensor:
    return getattr(torch.ops.cmx, op)(*args)


def _stack(dtype: torch.dtype, channels: int = 35) -> stack.PackedStack:
    def conv(*size: int) -> stack.ConvParams:
        return stack.ConvParams((torch.randn(size) / 8).to(dtype), *(torch.randn(size[0]) for _ in range(3)))

    blocks = [(conv(channels, 1, 5, 5), conv(channels, channels, 1, 1)) for _ in range(3)]
    return stack.pack(conv(channels, 3, 4, 4), blocks, "gelu", dtype)


@pytest.mark.parametrize("dtype", cases.ALL_DTYPES, ids=cases.name)
@pytest.mark.parametrize("op", cases.OPS)
def test_number_of_threads(isa: str, op: str, dtype: torch.dtype) -> None:
    for shape in LARGE[op]:
        args = cases.inputs(op, shape, dtype)
        torch.set_num_threads(1)
        alone = _call(op, args)
        for threads in (2, 3, 4, 7):
            torch.set_num_threads(threads)
            check_equal(_call(op, args), alone, f"{threads} threads, {shape}")


@pytest.mark.parametrize("pool", (False, True), ids=("map", "pool"))
@pytest.mark.parametrize("dtype", cases.DTYPES, ids=cases.name)
def test_number_of_threads_of_a_stack(isa: str, dtype: torch.dtype, pool: bool) -> None:
    x, packed = torch.randn(5, 3, 60, 52).to(dtype), _stack(dtype)
    head = [torch.randn(21, packed.channels).to(dtype)] if pool else []
    torch.set_num_threads(1)
    alone = stack.block_stack(x, packed, pool, *head)
    for threads in (2, 3, 4, 7):
        torch.set_num_threads(threads)
        check_equal(stack.block_stack(x, packed, pool, *head), alone, f"{threads} threads")


@pytest.mark.parametrize("layout", ("contiguous", "channels_last"))
@pytest.mark.parametrize("dtype", cases.ALL_DTYPES, ids=cases.name)
@pytest.mark.parametrize("op", cases.OPS)
def test_batch_invariance(isa: str, op: str, dtype: torch.dtype, layout: str) -> None:
    """Image i of a batch has the bits it has alone, in either layout."""
    for shape in LARGE[op]:
        x, *rest = cases.inputs(op, shape, dtype)
        x = cases.LAYOUTS[layout](x)
        together = _call(op, (x, *rest))
        for i in range(len(x)):
            check_equal(together[i], _call(op, (x[i : i + 1].contiguous(), *rest))[0], f"image {i} of {shape}")


@pytest.mark.parametrize("dtype", cases.DTYPES, ids=cases.name)
def test_batch_invariance_of_a_stack(isa: str, dtype: torch.dtype) -> None:
    x, packed = torch.randn(23, 3, 28, 32).to(dtype), _stack(dtype)
    for head in ((False,), (True,), (True, torch.randn(21, packed.channels).to(dtype))):
        together = stack.block_stack(x, packed, *head)
        for i in (0, 1, 7, 22):
            check_equal(together[i], stack.block_stack(x[i : i + 1], packed, *head)[0], f"image {i}")


def test_python_threads(isa: str) -> None:
    """Calls from several Python threads at once, each with its own shapes, do not meet."""
    work = [(op, cases.inputs(op, shape, dtype)) for op in cases.OPS for shape in LARGE[op] for dtype in (F32, BF16)]
    wanted = [_call(op, args) for op, args in work]
    wrong: list[str] = []

    def run(first: int) -> None:
        try:
            for i in [*range(first, len(work)), *range(first)] * 2:
                op, args = work[i]
                check_equal(_call(op, args), wanted[i], op)
        except BaseException as error:
            wrong.append(repr(error))

    threads = [threading.Thread(target=run, args=(i * 6,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=120)
    assert not any(thread.is_alive() for thread in threads), "deadlock"
    assert not wrong, wrong[0]


def _in_child(run: Callable[[], bool], seconds: float = 60) -> str:
    """What became of a forked child that runs this: "right", "wrong", "hangs", or how it died."""
    child = os.fork()
    if not child:
        status = 1
        try:
            status = 0 if run() else 2
        finally:
            os._exit(status)
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            code = os.waitstatus_to_exitcode(status)
            return {0: "right", 2: "wrong"}.get(code, f"exit code {code}")
        time.sleep(0.01)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return "hangs"


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
def test_fork(isa: str) -> None:
    """A child forked after the parent used its threads computes the same, on one thread as DataLoader's workers do.

    With more threads OpenMP itself hangs in a forked child, for every operator of PyTorch too.
    """
    work = [(op, cases.inputs(op, LARGE[op][0])) for op in cases.OPS]
    wanted = [_call(op, args) for op, args in work]
    x, packed = torch.randn(2, 3, 28, 32), _stack(F32)
    wanted_stack = stack.block_stack(x, packed)

    def run() -> bool:
        torch.set_num_threads(1)
        same = all(torch.equal(_call(op, args), y) for (op, args), y in zip(work, wanted, strict=True))
        return same and torch.equal(stack.block_stack(x, packed), wanted_stack)

    assert _in_child(run) == "right"
    check_equal(_call(*work[0]), wanted[0], "the parent, afterwards")


class _Blocks(torch.utils.data.Dataset[Tensor]):
    """Items that were computed by our kernels, as an embedding in a data pipeline is."""

    def __len__(self) -> int:
        return 4

    def __getitem__(self, i: int) -> Tensor:
        args = cases.inputs("depthwise_block", cases.RAGGED["depthwise_block"])
        return ops.depthwise_block(args[0] + i, *args[1:])


@pytest.mark.skipif(sys.platform != "linux", reason="workers are forked on Linux only")
def test_data_loader_workers() -> None:
    here = [_Blocks()[i] for i in range(4)]
    loader = torch.utils.data.DataLoader(_Blocks(), batch_size=None, num_workers=2, timeout=60)
    for got, wanted in zip(loader, here, strict=True):
        check_equal(got, wanted)


@pytest.mark.skipif(registry.C is None, reason=str(registry.WHY_NO_C))
def test_thread_count_of_torch_is_kept() -> None:
    for threads in (1, 3):
        torch.set_num_threads(threads)
        _call("depthwise_block", cases.inputs("depthwise_block", LARGE["depthwise_block"][0]))
        assert torch.get_num_threads() == threads
