"""Profiler ranges that tell which backend runs an operator; nothing but a look at a flag where no profiler is on."""

from collections.abc import Callable
from typing import Any

import torch
from torch.autograd import profiler


def call(function: Callable[..., Any], op: str, backend: str, *args: Any, **keywords: Any) -> Any:
    """``function(*args)``, in a range such as "cmx_kernels.depthwise_block [cpu]"."""
    if torch.compiler.is_compiling() or not profiler._is_profiler_enabled:  # in a graph the operator has its own range
        return function(*args, **keywords)
    with profiler.record_function(f"cmx_kernels.{op} [{backend}]"):
        return function(*args, **keywords)
