"""Which rows run: a part that takes about five minutes, everything, or what was named."""

import os
from pathlib import Path
from typing import Any

import pytest

from benchmarks import bench_ops, bench_training
from benchmarks.networks import DTYPES, QUICK_DTYPES, RELEASED, SPECS
from benchmarks.peers import PROVIDERS
from benchmarks.race import Row, crawls

HERE = Path(__file__).parent
_DEFAULT = [name for name, provider in PROVIDERS.items() if provider.by_default]


def add_options(parser: pytest.Parser) -> None:
    group = parser.getgroup("cmx_kernels")
    group.addoption("--full", action="store_true", help="everything (hours); the same as CMX_BENCH=full")
    group.addoption("--models", default=",".join(RELEASED), help=f"of {', '.join(SPECS)}; default: the released ones")
    group.addoption("--batches", help="batch sizes; default 1,8, with --full 1,8,32")
    group.addoption("--dtypes", help=f"of {', '.join(DTYPES)}; default: {','.join(QUICK_DTYPES)}, with --full all")
    group.addoption("--providers", help=f"of {', '.join(PROVIDERS)}; or all; default: all but inductor")


def full(config: pytest.Config) -> bool:
    return config.getoption("full") or os.environ.get("CMX_BENCH") == "full"


def network_rows(config: pytest.Config) -> list[Row]:
    """Rows of one race stand together."""
    models, batches = config.getoption("models").split(","), config.getoption("batches")
    asked = config.getoption("providers") or ("all" if full(config) else ",".join(_DEFAULT))
    providers = [*PROVIDERS] if asked == "all" else asked.split(",")
    for name in providers:
        if name not in PROVIDERS:
            raise pytest.UsageError(f"--providers: got {name!r}, wanted all, or some of {', '.join(PROVIDERS)}")
    for name in models:
        if name not in SPECS:
            raise pytest.UsageError(f"--models: got {name!r}, wanted some of {', '.join(SPECS)}")
    rows = [
        Row(model, int(batch), dtype, provider.name)
        for model in models
        for batch in (batches or ("1,8,32" if full(config) else "1,8")).split(",")
        for dtype in _dtypes(config)
        for provider in PROVIDERS.values()
        if dtype in provider.dtypes and provider.name in providers
    ]
    return [row for row in rows if row.batch == 1 or not crawls(row)]


def _dtypes(config: pytest.Config) -> list[str]:
    asked = config.getoption("dtypes")
    found = asked.split(",") if asked else [*(DTYPES if full(config) else QUICK_DTYPES)]
    for name in found:
        if name not in DTYPES:
            raise pytest.UsageError(f"--dtypes: got {name!r}, wanted some of {', '.join(DTYPES)}")
    return found


def reduce(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leaves the quick rows of every file, unless it was named, or a keyword chooses, or everything was asked for."""
    models = config.getoption("models")
    networks_only = models != ",".join(RELEASED)  # who names networks wants those
    everything = full(config) or config.getoption("keyword")
    named = {Path(argument.split("::")[0]).name for argument in config.args}

    def wanted(item: Any) -> bool:
        network = _network(item)
        if network is not None and (network not in models.split(",") if networks_only else network == "tiny"):
            return False
        return everything or item.path.name in named or _quick(item, networks_only)

    left_out = [item for item in items if item.path.parent == HERE and not wanted(item)]
    if left_out:
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if item not in left_out]


def _network(item: Any) -> str | None:
    """The network that a row is of; None for a single operator."""
    asked = item.callspec.params
    if "network" in asked:
        return asked["network"].name
    return getattr(asked["row"], "model", None) if "row" in asked else asked.get("model")  # no row: NOTSET


def _quick(item: Any, networks_only: bool) -> bool:
    name = item.path.name
    if networks_only or name in ("bench_models.py", "bench_rivals.py", "bench_swapped.py"):
        return name == "bench_models.py"
    if name == "bench_ops.py":
        return bench_ops.quick(item.callspec.params["shape"])
    if name == "bench_training.py":
        return bench_training.quick(item.callspec.params["row"])
    return item.callspec.params["dtype"] == "fp32"  # bench_breakdown.py
