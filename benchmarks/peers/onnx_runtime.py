"""ONNX Runtime's CPU provider, all graph optimisations. float32 only: it has no bfloat16 convolution."""

import importlib.util
import tempfile
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.networks import Spec, plain_with
from benchmarks.peers import Runner


def why_absent() -> str | None:
    missing = [name for name in ("onnx", "onnxruntime") if importlib.util.find_spec(name) is None]
    return f"{' and '.join(missing)} not installed: pip install '.[peers]'" if missing else None


def build(spec: Spec, weights: Path, dtype: str, photos: Tensor) -> Runner:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_ALL
    with tempfile.TemporaryDirectory() as folder:
        path = str(Path(folder, "model.onnx"))
        torch.onnx.export(plain_with(spec, weights), (photos,), path, dynamo=False, opset_version=20)
        session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    return Runner(
        feed=lambda x: {name: x.numpy()},
        run=lambda feed: session.run(None, feed),
        read=lambda out: torch.from_numpy(out[0]),
        settings={"layout": "its choice", "intra_op_num_threads": torch.get_num_threads()},
    )
