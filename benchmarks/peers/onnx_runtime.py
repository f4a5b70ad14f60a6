"""ONNX Runtime's CPU provider, all graph optimisations. float32 only: it has no bfloat16 convolution."""

import importlib.util
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
    options.add_free_dimension_override_by_name("batch", len(photos))
    path = str(_exported(spec, weights, photos[:1]))
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    return Runner(
        feed=lambda x: {"images": x.numpy()},
        run=lambda feed: session.run(None, feed),
        read=lambda out: torch.from_numpy(out[0]),
        settings={"layout": "its choice", "intra_op_num_threads": torch.get_num_threads()},
    )


def _exported(spec: Spec, weights: Path, image: Tensor) -> Path:
    """The model as ONNX, beside its weights. Opset 20 has GELU as one operator."""
    path = weights.with_suffix(".onnx")
    if not path.exists():
        axes = {"images": {0: "batch"}, "logits": {0: "batch"}}
        names = {"input_names": ["images"], "output_names": ["logits"]}
        model = plain_with(spec, weights)
        torch.onnx.export(model, (image,), str(path), dynamo=False, opset_version=20, dynamic_axes=axes, **names)
    return path
