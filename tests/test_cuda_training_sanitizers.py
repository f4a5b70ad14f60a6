"""The CUDA kernels of training under AddressSanitizer, UBSan and ThreadSanitizer, and with planted bugs."""

from pathlib import Path

import emulated
import pytest
from test_cuda_sanitizers import KERNEL_FILES, run

MAIN = "tests/emulator/sanitized_training.cpp"
BACKWARD, FORWARD = "csrc/cuda/depthwise_bwd_ffma.cu", KERNEL_FILES["ffma"]
SOURCES = (*KERNEL_FILES.values(), BACKWARD, "csrc/cuda/depthwise_fwd.cu", "csrc/cuda/training_final.cu", MAIN)


@pytest.mark.parametrize("mode", ("address", "thread"))
def test_clean(mode: str) -> None:
    done = run(emulated.build(mode, *SOURCES))
    assert done.returncode == 0, done.stdout + done.stderr[:4000]
    assert done.stdout + done.stderr == ""


LOADED = "    load_input<T>(x, at, p, plan);\n    __syncthreads();\n"
GUARD = "    if (y + i >= s.h) {"
PLANTED = {  # what: file, old, new, checker, what it says
    "no barrier after the load": (BACKWARD, LOADED, LOADED.split("\n")[0] + "\n", "thread", "data race"),
    "no barrier before the filter's sums": (BACKWARD, "__syncthreads();  // x' is there", "", "thread", "data race"),
    "stores below the last row": (BACKWARD, GUARD, "    if (false) {", "address", "heap-buffer-overflow"),
    "not turned": (BACKWARD, "load_weights<T, true>", "load_weights<T, false>", "values", "wrong"),
    "no barrier between merges": (
        FORWARD,
        "    __syncthreads();\n    if (patch % (2",
        "    if (patch % (2",
        "thread",
        "data race",
    ),
}


@pytest.mark.parametrize("bug", PLANTED)
def test_planted_bug_is_caught(bug: str, tmp_path: Path) -> None:
    file, old, new, checker, says = PLANTED[bug]
    source = (emulated.ROOT / file).read_text()
    assert source.count(old) == 1, f"{file} has {source.count(old)} places for this bug, wanted one"
    planted = tmp_path / "planted.cu"
    planted.write_text(source.replace(old, new))
    others = [other for other in SOURCES if other != file]
    program = emulated.build("program" if checker == "values" else checker, str(planted), *others)
    done = run(program, "backward" if file == BACKWARD else "forward")
    assert done.returncode != 0, "nothing was noticed"
    assert says in done.stdout + done.stderr, (done.stdout + done.stderr)[:4000]
