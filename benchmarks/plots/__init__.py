"""The pictures of results, as PNG files beside them. Each is drawn only where its data are.

python -m benchmarks.plots [RESULTS.json ...]        without a file: the last run, benchmarks/results/latest.json

Several files of one machine make one set of pictures, named after the first.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib import pyplot

from benchmarks.machine import header, title
from benchmarks.plots import accuracy, kernels, networks, style

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
    contents = [json.loads(path.read_text()) for path in paths]
    content, written = _joined(contents), []
    about = [line for one in contents for line in header(one["machine"])]
    with pyplot.rc_context(style.STYLE):
        for name, picture in PICTURES.items():
            figure = picture(content)
            if figure is not None:
                style.footer(figure, dict.fromkeys(about))
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
