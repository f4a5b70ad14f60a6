"""Training steps on a GPU: time and peak memory of forward, backward and AdamW.

    python -m benchmarks.gpu.training [--seconds 480] [--device cpu --dry-run]

256/8 on 32 x 32 images as on CIFAR-10, 768/32 on 224 x 224. Gradients of the first step are held against float64, as in
benchmarks/training.py.
"""

import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks import steps
from benchmarks.gpu.device import Device, Store, flags, opened, parser, reason, say
from benchmarks.gpu.network import timed
from benchmarks.networks import DTYPES, SPECS, Spec, plain
from benchmarks.training import PROVIDERS

CELLS = [  # model, dtype (bf16: autocast), batch
    *(("convmixer_256_8_ks5_p2", dtype, 512) for dtype in ("bf16", "fp32")),
    *(("convmixer_768_32", dtype, 64) for dtype in ("bf16", "fp32")),
    *(("convmixer_768_32", "bf16", batch) for batch in (16, 32, 128)),
    *(("convmixer_256_8_ks5_p2", "bf16", batch) for batch in (64, 128, 2048)),
]


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
    used = device.memory(lambda: runner.run(feed))
    found = timed(device, lambda: runner.run(feed))
    rate = batch / found["ms"] * 1e3
    return {**found, "memory": used, "images_per_s": rate, "ms_per_image": found["ms"] / batch,
            "gflops": 3 * spec.flop * rate / 1e9}  # fmt: skip


def main(arguments: list[str] | None = None) -> int:
    options = parser("Training steps on a GPU.", "gpu-training").parse_args(arguments)
    device = opened(options)
    if device is None:
        return 2
    store, failed = Store(device, options), False
    cells = [("tiny", "fp32", 2), ("tiny", "bf16", 2)] if device.dry else CELLS
    with tempfile.TemporaryDirectory() as folder, flags():
        for model, dtype, batch in cells:
            spec, weights = SPECS[model], Path(folder) / f"{model}.pt"
            torch.manual_seed(0)
            torch.save(plain(spec).state_dict(), weights)
            truth = reference(device, spec, weights)
            allowed = 2 * largest_error(device, spec, weights, "eager", dtype, truth)
            allowed += 16 * torch.finfo(DTYPES[dtype]).eps / 2
            for provider in (*PROVIDERS, *(["fused triton"] if device.cuda else [])):
                if device.over or (device.dry and provider == "inductor"):
                    continue
                record: dict[str, Any] = {"model": model, "batch": batch, "dtype": dtype, "provider": provider}
                record |= {"kind": provider.split()[0], "note": "", "peak_gflops": {}, "allowed": allowed}
                try:
                    with device.backend_of(provider):
                        record["error"] = error = largest_error(device, spec, weights, provider, dtype, truth)
                        if not error <= allowed:
                            raise ArithmeticError(f"gradients are off by {error:.2g}, allowed are {allowed:.2g}")
                        record |= {**step(device, spec, weights, provider, dtype, batch), "status": "timed"}
                except Exception as failure:  # out of memory, no compiler, wrong gradients: the others still run
                    wrong = isinstance(failure, ArithmeticError)
                    record |= {"status": "wrong" if wrong else "failed", "note": reason(failure)}
                    failed |= record["kind"] == "fused"
                store.add("training", record)
                say(f"{model} b{batch} {dtype} {provider}: {record.get('images_per_s', record['note'])} images/s")
    return int(failed)


if __name__ == "__main__":
    raise SystemExit(main())
