"""OpenVINO. The precision is forced: by default it computes in bfloat16 wherever the processor can.

For more than one image there are two ways, one request with the whole batch or one image per request and stream; the
faster one on this machine is timed.
"""

import importlib.util
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.networks import Spec, plain_with
from benchmarks.peers import Runner

_PRECISION = {"fp32": "f32", "bf16": "bf16"}


def why_absent() -> str | None:
    found = importlib.util.find_spec("openvino") is not None
    return None if found else "openvino not installed: pip install '.[peers]'"


def build(spec: Spec, weights: Path, dtype: str, photos: Tensor) -> Runner:
    runners = [_whole_batch(spec, weights, dtype, photos)]
    if len(photos) > 1:
        runners.append(_image_by_image(spec, weights, dtype, photos))
    return min(runners, key=lambda runner: _seconds(runner, photos)) if len(runners) > 1 else runners[0]


def _compiled(spec: Spec, weights: Path, dtype: str, x: Tensor, hint: str) -> Any:
    import openvino

    model = openvino.convert_model(plain_with(spec, weights), example_input=x, input=list(x.shape))
    config = {
        "INFERENCE_PRECISION_HINT": _PRECISION[dtype],
        "INFERENCE_NUM_THREADS": torch.get_num_threads(),
        "PERFORMANCE_HINT": hint,
    }
    return openvino.Core().compile_model(model, "CPU", config)


def _whole_batch(spec: Spec, weights: Path, dtype: str, photos: Tensor) -> Runner:
    request = _compiled(spec, weights, dtype, photos, "LATENCY").create_infer_request()
    return Runner(
        feed=lambda x: {0: x.numpy()},
        run=lambda feed: request.infer(feed, share_inputs=True)[0],
        read=lambda out: torch.from_numpy(out.copy()),
        settings=_settings(dtype, "LATENCY"),
    )


def _image_by_image(spec: Spec, weights: Path, dtype: str, photos: Tensor) -> Runner:
    import openvino

    queue = openvino.AsyncInferQueue(_compiled(spec, weights, dtype, photos[:1], "THROUGHPUT"))
    logits = np.empty((len(photos), spec.classes), np.float32)

    def keep(request: Any, i: int) -> None:
        logits[i] = request.get_output_tensor(0).data[0]

    queue.set_callback(keep)

    def run(images: list[np.ndarray]) -> np.ndarray:
        for i, image in enumerate(images):
            queue.start_async({0: image}, userdata=i, share_inputs=True)
        queue.wait_all()
        return logits

    return Runner(
        feed=lambda x: [image.numpy()[None] for image in x],
        run=run,
        read=lambda out: torch.from_numpy(out.copy()),
        settings=_settings(dtype, f"THROUGHPUT, {len(queue)} requests at a time"),
    )


def _settings(dtype: str, hint: str) -> dict[str, Any]:
    return {"layout": "its choice", "precision": _PRECISION[dtype], "hint": hint}


def _seconds(runner: Runner, photos: Tensor) -> float:
    """Of the better of two calls after a first one."""
    feed, best = runner.feed(photos), float("inf")
    runner.run(feed)
    for _ in range(2):
        start = time.perf_counter()
        runner.run(feed)
        best = min(best, time.perf_counter() - start)
    return best
