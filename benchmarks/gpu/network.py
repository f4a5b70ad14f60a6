"""Whole networks on a GPU: fused against every way PyTorch has, and the rivals of the paper's table.

    python -m benchmarks.gpu.network [--seconds 480] [--device cpu --dry-run]

Random weights and images. Logits are held against float64 first: |out - ref| <= 2 max|eager - ref| + eps, eager in the
same precision. Networks flush the caches themselves. The cells that matter most come first.
"""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from statistics import median, quantiles
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks import timm_models
from benchmarks.gpu.device import Device, Store, flags, graphed, opened, parser, reason, say
from benchmarks.networks import DTYPES, RELEASED, SPECS, Spec, plain
from cmx_kernels import cost_model, micro_batches

Call = Callable[[], Tensor]
PRECISIONS = {  # name -> TF32, dtype of autocast
    "fp32": (False, None),
    "tf32": (True, None),
    "bf16": (True, torch.bfloat16),
    "fp16": (True, torch.float16),
}
_EPS = {"fp32": 2**-24, "tf32": 2**-11, "bf16": 2**-8, "fp16": 2**-11}
_NETWORKS = (*RELEASED, "convmixer_512_16_ks8_p7")
RIVALS = ("resnet152", "deit_base_patch16_224", "mixer_b16_224", "convnext_base")
INDUCTOR: dict[str, dict[str, Any]] = {  # each takes a minute to compile, the last one several
    "inductor": {},
    "inductor, layout kept": {"options": {"layout_optimization": False}},
    "inductor, max-autotune": {"mode": "max-autotune"},
}
Cell = tuple[str, str, int, str]  # model, precision, batch; a compiled variant, or "" for all others


def _cells(models: Sequence[str], *kinds: tuple[str, int], compiled: str = "") -> list[Cell]:
    return [(model, name, batch, compiled) for name, batch in kinds for model in models]


_COMPILED = (("bf16", 64), ("bf16", 1), ("fp32", 64))
_LATER = (("bf16", 8), ("fp16", 1), ("fp32", 1), ("tf32", 1), ("fp16", 256))
_LAST = (("fp32", 8), ("tf32", 8), ("fp16", 8), ("fp32", 256), ("tf32", 256))
CELLS = [
    *_cells(_NETWORKS, ("bf16", 64)),
    *_cells(RIVALS, ("bf16", 64)),
    *_cells(_NETWORKS, ("bf16", 1)),
    *_cells(_NETWORKS, ("bf16", 64), compiled="inductor"),
    *_cells(_NETWORKS, ("fp32", 64), ("tf32", 64), ("fp16", 64), ("bf16", 256)),
    *_cells(_NETWORKS, *_COMPILED[1:], compiled="inductor"),
    *_cells(RIVALS, ("bf16", 1), ("bf16", 256)),
    *_cells(_NETWORKS, *_LATER),
    *(cell for name in list(INDUCTOR)[1:] for cell in _cells(_NETWORKS, *_COMPILED, compiled=name)),
    *_cells(RIVALS, *_COMPILED[:2], compiled="inductor"),
    *_cells(_NETWORKS, *_LAST),
]
DRY = [*_cells(["tiny"], *((name, 2) for name in PRECISIONS)), ("tiny", "fp32", 2, "inductor")]


def variants(device: Device, model: nn.Module, fused: nn.Module | None, x: Tensor, compiled: str) -> Iterator[tuple]:
    """(provider, cudnn.benchmark, make): make() returns what is timed. The model is moved, so in this order only."""

    def in_layout(layout: torch.memory_format) -> Call:
        own, images = model.to(memory_format=layout), x.contiguous(memory_format=layout)
        return lambda: own(images)

    nchw, nhwc = torch.contiguous_format, torch.channels_last
    if compiled:
        yield compiled, False, lambda: _compiled(device, model, x, INDUCTOR[compiled])
        return
    if fused is not None:
        yield "fused", False, lambda: lambda: fused(x)
        yield "fused, CUDA graph", False, lambda: graphed(device, lambda: fused(x))
        if device.cuda:
            yield "fused triton", False, lambda: lambda: fused(x)
        if len(x) > 1:
            yield "fused, at once, CUDA graph", False, lambda: graphed(device, divided(fused, x, 0))
            parts = "fused, micro-batches, CUDA graph"
            yield parts, False, lambda: graphed(device, divided(fused, x, that_fit(device, fused, x)))
    yield "eager", False, lambda: in_layout(nchw)
    yield "eager, cudnn.benchmark", True, lambda: in_layout(nchw)
    yield "eager, CUDA graph", False, lambda: graphed(device, in_layout(nchw))
    yield "eager channels_last", False, lambda: in_layout(nhwc)
    yield "eager channels_last, cudnn.benchmark", True, lambda: in_layout(nhwc)


