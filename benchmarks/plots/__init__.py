"""The pictures of results, as PNG files beside them. Each is drawn only where its data are.

python -m benchmarks.plots [RESULTS.json ...]        without a file: the last run, benchmarks/results/latest.json

Several files of one machine make one set of pictures, named after the first.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib import pyplot

from benchmarks.machine import title
from benchmarks.plots import accuracy, kernels, networks
from benchmarks.plots.style import STYLE

PICTURES = {
    "throughput": networks.throughput,
    "latency": networks.latency,
    "errors": networks.errors,
    "accuracy": accuracy.accuracy,
    "breakdown": kernels.breakdown,
    "speedup": kernels.speedup,
    "roofline": kernels.roofline,
    "training": kernels.training,
}


def draw(paths: Sequence[Path]) -> list[Path]:
    """Draw what the files hold; returns what was written."""
    content = _joined([json.loads(path.read_text()) for path in paths])
    about, written = content["machine"], []
    versions = [f"{package} {version}" for package, version in about["versions"].items()]
    with pyplot.rc_context(STYLE):
        for name, picture in PICTURES.items():
            figure = picture(content)
            if figure is not None:
                shown = versions if figure.get_figwidth() > 8 else versions[:1]
                text = "   ".join([title(about), *shown, about["date"][:10]])
                figure.text(0.01, 0.006, text, fontsize=6.5, color="#777777")
                written.append(paths[0].with_name(f"{paths[0].stem}_{name}.png"))
                figure.savefig(written[-1], dpi=110)
                pyplot.close(figure)
    return written


def _joined(contents: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Sections after one another; the machine is that of the first file, and has to be the same in all."""
    cpus = {title(content["machine"]) for content in contents}
    if len(cpus) > 1:
        raise ValueError(f"the files are of different machines: {', '.join(sorted(cpus))}; draw each on its own")
    joined: dict[str, Any] = {}
    for content in contents:
        for section, rows in content.items():
            if section == "machine":
                joined.setdefault(section, rows)
            else:
                joined.setdefault(section, []).extend(rows)
    return joined
