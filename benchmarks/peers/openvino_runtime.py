"""OpenVINO. The precision is forced: by default it computes in bfloat16 wherever the processor can.

One image: the LATENCY hint. More: one request an image under the THROUGHPUT hint, which keeps a core on an image; the
whole batch in one request was 1 to 3 % slower in every network here.
"""

import importlib.util
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
    import openvino

    hint = "LATENCY" if len(photos) == 1 else "THROUGHPUT"
    config = {
        "INFERENCE_PRECISION_HINT": _PRECISION[dtype],
        "INFERENCE_NUM_THREADS": torch.get_num_threads(),
        "PERFORMANCE_HINT": hint,
    }
    compiled = openvino.Core().compile_model(str(_converted(spec, weights, photos[:1])), "CPU", config)
    settings = {"layout": "its choice", "precision": _PRECISION[dtype], "hint": hint}
    return _latency(compiled, settings) if len(photos) == 1 else _throughput(compiled, spec, len(photos), settings)


def _latency(compiled: Any, settings: dict[str, Any]) -> Runner:
    request = compiled.create_infer_request()
    return Runner(
        feed=lambda x: {0: x.numpy()},
        run=lambda feed: request.infer(feed, share_inputs=True)[0],
        read=lambda out: torch.from_numpy(out.copy()),
        settings=settings,
    )


def _throughput(compiled: Any, spec: Spec, images: int, settings: dict[str, Any]) -> Runner:
    import openvino

    queue = openvino.AsyncInferQueue(compiled)  # as many requests as OpenVINO thinks best
    logits = np.empty((images, spec.classes), np.float32)

    def keep(request: Any, i: int) -> None:
        logits[i] = request.get_output_tensor(0).data[0]

    def run(feed: list[np.ndarray]) -> np.ndarray:
        for i, image in enumerate(feed):
            queue.start_async({0: image}, userdata=i, share_inputs=True)
        queue.wait_all()
        return logits

    queue.set_callback(keep)
    return Runner(
        feed=lambda x: [image.numpy()[None] for image in x],
        run=run,
        read=lambda out: torch.from_numpy(out.copy()),
        settings={**settings, "requests": len(queue)},
    )


def _converted(spec: Spec, weights: Path, image: Tensor) -> Path:
    """OpenVINO's form of the model, for one image, beside its weights.

    Traced here as OpenVINO would, without comparing traces: that takes longer than the rest, and results are checked.
    """
    import openvino

    path = weights.with_suffix(".xml")
    if not path.exists():
        traced = torch.jit.trace(plain_with(spec, weights), image, check_trace=False)
        model = openvino.convert_model(traced, example_input=image)
        model.reshape(list(image.shape))
        openvino.save_model(model, path, compress_to_fp16=False)
    return path
