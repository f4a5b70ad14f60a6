"""torch.compile with freezing: weights are constants, folded and packed once.

Inductor turns convolutions to channels_last unless told not to; which is faster depends on kernel size and batch, so
both are compiled and the faster one is timed.
"""

import shutil
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.networks import DTYPES, Spec, plain_with
from benchmarks.peers import Runner


def why_absent() -> str | None:
    if not any(shutil.which(name) for name in ("g++", "clang++", "c++")):
        return "Inductor needs a C++ compiler"
    return None


def build(spec: Spec, weights: Path, dtype: str, photos: Tensor) -> list[Runner]:
    return [_compiled(spec, weights, dtype, photos, layout) for layout in (True, False)]


def _compiled(spec: Spec, weights: Path, dtype: str, photos: Tensor, layout: bool) -> Runner:
    model = plain_with(spec, weights).to(DTYPES[dtype])
    options = {"freezing": True, "layout_optimization": layout}
    torch._dynamo.reset()  # else a second compilation of the same class counts as a recompilation
    runner = Runner(
        feed=lambda x: x.to(DTYPES[dtype]),
        run=torch.compile(model, options=options, dynamic=False),
        settings={"layout": "NHWC" if layout else "NCHW", "freezing": True},
    )
    runner.run(runner.feed(photos))  # compiles
    return runner
