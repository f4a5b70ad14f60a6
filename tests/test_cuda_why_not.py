"""Why no CUDA kernel runs on a device: the sentence for every answer of the CUDA runtime (csrc/cuda/device.cu)."""

import ctypes
import itertools
import re

import ahead
import emulated
import pytest

SOURCE = "tests/emulator/device.cpp"
NO_DEVICE, INSUFFICIENT_DRIVER, OUT_OF_MEMORY = 100, 35, 2  # cudaError_t
NO_IMAGE, INVALID_FUNCTION, UNSUPPORTED_PTX, INVALID_PTX, NO_COMPILER = 209, 98, 222, 218, 221
T4 = r"device \d+ \(Tesla T4, compute capability 7\.5\)"
BUILT = r"the kernels were built for 8\.0;9\.0a\+PTX"
NO_CODE = rf"{BUILT}, which does not serve {T4}: build again with its compute capability in TORCH_CUDA_ARCH_LIST"
NO_PTX = rf"{BUILT}, and the driver cannot compile their PTX for {T4} \(the runtime's own words\): build again .*"
LINKED = ((SOURCE, "csrc/cuda/device.*"), "-x", "c++", SOURCE)
pytestmark = emulated.needs(emulated.link, *LINKED)
devices = itertools.count()  # an answer is remembered, so that every question is of another device


class Answers(ctypes.Structure):
    """struct Answers of tests/emulator/device.cpp"""

    _fields_ = tuple((name, ctypes.c_int) for name in ("driver", "devices", "count", "set", "attributes"))


@ahead.once
def library() -> ctypes.CDLL:
    found = ctypes.CDLL(str(emulated.link(*LINKED)))
    found.cmx_cuda_why_not.restype = ctypes.c_char_p
    return found


def why_not(device: int, driver: int = 13000, devices: int = 1000, **errors: int) -> str | None:
    library().cmx_answer(ctypes.byref(Answers(driver, devices, **errors)))
    said = library().cmx_cuda_why_not(device)
    return said if said is None else said.decode()


@pytest.mark.parametrize(
    ("answers", "sentence"),
    (
        ({"driver": 0}, r"no NVIDIA driver is installed \(libcuda\.so\.1 was not found\)"),
        (
            {"driver": 11040, "count": INSUFFICIENT_DRIVER},
            r"the NVIDIA driver supports CUDA 11\.4 and the kernels were built with CUDA \d+\.\d: update .*",
        ),
        ({"count": NO_DEVICE}, r"no CUDA device is visible \(is CUDA_VISIBLE_DEVICES set\?\)"),
        ({"devices": 0}, r"there is no CUDA device \d+, only 0 of them"),
        ({"set": OUT_OF_MEMORY}, r"CUDA says of device \d+: the runtime's own words"),
        *(({"attributes": error}, NO_CODE) for error in (NO_IMAGE, INVALID_FUNCTION)),
        *(({"attributes": error}, NO_PTX) for error in (UNSUPPORTED_PTX, INVALID_PTX, NO_COMPILER)),
        ({"attributes": OUT_OF_MEMORY}, r"CUDA says of device \d+: the runtime's own words"),
    ),
)
def test_sentences(answers: dict[str, int], sentence: str) -> None:
    """Said once, and remembered whatever the runtime answers later."""
    device = next(devices)
    said = why_not(device, **answers)
    assert said is not None
    assert re.fullmatch(sentence, said)
    assert why_not(device) == said


def test_kernels_run() -> None:
    device = next(devices)
    assert why_not(device) is None
    assert why_not(device, driver=0) is None
    assert "there is no CUDA device -1" in why_not(-1)
