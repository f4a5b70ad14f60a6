"""tests/ahead.py: what is begun, what comes first, who sees a failure, and that nothing outlives the session."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

TESTS = """
import os, signal, time
from pathlib import Path
import ahead, pytest

HERE = Path(__file__).parent

@ahead.once
def job(name, command):
    if name == "skips":
        pytest.skip("for this reason")
    started = HERE / name
    done = ahead.run("sh", "-c", f"echo $$ >> {started}; {command}")
    assert done.returncode == 0, done.stdout
    return done.stdout

@pytest.mark.parametrize("again", (1, 2))
@pytest.mark.parametrize("name, command", [
    pytest.param(*args, marks=ahead.needs(job, *args), id=args[0])
    for args in (("succeeds", "echo well"), ("fails", "echo badly >&2; false"), ("skips", ""))
])
def test_job(name, command, again):
    assert job(name, command) == "well\\n"

ENDLESS = ("endless", f"sleep 987 & echo $! >> {HERE / 'both'}; wait")

@ahead.needs(job, *ENDLESS)
def test_endless():
    job(*ENDLESS)

def test_plain():
    pass

@pytest.mark.parametrize("end", ("fails", "is_terminated"))
def test_end(end):
    while not (HERE / "both").exists() or not (HERE / "both").read_text():
        time.sleep(0.01)
    if end == "is_terminated":
        os.kill(os.getpid(), signal.SIGTERM)
    assert False
"""


@pytest.fixture
def session(tmp_path: Path):
    (tmp_path / "conftest.py").write_text(
        "import ahead\n\ndef pytest_configure(config):\n    config.pluginmanager.register(ahead)\n"
    )
    (tmp_path / "test_some.py").write_text(TESTS)

    def run(*options: str) -> list[str]:
        command = [sys.executable, "-m", "pytest", "-v", "-rs", "-p", "no:cacheprovider", *options]
        own = {"PYTHONPATH": str(Path(__file__).parent), "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1", "PYTEST_ADDOPTS": ""}
        done = subprocess.run(
            command, cwd=tmp_path, env={**os.environ, **own}, capture_output=True, text=True, timeout=500
        )
        return done.stdout.splitlines()

    return run


def _ends(pid: str) -> bool:
    """Soon: nobody waits for a process whose parent is gone."""
    for _ in range(200):
        try:
            if not Path("/proc", pid, "cmdline").read_bytes():
                return True
        except OSError:
            return True
        time.sleep(0.05)
    return False


def test_selected_jobs_are_done_once_and_their_tests_come_last(session, tmp_path: Path) -> None:
    lines = session("-k", "plain or job")
    found = [line.split("::")[1].split()[:2] for line in lines if "test_some.py::" in line and "%]" in line]
    wanted = {"succeeds": "PASSED", "fails": "FAILED", "skips": "SKIPPED"}
    assert found[0] == ["test_plain", "PASSED"]
    assert sorted(found[1:]) == sorted([f"test_job[{name}-{i}]", what] for name, what in wanted.items() for i in (1, 2))
    assert "E       AssertionError: badly" in lines, "a failure with its reason"
    assert len((tmp_path / "fails").read_text().split()) == 1
    assert not (tmp_path / "endless").exists()


@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="this system has no /proc to look at processes")
@pytest.mark.parametrize("end", ("fails", "is_terminated"))
def test_nothing_outlives_the_session(session, tmp_path: Path, end: str) -> None:
    lines = session("-x", "-k", f"endless or {end}")
    assert any(f"test_end[{end}]" in line for line in lines), lines
    assert any("1 failed" in line for line in lines) == (end == "fails")
    pids = [(tmp_path / name).read_text().strip() for name in ("endless", "both")]
    assert all(map(_ends, pids))
