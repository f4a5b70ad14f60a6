"""The CUDA product, pooling and epilogue under sanitizers, and with planted bugs, as tests/test_cuda_sanitizers.py."""

from pathlib import Path

import emulated
import pytest
from test_cuda_sanitizers import run

MAIN = "tests/emulator/sanitized_product.cpp"
FILES = {name: f"csrc/cuda/{name}.cu" for name in ("product_mma", "pool_head", "epilogue_inplace")}


@pytest.mark.parametrize("mode", ("address", "thread"))
def test_clean(mode: str) -> None:
    done = run(emulated.build(mode, *FILES.values(), MAIN))
    assert done.returncode == 0, done.stdout + done.stderr[:4000]
    assert done.stdout + done.stderr == ""


ARRIVED = "__syncthreads();  // the copies of all threads have arrived, and the stage before this one is free"
RING_FREE = "__syncthreads();  // the ring is free"
WAIT = "wait_for_copies<G::STAGES - 2>();"
LAST_PIXEL = "pixel >= pixels ? -1 : n * p.y_stride.n"
PLANTED = {  # what: file, layout, old, new, checker, what it says
    "no barrier in the ring": ("product_mma", "pixels", ARRIVED, "", "thread", "data race"),
    "no barrier before the sums": ("product_mma", "channels_last", RING_FREE, "", "thread", "data race"),
    "waits for one group too few": ("product_mma", "pixels", WAIT, WAIT.replace("- 2", "- 1"), "values", "wrong"),
    "stores beyond the last pixel": (
        "product_mma",
        "pixels",
        LAST_PIXEL,
        LAST_PIXEL.replace("pixels ?", "pixels + 8 ?"),
        "address",
        "heap-buffer-overflow",
    ),
    "loads beyond k": (
        "product_mma",
        "pixels",
        "offset >= 0 && k0 + r < k_end;",
        "offset >= 0;",
        "address",
        "overflow",
    ),
    "no barrier in the pool": ("pool_head", "pool", "  __syncthreads();\n", "", "thread", "data race"),
}


@pytest.mark.parametrize("bug", PLANTED)
def test_planted_bug_is_caught(bug: str, tmp_path: Path) -> None:
    file, layout, old, new, checker, says = PLANTED[bug]
    source = (emulated.ROOT / FILES[file]).read_text()
    assert source.count(old) == 1, f"{FILES[file]} has {source.count(old)} places for this bug, wanted one"
    planted = tmp_path / f"{file}.cu"
    planted.write_text(source.replace(old, new))
    others = [path for name, path in FILES.items() if name != file]
    program = emulated.build("program" if checker == "values" else checker, str(planted), *others, MAIN)
    done = run(program, layout)
    assert done.returncode != 0, "nothing was noticed"
    assert says in done.stdout + done.stderr, (done.stdout + done.stderr)[:4000]
