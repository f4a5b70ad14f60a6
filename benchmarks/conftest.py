"""Options, what the rows share, live progress, and the tables at the end."""

import sys
import time
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import machine, photos, race, report, selection
from benchmarks.race import Arena
from benchmarks.training import Trainings

RESULTS = Path(__file__).parent / "results"
_ARENA = pytest.StashKey[Arena]()
_KEPT = pytest.StashKey[dict[str, list[dict[str, Any]]]]()


def pytest_addoption(parser: pytest.Parser) -> None:
    selection.add_options(parser)
    options = parser.getgroup("cmx_kernels")
    options.addoption("--results", default="latest", metavar="NAME", help="benchmarks/results/NAME.json, .md and .png")


def pytest_configure(config: pytest.Config) -> None:
    config.stash[_KEPT] = defaultdict(list)
    if not (config.option.benchmark_verbose or config.option.benchmark_compare or config.option.benchmark_columns):
        config.option.benchmark_quiet = True  # our table says the same and more; its own comes if it is asked for


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if metafunc.function.__name__ == "bench_model":
        rows = selection.network_rows(metafunc.config)
        metafunc.parametrize("row", rows, ids=[str(row).replace(" ", "-") for row in rows])


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    selection.reduce(config, items)


def pytest_collection_finish(session: pytest.Session) -> None:
    if all(item.path.parent == RESULTS.parent for item in session.items):  # say() tells more than names and dots
        session.config.pluginmanager.getplugin("terminalreporter").showfspath = False


def pytest_report_teststatus(report: pytest.TestReport, config: pytest.Config) -> tuple[str, str, str] | None:
    mine = report.nodeid.startswith(f"{RESULTS.parent.name}/")
    told = report.when == "call" or report.skipped
    outcome = "xfailed" if hasattr(report, "wasxfail") else report.outcome
    return (outcome, "", outcome.upper()) if mine and told else None


@pytest.fixture(scope="session")
def say(request: pytest.FixtureRequest) -> Any:
    """A line on stderr, now: how far this part of the run is, and a guess at what is left of it."""
    start = time.perf_counter()
    config = request.config
    capture = config.pluginmanager.getplugin("capturemanager")
    terminal = config.pluginmanager.getplugin("terminalreporter")
    last = [0.0, start]  # fraction, and when the part began

    def line(fraction: float | None, text: str) -> None:
        now = time.perf_counter()
        if fraction is not None and fraction < last[0]:
            last[1] = now
        last[0] = last[0] if fraction is None else fraction
        left = f", {(now - last[1]) * (1 / fraction - 1):3.0f} s left" if fraction and fraction > 0.02 else ""
        progress = "    " if fraction is None else f"{fraction:4.0%}"
        with capture.global_and_fixture_disabled():
            terminal.ensure_newline()
            print(f"[{progress}, {now - start:3.0f} s{left}] {text}", file=sys.stderr, flush=True)

    return line


def _need_photos() -> None:
    absent = photos.why_absent()
    if absent is not None:
        pytest.skip(absent)


def _rows(request: pytest.FixtureRequest, fixture: str) -> list[race.Row]:
    return [item.callspec.params["row"] for item in request.session.items if fixture in item.fixturenames]


def _has_peak() -> bool:
    from cmx_kernels import registry

    return hasattr(registry.C, "peak")


@pytest.fixture(scope="session")
def arena(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, say: Any) -> Iterator[Arena]:
    _need_photos()
    budget = race.FULL if selection.full(request.config) else race.DEFAULT
    folder, threads = tmp_path_factory.mktemp("weights"), torch.get_num_threads()
    arena = Arena(_rows(request, "arena"), budget, folder, threads, say, _has_peak())
    request.config.stash[_ARENA] = arena
    yield arena
    arena.close()


@pytest.fixture(scope="session")
def trainings(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, say: Any
) -> Iterator[Trainings]:
    _need_photos()
    folder, threads = tmp_path_factory.mktemp("training"), torch.get_num_threads()
    trainings = Trainings(_rows(request, "trainings"), folder, threads, say, _has_peak())
    yield trainings
    trainings.close()


@pytest.fixture
def keep(request: pytest.FixtureRequest) -> Any:
    """Puts a record into a section of the results."""
    return lambda section, record: request.config.stash[_KEPT][section].append(record)


@pytest.fixture
def record_op(request: pytest.FixtureRequest, say: Any) -> Any:
    """Keeps the row of a single operator for the summary."""
    kept = request.config.stash[_KEPT]["ops"]
    of_ops = sum("record_op" in item.fixturenames for item in request.session.items)

    def keep(row: dict[str, Any]) -> None:
        kept.append(row)
        ratios = "  ".join(f"{name} {row[f'x_{name}']:.2f}" for name in ("NCHW", "NHWC", "best"))
        say(len(kept) / of_ops, f"{request.node.callspec.id}: x plain: {ratios}{'  SLOWER' * row['slower']}")

    return keep


def pytest_benchmark_update_machine_info(config: pytest.Config, machine_info: dict[str, Any]) -> None:
    machine_info.pop("node", None)  # a host's name is nobody's business
    machine_info["cmx_kernels"] = machine.about()


@pytest.hookimpl(trylast=True)
def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    arena, kept = config.stash.get(_ARENA, None), config.stash[_KEPT]
    if arena and arena.results:
        kept["models"] = report.records(arena.results)
    if not any(kept.values()):
        return
    about = {**machine.about(), "ceilings": machine.ceilings()}
    terminalreporter.section("cmx_kernels against plain PyTorch and its peers")
    for line in [*machine.header(about), *report.summary(kept, "text")]:
        terminalreporter.write_line(line)
    path = report.write(RESULTS, config.getoption("results"), about, kept)
    terminalreporter.write_line(f"\nwritten: {_relative(path)} and .md")
    for line in _plots(path):
        terminalreporter.write_line(line)


def _relative(path: Path) -> Path:
    return path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path


def _plots(path: Path) -> list[str]:
    try:
        from benchmarks import plots
    except ModuleNotFoundError as error:
        if error.name != "matplotlib":
            raise
        return ["no plots: matplotlib is not installed (pip install '.[plots]')"]
    return [f"plotted: {_relative(png)}" for png in plots.draw([path])]
