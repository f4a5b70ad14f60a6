"""Programs of tests/emulator under sanitizers, and planted bugs, which must be caught.

A planted bug is an edit of the product's own source, or of a header that this includes: one that no longer applies
fails, and wants a new place.
"""

import re
import subprocess
from pathlib import Path
from typing import NamedTuple

import ahead
import emulated
import pytest

ENVIRONMENT = {**ahead.ENVIRONMENT, "ASAN_OPTIONS": "detect_leaks=0", "TSAN_OPTIONS": "halt_on_error=1 report_bugs=1"}


class Bug(NamedTuple):
    file: str  # from the repository's root
    argument: str  # of the program: what to run
    old: str
    new: str
    checker: str  # address, thread, or values
    says: str


def _with_header(source: Path, wanted: str) -> str:
    """The source; where it is its header that has what is wanted, with that in the place of its #include."""
    text = source.read_text()
    for line, header in re.findall(r'(#include "([a-z_]+\.cuh)"\n)', text):
        body = (source.parent / header).read_text()
        if wanted not in text and wanted in body:
            text = text.replace(line, body.replace("#pragma once\n", ""))
    return text


class Program(NamedTuple):
    """One of tests/emulator with the kernels it runs, or the program of a planted bug. It runs none of fp16."""

    checker: str
    sources: tuple[str, ...]
    bug: Bug | None = None

    def build(self) -> Path:
        if self.bug is None:
            return emulated.build(self.checker, *self.sources)
        file, _, old, new, _, _ = self.bug
        text = _with_header(emulated.ROOT / file, old)
        assert text.count(old) == 1, f"{file} has {text.count(old)} places for this bug, wanted one"
        planted = emulated.written(emulated.without_fp16(text.replace(old, new)), ".cu")
        others = (source for source in self.sources if source != file)
        return emulated.build(self.checker, planted, *others)


@ahead.once
def outcome(program: Program) -> subprocess.CompletedProcess[str]:
    """What becomes of it: of a bug with its argument, else with none, which runs everything."""
    arguments = [program.bug.argument] if program.bug else []
    return ahead.run(program.build(), *arguments, env=ENVIRONMENT)


def clean(*sources: str) -> pytest.MarkDecorator:
    """A test with `program` of these sources under each sanitizer."""
    return _parametrized({mode: Program(mode, sources) for mode in ("address", "thread")})


def bugs(found: dict[str, Bug], sources: tuple[str, ...]) -> pytest.MarkDecorator:
    """A test with `program` of each bug."""
    checkers = {"values": "program"}
    return _parametrized({name: Program(checkers.get(b.checker, b.checker), sources, b) for name, b in found.items()})


def _parametrized(programs: dict[str, Program]) -> pytest.MarkDecorator:
    values = [pytest.param(p, id=name, marks=emulated.needs(outcome, p)) for name, p in programs.items()]
    return pytest.mark.parametrize("program", values)


def check_clean(program: Program) -> None:
    """It ends well and says nothing."""
    done = outcome(program)
    assert done.returncode == 0 and not done.stdout, done.stdout[:4000]


def check_caught(program: Program) -> None:
    """It fails and says what was wrong."""
    done = outcome(program)
    assert done.returncode != 0, "nothing was noticed"
    assert program.bug.says in done.stdout, done.stdout[:4000]
