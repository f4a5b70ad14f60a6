"""Options, the arena that all rows share, live progress, and the table at the end."""

import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import photos, race, report, report_ops
from benchmarks.networks import RELEASED, SPECS
from benchmarks.peers import PROVIDERS
from benchmarks.race import Arena, Row

RESULTS = Path(__file__).parent / "results"
_ARENA = pytest.StashKey[Arena]()
_OPS = pytest.StashKey[list]()


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("cmx_kernels")
    group.addoption("--full", action="store_true", help="all providers, batch sizes and single operators (an hour)")
    group.addoption("--models", default=",".join(RELEASED), help=f"of {', '.join(SPECS)}; default: the released ones")
    group.addoption("--batches", help="batch sizes; default 1,8, with --full 1,8,32")
    group.addoption("--results", default="latest", metavar="NAME", help="benchmarks/results/NAME.json and .md")


def pytest_configure(config: pytest.Config) -> None:
    config.stash[_OPS] = []
    if not (config.option.benchmark_verbose or config.option.benchmark_compare or config.option.benchmark_columns):
        config.option.benchmark_quiet = True  # our table says the same and more; its own comes if it is asked for


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "row" in metafunc.fixturenames:
        rows = _rows(metafunc.config)
        metafunc.parametrize("row", rows, ids=[str(row).replace(" ", "-") for row in rows])


def _rows(config: pytest.Config) -> list[Row]:
    """Rows of one race stand together."""
    full = config.getoption("full")
    batches = config.getoption("batches") or ("1,8,32" if full else "1,8")
    return [
        Row(model, int(batch), dtype, provider.name)
        for model in config.getoption("models").split(",")
        for batch in batches.split(",")
        for dtype in ("fp32", "bf16")
        for provider in PROVIDERS.values()
        if dtype in provider.dtypes and (full or not provider.only_full)
    ]


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Single operators take long: only with --full, or when they are named."""
    asked = " ".join([*config.args, config.getoption("keyword")])
    if config.getoption("full") or any(name in asked for name in ("ops", "bench_op", "depthwise", "pointwise")):
        return
    left_out = [item for item in items if item.path.name == "bench_ops.py"]
    config.hook.pytest_deselected(items=left_out)
    items[:] = [item for item in items if item not in left_out]


def pytest_collection_finish(session: pytest.Session) -> None:
    if all(
        item.path.parent == RESULTS.parent for item in session.items
    ):  # the lines of say() tell more than file names and dots
        session.config.pluginmanager.getplugin("terminalreporter").showfspath = False


def pytest_report_teststatus(report: pytest.TestReport, config: pytest.Config) -> tuple[str, str, str] | None:
    mine = report.nodeid.startswith(f"{RESULTS.parent.name}/")
    told = report.when == "call" or report.skipped
    outcome = "xfailed" if hasattr(report, "wasxfail") else report.outcome
    return (outcome, "", outcome.upper()) if mine and told else None


@pytest.fixture(scope="session")
def say(request: pytest.FixtureRequest) -> Any:
    """A line on stderr, now: how far the run is, and a guess at what is left."""
    start = time.perf_counter()
    config = request.config
    capture = config.pluginmanager.getplugin("capturemanager")
    terminal = config.pluginmanager.getplugin("terminalreporter")

    def line(fraction: float, text: str) -> None:
        passed = time.perf_counter() - start
        left = f", {passed / fraction - passed:3.0f} s left" if fraction > 0.02 else ""
        with capture.global_and_fixture_disabled():
            terminal.ensure_newline()
            print(f"[{fraction:4.0%}, {passed:3.0f} s{left}] {text}", file=sys.stderr, flush=True)

    return line


@pytest.fixture(scope="session")
def arena(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, say: Any) -> Iterator[Arena]:
    absent = photos.why_absent()
    if absent is not None:
        pytest.skip(absent)
    from cmx_kernels import registry

    rows = [item.callspec.params["row"] for item in request.session.items if "row" in item.fixturenames]
    arena = Arena(
        rows,
        race.FULL if request.config.getoption("full") else race.DEFAULT,
        tmp_path_factory.mktemp("weights"),
        torch.get_num_threads(),
        say,
        peak=hasattr(registry.C, "peak"),
    )
    request.config.stash[_ARENA] = arena
    yield arena
    arena.close()


@pytest.fixture
def record_op(request: pytest.FixtureRequest, say: Any) -> Any:
    """Keeps the row of a single operator for the summary."""
    kept = request.config.stash[_OPS]
    of_ops = sum("record_op" in item.fixturenames for item in request.session.items)

    def keep(row: dict[str, Any]) -> None:
        kept.append(row)
        ratios = "  ".join(f"{name} {row[f'x_{name}']:.2f}" for name in ("NCHW", "NHWC", "best"))
        say(len(kept) / of_ops, f"{request.node.callspec.id}: x plain: {ratios}{'  SLOWER' * row['slower']}")

    return keep


def pytest_benchmark_update_machine_info(config: pytest.Config, machine_info: dict[str, Any]) -> None:
    machine_info.pop("node", None)  # a host's name is nobody's business
    machine_info["cmx_kernels"] = report.machine()


@pytest.hookimpl(trylast=True)
def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    arena, ops = config.stash.get(_ARENA, None), config.stash[_OPS]
    rows = report.records(arena.results) if arena else []
    if not rows and not ops:
        return
    about = report.machine()
    terminalreporter.section("cmx_kernels against plain PyTorch and its peers")
    lines = [*report.header(about), ""]
    if rows:
        lines += [*report.LEGEND, "", *report.plain_text(report.table(rows)), "", *report.remarks(rows)]
    for line in [*lines, *report_ops.summary(ops)]:
        terminalreporter.write_line(line)
    path = report.write(RESULTS, config.getoption("results"), about, rows, ops)
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
    return [f"plotted: {_relative(png)}" for png in plots.draw(path)]
