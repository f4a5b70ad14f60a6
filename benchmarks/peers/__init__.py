"""The providers of one and the same network: one small module each.

A module has
    why_absent() -> str | None                                  what is missing, in words
    build(spec, weights, dtype, photos) -> Runner               ready to be timed at the shape of ``photos``
    build(spec, weights, dtype, photos) -> list[Runner]         or several, where settings have no one best choice
and uses the settings that someone who knows the tool would choose; Runner.settings names them.
"""

import importlib
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn


@dataclass
class Runner:
    """One network, built for one dtype and batch size."""

    feed: Callable[[Tensor], Any]  # float32 NCHW photographs -> the provider's own input; not timed
    run: Callable[[Any], Any]  # timed
    read: Callable[[Any], Tensor] = lambda out: out.float()  # the logits in float32; not timed
    settings: dict[str, Any] = field(default_factory=dict)
    model: nn.Module | None = None  # if it is one: its tensors are counted


def fastest(runners: Sequence[Runner], photos: Tensor) -> Runner:
    """The one whose better of two calls, after a first, is the quickest."""

    def seconds(runner: Runner) -> float:
        feed, times = runner.feed(photos), []
        runner.run(feed)
        for _ in range(2):
            start = time.perf_counter()
            runner.run(feed)
            times.append(time.perf_counter() - start)
        return min(times)

    return min(runners, key=seconds)


@dataclass(frozen=True)
class Provider:
    name: str
    module: str
    dtypes: tuple[str, ...]
    kind: str  # "fused", "eager" or "peer"
    by_default: bool = True  # False: compiling takes minutes
    files: bool = True  # it converts the model to a file, which its dtypes share

    def load(self) -> Any:
        return importlib.import_module(f"benchmarks.peers.{self.module}")


# In the order of the tables. eager comes first: its error bounds that of the others.
PROVIDERS = {
    provider.name: provider
    for provider in (
        Provider("eager", "eager", ("fp32", "bf16", "fp16"), "eager"),
        Provider("eager channels_last", "eager_channels_last", ("fp32", "bf16"), "eager"),
        Provider("inductor", "inductor", ("fp32", "bf16"), "peer", by_default=False, files=False),
        Provider("onnxruntime", "onnx_runtime", ("fp32",), "peer"),
        Provider("openvino", "openvino_runtime", ("fp32", "bf16"), "peer"),
        Provider("fused", "fused", ("fp32", "bf16", "fp16"), "fused"),
    )
}
