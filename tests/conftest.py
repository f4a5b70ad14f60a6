"""Seed, threads, NaN-filled empties, and the fixtures ``isa`` and ``backend``."""

import importlib.util
import os
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # before torch: idle threads of two test runs do not spin

import hypothesis
import pytest
import torch
from torch import Tensor

from cmx_kernels import backends, ops, registry

LEVELS = registry.C.isa_levels() if registry.C is not None else []
THREADS = 2
# without CUDA, torch.manual_seed stores a stack trace a call in case CUDA is started later
_seed = torch.manual_seed if torch.cuda.is_available() else torch.default_generator.manual_seed

hypothesis.settings.register_profile(
    "cmx", derandomize=True, database=None, deadline=timedelta(seconds=20), print_blob=True
)
hypothesis.settings.load_profile("cmx")


def _let_torchvision_import() -> None:
    """timm imports torchvision, whose Python part fails where its library does not fit torch (a CPU torch with the
    CUDA torchvision of PyPI). Its two operators, only declared, are enough."""
    spec = importlib.util.find_spec("torchvision")
    if spec is None or spec.origin is None:
        return
    try:
        torch.ops.load_library(next(Path(spec.origin).parent.glob("_C*.so")))
    except (OSError, StopIteration):
        for name in ("nms", "qnms"):
            torch.library.define(f"torchvision::{name}", "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")


_let_torchvision_import()


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("filterwarnings", "ignore:Using padding='same' with even kernel")


@pytest.fixture(autouse=True)
def same_start() -> Iterator[None]:
    """Every test starts from one seed and thread count, and memory nobody has written reads as NaN."""
    _seed(0)
    torch.set_num_threads(THREADS)
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(False)


class Runner:
    """Calls an operator by name on one backend and, for compiled kernels, one instruction set."""

    def __init__(self, name: str, level: str | None = None) -> None:
        self.name, self.level = name, level

    def __call__(self, op: str, *args: object) -> Tensor:
        x = args[0]
        if self.name != "reference" and isinstance(x, Tensor) and x.dtype == torch.float64:
            return getattr(torch.ops.cmx, op)(*args)  # the kernels serve float64 for gradcheck, the table prefers torch
        with backends.use(self.name):
            return getattr(ops, op)(*args)


def _at(level: str) -> Iterator[None]:
    before = registry.C.isa_level()
    registry.C.set_isa_level(level)
    yield
    registry.C.set_isa_level(before)


_NO_KERNELS = pytest.param(None, id="no-kernels", marks=pytest.mark.skip(reason=str(registry.WHY_NO_C)))


@pytest.fixture(params=LEVELS or [_NO_KERNELS])
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    """Each instruction set that was compiled and that this machine has."""
    for _ in _at(request.param):
        yield request.param


@pytest.fixture(params=["reference", *LEVELS])
def backend(request: pytest.FixtureRequest) -> Iterator[Runner]:
    """The reference, then the compiled kernels at each instruction set."""
    if request.param == "reference":
        yield Runner("reference")
        return
    for _ in _at(request.param):
        yield Runner("cpu", request.param)
