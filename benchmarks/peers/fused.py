"""cmx_kernels: the same weights in the fused model."""

from pathlib import Path

import torch
from torch import Tensor, nn

from benchmarks.fields import backends_of
from benchmarks.networks import DTYPES, RELEASED, Spec
from benchmarks.peers import Runner


def why_absent() -> str | None:
    try:
        import cmx_kernels
    except ImportError as error:
        return f"cmx_kernels does not import: {error}"
    return None if hasattr(cmx_kernels, "create_model") else "this cmx_kernels has no create_model"


def build(spec: Spec, weights: Path, dtype: str, photos: Tensor) -> Runner:
    with torch.device("meta"):
        model = network(spec)
    model.load_state_dict(torch.load(weights, weights_only=True, mmap=True), assign=True)
    model = model.to(DTYPES[dtype]).eval().requires_grad_(False)
    x = photos.to(DTYPES[dtype])
    return Runner(
        feed=lambda x: x.to(DTYPES[dtype]),
        run=model,
        settings={"layout": "NCHW", "backend": _backend(model, x), "backends": backends_of(model, x)},
        model=model,
    )


def network(spec: Spec) -> nn.Module:
    import cmx_kernels

    if spec.name in RELEASED:
        return cmx_kernels.create_model(spec.name, fused=True)
    return cmx_kernels.ConvMixer(
        spec.dim, spec.depth, spec.kernel_size, spec.patch_size, spec.classes, act_layer=spec.act, fused=True
    )


def _backend(model: nn.Module, x: Tensor) -> str:
    """What runs the parts that can be fused, and how many of them were refused."""
    import cmx_kernels

    report = cmx_kernels.explain(model, x)
    ours = " + ".join(sorted({row.backend for row in report if row.backend != "torch"}))
    return f"{ours}, {len(report.refusals)} parts plain" if report.refusals else ours
