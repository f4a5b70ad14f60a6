"""Training steps on a GPU: time and peak memory of forward, backward and AdamW.

    python -m benchmarks.gpu.training [--seconds 480] [--device cpu --dry-run]

256/8 on 32 x 32 images as on CIFAR-10, the others on 224 x 224. Gradients of the first step are held against float64,
as in benchmarks/training.py.
"""

import functools
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks import steps
from benchmarks.gpu import goals
from benchmarks.gpu.device import Device, described, flags, opened, parser, say
from benchmarks.gpu.network import timed
from benchmarks.gpu.store import Store
from benchmarks.networks import DTYPES, SPECS, Spec, plain
from benchmarks.training import PROVIDERS

_WIDE, _DEEP, _SMALL, _CIFAR = goals.WIDE, goals.DEEP, goals.SMALL, "convmixer_256_8_ks5_p2"
CELLS = [  # model, dtype (bf16: autocast), batch: what has goals first
    *((model, "bf16", 64) for model in (_WIDE, _DEEP, _SMALL)),
    (_CIFAR, "bf16", 512),
    *((model, "bf16", batch) for batch in (32, 128) for model in (_DEEP, _SMALL, _WIDE)),
    *((_CIFAR, "bf16", batch) for batch in (64, 128, 2048)),
    *((model, "fp32", batch) for model, batch in ((_CIFAR, 512), (_DEEP, 64), (_SMALL, 64), (_WIDE, 64))),
    (_DEEP, "bf16", 16),
]
DRY = [("tiny", "fp32", 2), ("tiny", "bf16", 2), ("tiny", "bf16", 3)]


def largest_error(device: Device, spec: Spec, weights: Path, provider: str, dtype: str, truth: Any) -> float:
    """Over all parameters, |g - ref| / |ref|."""
    (x, labels), wanted = truth
    model, call = steps.network(spec, weights, provider)
    model.to(device.type)
    steps.gradients(model, device.compiled(model) if provider == "inductor" else call, x, labels, dtype == "bf16")
    found = {name: p.grad for name, p in model.named_parameters()}
    return max(float((found[n].double() - ref).norm() / ref.norm()) for n, ref in wanted.items())


def reference(device: Device, spec: Spec, weights: Path) -> tuple[tuple[Tensor, Tensor], dict[str, Tensor]]:
    torch.manual_seed(2)
    size = min(spec.image_size, 16 * spec.patch_size)
    x = torch.randn(2, 3, size, size, device=device.type)
    labels = torch.arange(2, device=device.type)
    model, call = steps.network(spec, weights, "eager")
    steps.gradients(model.double().to(device.type), call, x.double(), labels, False)
    return (x, labels), {name: p.grad for name, p in model.named_parameters()}


def step(device: Device, spec: Spec, weights: Path, provider: str, dtype: str, batch: int) -> dict[str, Any]:
    torch.manual_seed(3)
    runner = steps.runner(spec, weights, provider, dtype, device.type)
    x = torch.randn(batch, 3, spec.image_size, spec.image_size, device=device.type)
    feed = x, torch.arange(batch, device=device.type) % spec.classes
    runner.run(feed)
    runner.model.zero_grad(set_to_none=True)  # so that gradients are counted as memory of the step
    used = device.memory(lambda: runner.run(feed))
    found = timed(device, lambda: runner.run(feed))
    rate = batch / found["ms"] * 1e3
    moved = 3 * spec.bytes(batch, DTYPES[dtype].itemsize)
    return {**found, "memory": used, "images_per_s": rate, "ms_per_image": found["ms"] / batch,
            "gflops": 3 * spec.flop * rate / 1e9, "gb_per_s": moved / found["ms"] * 1e-6}  # fmt: skip


def main(arguments: list[str] | None = None) -> int:
    options = parser("Training steps on a GPU.", "gpu-training").parse_args(arguments)
    device = opened(options)
    if device is None:
        return 2
    store = Store(device, options, goals.TRAINING)
    cells = [cell for cell in (DRY if device.dry else CELLS) if device.takes(cell[0])]
    backend = "cuda" if device.cuda else "cpu"
    ours = ("fused", "fused triton") if device.cuda else ("fused",)
    quick = [(*cell, provider) for cell in cells for provider in (*PROVIDERS, *ours[1:]) if provider != "inductor"]
    slow = [] if device.dry else [(*cell, "inductor") for cell in cells]  # a minute each
    with tempfile.TemporaryDirectory() as folder, flags():

        @functools.cache
        def weights_of(model: str) -> Path:
            torch.manual_seed(0)
            path = Path(folder) / f"{model}.pt"
            torch.save(plain(SPECS[model]).state_dict(), path)
            return path

        @functools.cache
        def truth_of(model: str) -> Any:
            return reference(device, SPECS[model], weights_of(model))

        @functools.cache
        def error_of(model: str, dtype: str, provider: str) -> float:
            with device.backend_of(provider):
                return largest_error(device, SPECS[model], weights_of(model), provider, dtype, truth_of(model))

        for model, dtype, batch, provider in [*quick, *slow]:
            key = {"model": model, "batch": batch, "dtype": dtype, "provider": provider}
            if device.over or store.has("training", key) or not device.wants(provider):
                continue
            record: dict[str, Any] = {**key, **described(provider, backend), "kind": provider.split()[0], "note": ""}
            record["peak_gflops"] = {}
            try:
                record["allowed"] = allowed = 2 * error_of(model, dtype, "eager") + 8 * torch.finfo(DTYPES[dtype]).eps
                record["error"] = error = error_of(model, dtype, provider)
                record["match"] = error <= allowed
                if not record["match"]:
                    raise ArithmeticError(f"gradients are off by {error:.2g}, allowed are {allowed:.2g}")
                with device.backend_of(provider):
                    record |= step(device, SPECS[model], weights_of(model), provider, dtype, batch)
            except Exception as failure:  # out of memory, no compiler, wrong gradients: the others still run
                record["status"] = "wrong" if isinstance(failure, ArithmeticError) else "failed"
                store.failed("training", record, failure)
            else:
                store.add("training", {**record, "status": "timed"})
            say(f"{model} b{batch} {dtype} {provider}: {record.get('images_per_s', record['note'])} images/s")
    store.tell_goals()
    return int(any(row["kind"] == "fused" and row["status"] != "timed" for row in store.rows("training")))


if __name__ == "__main__":
    raise SystemExit(main())
