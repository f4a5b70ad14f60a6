"""A run's records: curves, the line of progress, files that are whole or not there."""

import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any


def write_atomically(path: Path, write: Callable[[Path], Any]) -> None:
    """``write`` a file beside ``path`` and move it there, once it is on the disk."""
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        write(beside)
        with beside.open("rb+") as file:
            os.fsync(file.fileno())
        beside.replace(path)
    finally:
        beside.unlink(missing_ok=True)


class History:
    """Loss of every step; accuracy on the training images as they came, and on the test images, of every epoch."""

    def __init__(self) -> None:
        self.losses: list[float] = []
        self.train_accuracy: list[float] = []
        self.test_accuracy: list[float] = []
        self.right = self.seen = 0

    def step(self, loss: float, right: int, count: int) -> None:
        self.losses.append(loss)
        self.right, self.seen = self.right + right, self.seen + count

    def epoch(self, test_accuracy: float) -> None:
        self.train_accuracy.append(self.right / max(1, self.seen))
        self.test_accuracy.append(test_accuracy)
        self.right = self.seen = 0

    def state(self) -> dict[str, Any]:
        return dict(vars(self))

    def load(self, state: dict[str, Any]) -> None:
        vars(self).update(state)


class Progress:
    """One line on stderr that is written over, or where stderr is a file a line every half minute."""

    def __init__(self, title: str, total: int, shown: bool) -> None:
        self.title, self.total, self.shown = title, total, shown
        self.live = sys.stderr.isatty()
        self.start = self.last = time.monotonic()
        self.images = self.steps = 0

    def show(self, done: int, history: History, count: int) -> None:
        now = time.monotonic()
        self.images, self.steps = self.images + count, self.steps + 1
        if not self.shown or now - self.last < (0.1 if self.live else 30):
            return
        self.last = now
        recent = history.losses[-20:]
        left = (now - self.start) / self.steps * (self.total - done)
        text = (
            f"{self.title}  step {done}/{self.total}  loss {sum(recent) / len(recent):.3f}  "
            f"accuracy {history.right / history.seen:6.2%}  {self.images / (now - self.start):,.0f} images/s  "
            f"{clock(left)} left"
        )
        print(f"\r\x1b[K{text}" if self.live else text, end="" if self.live else "\n", file=sys.stderr, flush=True)

    def line(self, history: History) -> None:
        """What stays of an epoch."""
        if self.shown:
            seconds = time.monotonic() - self.start
            print(
                f"{chr(13) + chr(27) + '[K' if self.live else ''}{self.title}  "
                f"train accuracy {history.train_accuracy[-1]:.2%}  test accuracy {history.test_accuracy[-1]:.2%}  "
                f"{seconds:.1f} s  {self.images / seconds:,.0f} images/s",
                file=sys.stderr,
            )


def clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02}:{rest:02}"


def write_json(path: Path, content: Any) -> None:
    write_atomically(path, lambda beside: beside.write_text(json.dumps(content, indent=1) + "\n"))


def plot(path: Path, curves: dict[str, History]) -> str | None:
    """Loss and accuracy as PNG; a sentence where matplotlib is missing."""

    def draw(left: Any, right: Any) -> None:
        for name, history in curves.items():
            steps, window = len(history.losses), max(1, len(history.losses) // 200)
            smooth = [
                sum(history.losses[max(0, i - window) : i + 1]) / len(history.losses[max(0, i - window) : i + 1])
                for i in range(steps)
            ]
            left.plot(range(1, steps + 1), smooth, label=name, linewidth=1)
            epochs = range(1, len(history.test_accuracy) + 1)
            right.plot(epochs, [100 * a for a in history.test_accuracy], marker=".", label=f"{name}, test")
            right.plot(epochs, [100 * a for a in history.train_accuracy], linestyle=":", label=f"{name}, training")
        left.set(xlabel="step", ylabel="cross entropy", yscale="log")
        right.set(xlabel="epoch", ylabel="accuracy, %")

    return _figure(path, draw)


def plot_differences(path: Path, losses: dict[str, list[float]], base: str) -> str | None:
    """The losses of ``base``, and how far those of the others are from them at each step, as PNG."""

    def draw(left: Any, right: Any) -> None:
        steps = range(1, len(losses[base]) + 1)
        left.plot(steps, losses[base], label=base, linewidth=1)
        left.set(xlabel="step", ylabel="cross entropy", yscale="log")
        for name, curve in losses.items():
            if name != base:
                differences = [abs(a - b) for a, b in zip(curve, losses[base], strict=True)]
                right.plot(steps, differences, label=name, linewidth=1)
        right.set(xlabel="step", ylabel=f"distance of the loss from {base}'s", yscale="log")

    return _figure(path, draw)


def _figure(path: Path, draw: Callable[[Any, Any], None]) -> str | None:
    try:
        import matplotlib
    except ImportError:
        return f"no {path.name}: plots need matplotlib (pip install matplotlib)"
    matplotlib.use("Agg")  # no window
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(1, 2, figsize=(9, 3.2), layout="constrained")
    draw(*panels)
    for axes in panels:
        axes.grid(alpha=0.3)
        if axes.lines:
            axes.legend(frameon=False, fontsize=8)
    write_atomically(path, lambda beside: figure.savefig(beside, dpi=80, format="png"))
    pyplot.close(figure)
    return None
