"""The dispatcher's operators, called past the checks in Python, refuse what they cannot run and never crash."""

import json
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest
import raw_calls
from conftest import LEVELS

Result = tuple[
    str | None, str
]  # what a call raised: type and message, or (None, ""); ("crash", how) if its process died
NAMES = [name for name, _ in raw_calls.CALLS]
ERRORS = ("ValueError", "TypeError", "RuntimeError", "NotImplementedError")


@cache
def _results(level: str) -> dict[str, Result]:
    """Every call at one instruction set. After a crash the next process goes on behind it."""
    script = Path(raw_calls.__file__)
    results: dict[str, Result] = {}
    number = -1
    while number + 1 < len(NAMES):
        command = [sys.executable, "-W", "ignore", script.name, level, str(number + 1)]
        done = subprocess.run(command, capture_output=True, text=True, cwd=script.parent, timeout=300)
        assert done.stdout, done.stderr[-2000:]
        for line in done.stdout.splitlines():
            value = json.loads(line)
            if isinstance(value, int):
                number = value
                results[NAMES[number]] = ("crash", f"exit status {done.returncode} {done.stderr[-2000:]}")
            else:
                results[NAMES[number]] = tuple(value)
        if done.returncode == 0:
            break
    return results


@pytest.mark.parametrize("group", sorted({name.partition(":")[0] for name in NAMES}))
@pytest.mark.parametrize("level", LEVELS or ["reference"])
def test_raw_calls(level: str, group: str) -> None:
    results = {name: r for name, r in _results(level).items() if name.partition(":")[0] == group}
    assert results
    wrong = []
    for name, (kind, text) in results.items():
        fine = kind in ERRORS or (kind is None and name in raw_calls.EITHER)
        wrong += [] if fine else [f"{name}: {kind or 'nothing raised'} {text}"]
    assert not wrong, "\n".join(wrong)
