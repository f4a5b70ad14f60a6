"""Seed, threads, NaN-filled empties, and the fixtures ``isa`` and ``backend``."""

import importlib.util
import os
import tempfile
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path

os.environ.update(XDG_CACHE_HOME=tempfile.mkdtemp())  # what somebody's tune() measured is no part of a test
os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # before torch: idle threads of two test runs do not spin

import ahead
import hypothesis
import pytest
import torch
from torch import Tensor

from cmx_kernels import backends, ops, registry

# these run in a process of their own, from test_triton.py: Triton decides at its import whether it interprets
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
collect_ignore = [] if INTERPRETED else ["interpreted"]
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
    config.pluginmanager.register(ahead, "ahead")
    config.addinivalue_line("filterwarnings", "ignore:Using padding='same' with even kernel")


@pytest.fixture(autouse=True)
def same_start() -> Iterator[None]:
    """Every test starts from one seed and thread count, and memory nobody has written reads as NaN."""
    _seed(0)
    torch.set_num_threads(THREADS)
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    torch.backends.cudnn.allow_tf32 = False  # float32 means float32, on a GPU too
    yield
    torch.use_deterministic_algorithms(False)


def moved(t: Tensor, device: str) -> Tensor:
    """A copy on another device with the same strides and, up to 16 elements, the same offset."""
    if not t.numel():
        return torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device=device)
    span = 1 + sum((size - 1) * stride for size, stride in zip(t.shape, t.stride(), strict=True))
    offset = t.storage_offset() % 16
    memory = torch.full((offset + span,), torch.nan, dtype=t.dtype, device=device)
    memory[offset:] = t.detach().resolve_neg().as_strided((span,), (1,)).to(device)
    return memory.as_strided(t.shape, t.stride(), offset)


class Runner:
    """Calls an operator by name on one backend and, for compiled CPU kernels, one instruction set.

    Tensors come from the CPU and the result goes back there, on a GPU backend too.
    """

    def __init__(self, name: str, level: str | None = None) -> None:
        self.name, self.level = name, level

    def _place(self, args: tuple[object, ...]) -> list[object]:
        on_gpu = self.name in ("cuda", "triton")
        return [moved(a, "cuda") if on_gpu and isinstance(a, Tensor) else a for a in args]

    def why_not(self, op: str, *args: object) -> str | None:
        """The reason of this backend against the call, None if it runs it."""
        x, *rest = self._place(args)
        act = next((a for a in rest if isinstance(a, str)), "none")
        with backends.use(self.name):  # a GPU's is taken only where it is asked for by name
            return backends.refusals(op, x, act).get(self.name)

    def __call__(self, op: str, *args: object) -> Tensor:
        x = args[0]
        if self.name == "cpu" and isinstance(x, Tensor) and x.dtype == torch.float64:
            return getattr(torch.ops.cmx, op)(*args)  # the kernels serve float64 for gradcheck, the table prefers torch
        if self.name in ("cuda", "triton") and self.why_not(op, *args) is not None:
            pytest.skip(f"{self.name} refuses {op}: {self.why_not(op, *args)}")
        with backends.use(self.name):
            out = getattr(ops, op)(*self._place(args))
        return moved(out, "cpu") if out.is_cuda else out


def at_level(level: str) -> Iterator[None]:
    before = registry.C.isa_level()
    registry.C.set_isa_level(level)
    yield
    registry.C.set_isa_level(before)


_NO_KERNELS = pytest.param(None, id="no-kernels", marks=pytest.mark.skip(reason=str(registry.WHY_NO_C)))


@pytest.fixture(params=LEVELS or [_NO_KERNELS])
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    """Each instruction set that was compiled and that this machine has."""
    for _ in at_level(request.param):
        yield request.param


_GPU = [pytest.param(name, marks=pytest.mark.gpu) for name in ("cuda", "triton") if torch.cuda.is_available()]


@pytest.fixture(params=["reference", *LEVELS, *_GPU])
def backend(request: pytest.FixtureRequest) -> Iterator[Runner]:
    """The reference, the compiled CPU kernels at each instruction set, and where there is a GPU its backends."""
    if request.param in backends.NAMES:
        yield Runner(request.param)
        return
    for _ in at_level(request.param):
        yield Runner("cpu", request.param)
