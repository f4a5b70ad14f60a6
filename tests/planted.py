"""Programs of tests/emulator under sanitizers, and planted bugs, which must be caught.

A planted bug is an edit of the product's own source: one that no longer applies fails, and wants a new place.
"""

import os
import subprocess
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import emulated

ENVIRONMENT = {**os.environ, "ASAN_OPTIONS": "detect_leaks=0", "TSAN_OPTIONS": "halt_on_error=1 report_bugs=1"}


class Bug(NamedTuple):
    file: str  # from the repository's root
    argument: str  # of the program: what to run
    old: str
    new: str
    checker: str  # address, thread, or values
    says: str


def run(program: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([program, *arguments], capture_output=True, text=True, env=ENVIRONMENT)


def check_clean(mode: str, sources: tuple[str, ...]) -> None:
    """The program, all of it, ends well and says nothing."""
    done = run(emulated.build(mode, *sources))
    assert done.returncode == 0, done.stdout + done.stderr[:4000]
    assert done.stdout + done.stderr == ""


def build_all(bugs: dict[str, Bug], sources: tuple[str, ...], folder: Path) -> dict[str, Future[Path]]:
    """The same program of every edited source, made side by side while the first ones run."""
    pool = ThreadPoolExecutor(len(os.sched_getaffinity(0)))
    return {name: pool.submit(_build, bug, sources, folder / f"{i}.cu") for i, (name, bug) in enumerate(bugs.items())}


def _build(bug: Bug, sources: tuple[str, ...], planted: Path) -> Path:
    source = (emulated.ROOT / bug.file).read_text()
    assert source.count(bug.old) == 1, f"{bug.file} has {source.count(bug.old)} places for this bug, wanted one"
    planted.write_text(source.replace(bug.old, bug.new))
    others = [file for file in sources if file != bug.file]
    return emulated.build("program" if bug.checker == "values" else bug.checker, str(planted), *others)


def check_caught(bug: Bug, program: Future[Path]) -> None:
    """It fails and says what was wrong."""
    done = run(program.result(), bug.argument)
    assert done.returncode != 0, "nothing was noticed"
    assert bug.says in done.stdout + done.stderr, (done.stdout + done.stderr)[:4000]
