"""Records of a part as JSON and tables, and its goals beside what was reached."""

import argparse
import json
import os
import platform
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks import report
from benchmarks.gpu import goals
from benchmarks.gpu.device import Device, reason, say

BROKEN = 75  # exit status: a kernel has ended the CUDA context; another process goes on with --resume


class Store:
    """Writes after every record: whatever ends the process, what was measured is there.

    ``wanted``: goals, judged with every record. ``expected``: the keys of all rows that ``section`` is to have.
    """

    def __init__(
        self,
        device: Device,
        options: argparse.Namespace,
        wanted: Sequence[goals.Goal] = (),
        section: str = "",
        expected: Iterable[Mapping[str, Any]] = (),
    ) -> None:
        self.about, self.folder, self.name = device.about(), options.results, options.name
        self.kept: dict[str, list[dict[str, Any]]] = {}
        self._device, file = device, self.folder / f"{self.name}.json"
        self._wanted, self._section, self._expected = wanted, section, tuple(expected)
        if options.resume and file.is_file():
            self.kept = {key: rows for key, rows in json.loads(file.read_text()).items() if key != "machine"}

    def has(self, section: str, key: Mapping[str, Any]) -> bool:
        return any(key.items() <= row.items() for row in self.rows(section))

    def rows(self, section: str) -> list[dict[str, Any]]:
        return self.kept.get(section, [])

    def failed(self, section: str, record: dict[str, Any], error: BaseException) -> None:
        """Adds what failed. Where nothing else can run in this process, ends it: the rest is for another one."""
        record["note"] += reason(error)
        self.add(section, record)
        if self._device.broken:
            say(f"the CUDA context is broken: {record['note']}")
            os._exit(BROKEN)  # nothing is torn down: that would fail, too

    def add(self, section: str, record: Mapping[str, Any]) -> None:
        self.kept.setdefault(section, []).append(dict(record))
        self.write()

    def write(self) -> None:
        section = self._section
        missing = [key for key in self._expected if not self.has(section, key)]
        judged = goals.judged(self._wanted, {**self.kept, section: [*self.rows(section), *missing]})
        self.kept |= {"goals": judged} if judged else {}
        self.folder.mkdir(parents=True, exist_ok=True)
        report.write(self.folder, self.name, self.about, self.kept)

    def tell_goals(self) -> None:
        self.write()
        for line in goals.lines(self.rows("goals")):
            say(line)


def save(path: Path, record: Mapping[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({**record, "python": platform.python_version()}, indent=1) + "\n")
