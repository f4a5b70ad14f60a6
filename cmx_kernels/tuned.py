"""What tune() measured: the fastest backend of a call, in a JSON file in the user's cache folder.

    $XDG_CACHE_HOME/cmx_kernels/tuned.json        ~/.cache, ~/Library/Caches or %LOCALAPPDATA% without that variable
    {"version": 1, "machines": [{"machine": {...}, "choices": [{"op", "x", "weight", ..., "backend", "ms"}]}]}

Entries belong to a machine: device, driver, torch, Triton, and this package's library and Python. Those of another one
are kept in the file and not used, so that it can lie in a home folder that machines share.
"""

import contextlib
import hashlib
import json
import os
import platform
import sys
import tempfile
import warnings
from collections.abc import Sequence
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from cmx_kernels import registry

VERSION = 1
Shape = tuple[int, ...]


class Call(NamedTuple):
    """What a measured choice is for; the fields are those of the file."""

    op: str
    x: Shape
    weight: Shape  # of a block_stack: depth, channels, kernel
    dtype: str
    act: str
    channels_last: bool
    grad: bool
    device: str
    threads: int

    def any_image(self) -> tuple[Any, ...]:
        """What is known of a call in a compiled graph, where batch and image size may be symbols."""
        return self.op, self.weight, self.dtype, self.act, self.grad, self.device.partition(":")[0]


choices: dict[Call, str] = {}
agreed: dict[tuple[Any, ...], str] = {}  # by any_image(), where all shapes that were measured agree
of_gpus: list[dict[str, Any]] = []  # machines of the file that wait for the first CUDA tensor


def call_of(op: str, x: Tensor, weight: Sequence[int], act: str) -> Call:
    last = x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()
    threads = torch.get_num_threads() if x.device.type == "cpu" else 0
    grad = torch.is_grad_enabled()
    return Call(op, tuple(x.shape), tuple(weight), str(x.dtype), act, last, grad, str(x.device), threads)


def choice(op: str, x: Tensor, weight: Sequence[int], act: str) -> str | None:
    """The backend measured as the fastest for this call, None where nothing was measured."""
    if torch.compiler.is_compiling():
        return agreed.get((op, tuple(weight), str(x.dtype), act, torch.is_grad_enabled(), x.device.type))
    if of_gpus and x.device.type == "cuda":
        _take(of_gpus, str(x.device))
    return choices.get(call_of(op, x, weight, act))


def remember(call: Call, backend: str) -> None:
    choices[call] = backend
    key = call.any_image()
    alike = {name for other, name in choices.items() if other.any_image() == key}
    if len(alike) == 1:
        agreed[key] = backend
    else:
        agreed.pop(key, None)


def forget() -> None:
    """Everything in this process; the file stays."""
    choices.clear()
    agreed.clear()
    of_gpus.clear()


def cache_file() -> Path:
    home = Path.home()
    default = {"win32": os.environ.get("LOCALAPPDATA", home), "darwin": home / "Library/Caches"}
    folder = os.environ.get("XDG_CACHE_HOME") or default.get(sys.platform, home / ".cache")
    return Path(folder, "cmx_kernels", "tuned.json")


@cache
def machine(device: str) -> dict[str, str]:
    """What a choice is good for. CUDA is only asked about where there is a CUDA tensor."""
    library = Path(registry.C.__file__).stat() if registry.C is not None else None
    found = {
        "device": device,
        "torch": torch.__version__,
        "library": f"{library.st_size}-{library.st_mtime_ns}" if library else "none",
        "sources": sources(Path(__file__).parent),
        "triton": _triton(),
    }
    if device.startswith("cuda"):
        properties = torch.cuda.get_device_properties(device)
        driver = getattr(torch._C, "_cuda_getDriverVersion", lambda: "unknown")()
        return found | {"name": f"{properties.name}, {properties.total_memory} bytes", "driver": str(driver)}
    return found | {"name": _cpu_name(), "cores": str(os.cpu_count()), "isa": str(registry.isa_level())}


def sources(package: Path) -> str:
    """A digest of the Python in a folder: it holds the Triton kernels, and decides which kernel runs."""
    digest = hashlib.sha256()
    for file in sorted(package.rglob("*.py")):
        digest.update(f"{file.relative_to(package).as_posix()}\0{file.stat().st_size}\0".encode() + file.read_bytes())
    return digest.hexdigest()[:16]


def _triton() -> str:
    """The version of Triton, which is not imported for it."""
    for name in ("triton", "pytorch-triton", "triton-windows"):
        with contextlib.suppress(metadata.PackageNotFoundError):
            return metadata.version(name)
    return "none"


def _cpu_name() -> str:
    try:
        with open("/proc/cpuinfo") as file:
            return next(line.partition(":")[2].strip() for line in file if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def _read(path: Path) -> list[dict[str, Any]]:
    """The machines of the file; none, with a warning, where it is damaged or of another version."""
    try:
        content = json.loads(path.read_text())
        if content["version"] != VERSION:
            return []
        machines = content["machines"]
        for entry in machines:
            for choice in entry["choices"]:
                _parse(choice, entry["machine"]["device"])
    except FileNotFoundError:
        return []
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        warnings.warn(f"cmx_kernels: {path} cannot be read ({error!r}); delete it and call tune() again", stacklevel=3)
        return []
    return machines


def _parse(entry: dict[str, Any], device: str) -> tuple[Call, str]:
    x, weight = (tuple(map(int, entry[name])) for name in ("x", "weight"))
    flags = bool(entry["channels_last"]), bool(entry["grad"])
    call = Call(entry["op"], x, weight, entry["dtype"], entry["act"], *flags, device, int(entry["threads"]))
    return call, str(entry["backend"])


def _take(machines: list[dict[str, Any]], device: str) -> None:
    """Use what was measured on this machine."""
    for entry in [m for m in machines if m["machine"]["device"] == device]:
        machines.remove(entry)
        if entry["machine"] == machine(device):
            for one in entry["choices"]:
                remember(*_parse(one, device))


def load() -> None:
    """Choices of the CPU; those of GPUs when the first of their tensors comes."""
    path = cache_file()
    if path.is_file():
        of_gpus[:] = _read(path)
        _take(of_gpus, "cpu")


def save(measured: list[tuple[Call, str, dict[str, float]]]) -> None:
    """Adds to the file, in one step: a reader sees the old one or the new one. Of two writers at once one may lose."""
    path = cache_file()
    machines = _read(path) if path.is_file() else []
    for device in {call.device for call, _, _ in measured}:
        entries = [
            {**call._asdict(), "backend": backend, "ms": ms} for call, backend, ms in measured if call.device == device
        ]
        calls = {call for call, _, _ in measured}
        for entry in [m for m in machines if m["machine"] == machine(device)]:
            machines.remove(entry)
            entries += [one for one in entry["choices"] if _parse(one, device)[0] not in calls]
        machines.append({"machine": machine(device), "choices": entries})
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=path.parent, suffix=".new", delete=False) as file:
            json.dump({"version": VERSION, "machines": machines}, file, indent=1)
        os.replace(file.name, path)
    except OSError as error:
        warnings.warn(
            f"cmx_kernels: tune() holds for this process only: {path} is not writable ({error})", stacklevel=3
        )


load()
