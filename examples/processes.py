"""The processes that torchrun started: their group, from its beginning to its end."""

import contextlib
import gc
import os
from collections.abc import Iterator

import torch
import torch.distributed as dist
import torch.distributed.nn  # before a group exists: later it would keep that as its functions' default


def count() -> int:
    return int(os.environ.get("WORLD_SIZE", 1))


def device(name: str) -> str:
    """That of this process, where there are several on one machine."""
    return f"{name}:{os.environ.get('LOCAL_RANK', 0)}" if name == "cuda" and count() > 1 else name


@contextlib.contextmanager
def group(device: str) -> Iterator[None]:
    """All of them, if there are several. Inside, nothing may be left that holds it: a model, an exception."""
    if count() == 1:
        yield
        return
    if device.startswith("cuda"):
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if device.startswith("cuda") else "gloo")
    try:
        yield
    finally:
        gc.collect()  # DDP is in a cycle and holds the group: its threads can abort a process that ends before them
        dist.destroy_process_group()


@contextlib.contextmanager
def first_of_machine() -> Iterator[None]:
    """The others wait until it has been inside: it may download."""
    waits = count() > 1 and os.environ.get("LOCAL_RANK", "0") != "0"
    if waits:
        dist.barrier()
    yield
    if count() > 1 and not waits:
        dist.barrier()
