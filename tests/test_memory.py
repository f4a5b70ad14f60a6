"""Memory that is not an argument's is neither read nor written."""

import ctypes.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent


def _checking_malloc() -> dict[str, str]:
    """glibc's malloc that aborts on free() of a block with a write behind its end; nothing on other systems."""
    name = "libc_malloc_debug.so.0"
    try:
        ctypes.CDLL(name)
    except OSError:
        return {}
    return {"LD_PRELOAD": name, "MALLOC_CHECK_": "3"}


@pytest.mark.skipif(sys.platform != "linux", reason="guard pages are made with Linux's mmap")
def test_guard_pages(isa: str) -> None:
    environment = {**os.environ, **_checking_malloc()}
    command = [sys.executable, "-W", "ignore", "-X", "faulthandler", "guarded_calls.py", isa]
    done = subprocess.run(command, cwd=HERE, env=environment, capture_output=True, text=True, timeout=600)
    lines = done.stdout.splitlines()
    last = lines[-1] if lines else "nothing"
    assert done.returncode == 0, f"exit status {done.returncode} in {last!r}\n{done.stderr[-3000:]}"
    assert last == "done"
