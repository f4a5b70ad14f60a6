"""Work of other processes that tests wait for (compilers, sanitized programs, Triton), begun when the session begins.

    @ahead.once
    def program(mode: str) -> Path: ...        # takes long, in processes that ahead.run starts

    @ahead.needs(program, "thread")
    def test_races() -> None:
        assert run(program("thread")) ...

Such tests run last. Meanwhile, beside the others, their work is done at low priority: only that of the tests that were
selected, in their order. What a call raises, its test raises; what still runs when the session ends is ended.
"""

import contextlib
import functools
import os
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parent.parent
CORES = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
LATER = ("nice", "-n", "10") if shutil.which("nice") else ()
_pool = ThreadPoolExecutor(CORES, "ahead")
_free_cores = threading.Semaphore(CORES)
ENVIRONMENT = {**os.environ}  # tests change theirs for a while
_running: set[subprocess.Popen[str]] = set()
_ended = False
_starting = threading.Lock()


def once(function: Callable[..., Any]) -> Callable[..., Any]:
    """A cache for threads: the first call with these arguments works, others wait for what it returns or raises."""
    found: dict[tuple[Any, ...], Future[Any]] = {}
    lock = threading.Lock()

    @functools.wraps(function)
    def call(*arguments: Any) -> Any:
        with lock:
            first = arguments not in found
            future = found.setdefault(arguments, Future())
        if first:
            try:
                future.set_result(function(*arguments))
            except BaseException as error:  # a skip, too
                future.set_exception(error)
        return future.result()

    return call


def needs(call: Callable[..., Any], *arguments: Any, first: Callable[[], Any] | None = None) -> pytest.MarkDecorator:
    """Marks a test, or one of its parameters, that does this call, of a function decorated with `once`.

    first: of its work what reads this process's environment, which is done before the first test.
    """
    return pytest.mark.ahead.with_args(call, *arguments, first=first)


def run(*command: str | Path, env: dict[str, str] = ENVIRONMENT) -> subprocess.CompletedProcess[str]:
    """A process, and what it says, stderr too; no more at a time than there are cores."""
    with _free_cores:
        with _starting:
            assert not _ended, "the session has ended"
            output: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
            process = subprocess.Popen([*LATER, *command], env=env, cwd=ROOT, **output)
            _running.add(process)
        said = process.communicate()[0]
        _running.discard(process)
    return subprocess.CompletedProcess(command, process.returncode, said)


def run_python(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """A Python that finds the package and the tests."""
    paths = [str(ROOT), str(ROOT / "tests"), ENVIRONMENT.get("PYTHONPATH", "")]
    return run(sys.executable, *arguments, env={**ENVIRONMENT, "PYTHONPATH": os.pathsep.join(paths), **environment})


def _end(process: int) -> None:
    """With all that it has started: a compiler is a process of g++."""
    for children in Path(f"/proc/{process}/task").glob("*/children"):
        with contextlib.suppress(OSError):
            for child in children.read_text().split():
                _end(int(child))
    with contextlib.suppress(ProcessLookupError):
        os.kill(process, signal.SIGTERM)


# ---- the hooks of pytest; tests/conftest.py registers this module


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "ahead(function, *arguments): needs what this call returns, see tests/ahead.py")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: item.get_closest_marker("ahead") is not None)


def pytest_collection_finish(session: pytest.Session) -> None:
    if session.config.option.collectonly or session.testsfailed:
        return
    marks = [mark for item in session.items for mark in item.iter_markers("ahead")]
    for first in {mark.kwargs["first"] for mark in marks} - {None}:
        with contextlib.suppress(Exception, pytest.skip.Exception):  # which `once` keeps for the tests
            first()
    for function, *arguments in dict.fromkeys(mark.args for mark in marks):
        _pool.submit(function, *arguments)


def pytest_sessionstart() -> None:
    process = os.getpid()

    def terminated(number: int, frame: object) -> None:
        if os.getpid() == process:  # not in a fork
            _end_all()
        signal.signal(number, signal.SIG_DFL)
        os.kill(os.getpid(), number)

    for number in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) == signal.SIG_DFL:
            signal.signal(number, terminated)


def pytest_sessionfinish() -> None:
    with _starting:
        _end_all()
    _pool.shutdown(wait=False, cancel_futures=True)


def _end_all() -> None:
    global _ended
    _ended = True
    for process in tuple(_running):
        _end(process.pid)