def that_fit(device: Device, fused: nn.Module, x: Tensor) -> int:
    """Images of the best micro-batch in L2, whether it pays or not; half of the batch for a GPU that is not known."""
    name, spec = cost_model.named(device.name), next(s for s in SPECS.values() if s.dim == fused.num_features)
    if name is None:
        return max(1, len(x) // 2)
    side, kernel = spec.image_size // spec.patch_size, (spec.kernel_size, spec.kernel_size)
    dtype = torch.get_autocast_dtype(device.type) if torch.is_autocast_enabled(device.type) else x.dtype
    kind, act = str(dtype).removeprefix("torch."), "relu" if spec.act is nn.ReLU else "gelu"
    return micro_batches.predict(name, (len(x), spec.dim, side, side), spec.depth, kernel, kind, act, host_us=0).images


def divided(fused: nn.Module, x: Tensor, images: int) -> Call:
    def call() -> Tensor:
        fused.micro_batch = images
        try:
            return fused(x)
        finally:
            fused.micro_batch = None

    return call


def _compiled(device: Device, model: nn.Module, x: Tensor, options: dict[str, Any]) -> Call:
    compiled = device.compiled(model, **options)
    return lambda: compiled(x)


@contextlib.contextmanager
def precision(device: Device, name: str, benchmark: bool) -> Iterator[None]:
    tf32, dtype = PRECISIONS[name]
    mixed = torch.autocast(device.type, dtype or torch.bfloat16, enabled=dtype is not None, cache_enabled=False)
    with flags(tf32, benchmark), mixed:
        yield


def timed(device: Device, call: Call) -> dict[str, Any]:
    """Milliseconds of a call: three warm-ups, then at least ten, or as many as fill half a second."""
    for _ in range(1 if device.dry else 3):
        call()
    first = device.once(call, flush=False)
    rounds = 3 if device.dry else max(10, min(100, int(5e5 / max(first, 1))))
    times = sorted(device.once(call, flush=False) for _ in range(rounds))
    low, _, high = quantiles(times, n=4, method="inclusive")
    return {"ms": median(times) / 1e3, "spread": (high - low) / 2 / median(times), "calls": rounds}


def convmixers(spec: Spec, device: Device) -> tuple[nn.Module, nn.Module]:
    from cmx_kernels import ConvMixer

    torch.manual_seed(0)
    model = plain(spec)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.running_var, 0.05, 0.2)  # so that activations do not fade with depth
    size = (spec.dim, spec.depth, spec.kernel_size, spec.patch_size, spec.classes)
    fused = ConvMixer(*size, act_layer=spec.act, fused=True).eval()
    fused.load_state_dict(model.state_dict())
    return model.to(device.type).requires_grad_(False), fused.to(device.type).requires_grad_(False)


def race(device: Device, store: Store, model: str, name: str, batch: int, compiled: str) -> None:
    """The variants of one cell that are not there yet; one that fails is a record that says so."""
    size = SPECS[model].image_size if model in SPECS else 224
    if model in SPECS:
        network, fused = convmixers(SPECS[model], device)
    else:
        network, fused = timm_models.create(model).to(device.type), None
    torch.manual_seed(1)
    x = torch.randn(batch, 3, size, size, device=device.type)
    exact = network.double()(x[:2].double())
    network.float()
    with precision(device, name, False):
        of_eager = (network(x[:2]).double() - exact).abs().max().item()
    allowed = 2 * of_eager + 16 * _EPS[name] * exact.abs().max().item()
    section, common = section_of(model), {"model": model, "batch": batch, "dtype": name}
    with torch.inference_mode():
        for provider, benchmark, make in variants(device, network, fused, x, compiled):
            if store.has(section, {**common, "provider": provider}):
                continue
            if device.over:
                return
            record: dict[str, Any] = {**common, "provider": provider, "kind": provider.split(",")[0].split()[0]}
            record |= {"note": "", "allowed": allowed, "peak_gflops": {}}
            try:
                with precision(device, name, benchmark), device.backend_of(provider):
                    call = make()
                    record["error"] = error = (call()[:2].double() - exact).abs().max().item()
                    if not error <= allowed:
                        raise ArithmeticError(f"error {error:.2g} against float64, allowed are {allowed:.2g}")
                    record |= {**timed(device, call), "memory": device.memory(call)}
            except Exception as failure:  # out of memory, no compiler, a wrong result: the others still run
                record["status"] = "wrong" if isinstance(failure, ArithmeticError) else "failed"
                store.failed(section, record, failure)
            else:
                record |= {"status": "timed", "ms_per_image": record["ms"] / batch}
                record["images_per_s"] = 1e3 / record["ms_per_image"]
                if model in SPECS:
                    record["gflops"] = SPECS[model].flop * record["images_per_s"] / 1e9
                store.add(section, record)
            say(f"{model} b{batch} {name} {provider}: {record.get('images_per_s', record['note'])}")


def section_of(model: str) -> str:
    return "models" if model in SPECS else "rival_networks"


def main(arguments: list[str] | None = None) -> int:
    options = parser("Whole networks on a GPU.", "gpu-network").parse_args(arguments)
    device = opened(options)
    if device is None:
        return 2
    store, cells = Store(device, options), DRY if device.dry else CELLS
    if not device.dry and timm_models.why_absent() is not None:
        say(f"the rivals are left out: {timm_models.why_absent()}")
        cells = [cell for cell in cells if cell[0] in SPECS]
    for model, name, batch, compiled in cells:
        if device.over:
            say(f"{options.seconds:.0f} s are over: the remaining networks are left out")
            break
        try:
            with torch.no_grad():
                race(device, store, model, name, batch, compiled)
        except Exception as failure:  # the reference does not fit
            say(f"{model} b{batch} {name}: {reason(failure)}")
    timed_rows = [row for row in store.rows("models") if row["status"] == "timed"]
    wrong = [row for row in store.rows("models") if row["kind"] == "fused" and row["status"] != "timed"]
    return 1 if wrong or not timed_rows else 0


assert set(DTYPES) <= set(PRECISIONS)

if __name__ == "__main__":
    raise SystemExit(main())
