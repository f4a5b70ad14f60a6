"""torch.compile with freezing: weights are constants, packed once, layouts propagated."""

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


def build(spec: Spec, weights: Path, dtype: str, photos: Tensor) -> Runner:
    model = plain_with(spec, weights).to(DTYPES[dtype])
    compiled = torch.compile(model, options={"freezing": True}, dynamic=False)

    def feed(x: Tensor) -> Tensor:
        return x.to(DTYPES[dtype])

    compiled(feed(photos))
    return Runner(feed, compiled, settings={"layout": "its choice", "freezing": True})
