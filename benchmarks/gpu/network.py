"""Whole networks on a GPU: fused against every way PyTorch has, and the rivals of the paper's table.

    python -m benchmarks.gpu.network [--seconds 480] [--device cpu --dry-run]

Random weights and images, BatchNorm with the statistics of some images. Logits are held against float64 first:
|out - ref| <= 2 max|eager - ref| + eps, eager in the same precision. Networks flush the caches themselves. What matters
most comes first.
"""

import contextlib
import copy
import functools
from collections.abc import Callable, Iterator, Sequence
from statistics import median, quantiles
from typing import Any, NamedTuple

import torch
import torch._inductor
from torch import Tensor, nn

from benchmarks import timm_models
from benchmarks.gpu import goals
from benchmarks.gpu.device import Device, described, flags, graphed, opened, parser, reason, say
from benchmarks.gpu.store import Store
from benchmarks.networks import DTYPES, RELEASED, SPECS, Spec, calibrated
from benchmarks.peers.fused import network as fused_network
from cmx_kernels import backends, cost_model, micro_batches

Call = Callable[[], Tensor]


class Precision(NamedTuple):
    tf32: bool = True
    autocast: torch.dtype | None = None
    model: torch.dtype = torch.float32  # of weights and images

    @property
    def kind(self) -> torch.dtype:
        return self.autocast or self.model


PRECISIONS = {
    "fp32": Precision(tf32=False),
    "tf32": Precision(),
    "bf16": Precision(autocast=torch.bfloat16),
    "fp16": Precision(autocast=torch.float16),
    "bf16-model": Precision(model=torch.bfloat16),
}
_EPS = {"fp32": 2**-24, "tf32": 2**-11, "bf16": 2**-8, "fp16": 2**-11, "bf16-model": 2**-8}
RIVALS = (goals.RIVAL, "resnet152", "mixer_b16_224", "convnext_base")
_OTHER = "convmixer_512_16_ks8_p7"
_NETWORKS = (*RELEASED, _OTHER)

# A provider's name says what it is: network and layout, then cudnn.benchmark, CUDA graph, or how the batch is divided
_MAX = torch._inductor.list_mode_options("max-autotune")
INDUCTOR: dict[str, dict[str, Any]] = {  # each takes a minute to compile, the last two several
    "inductor": {},
    "inductor, CUDA graph": {"mode": "reduce-overhead"},
    "inductor, layout kept": {"options": {"layout_optimization": False}},
    "inductor, max-autotune": {"mode": "max-autotune"},
    "inductor, max-autotune, layout kept": {"options": {**_MAX, "layout_optimization": False}},
}
_COMPILING = {"inductor, max-autotune": 200, "inductor, max-autotune, layout kept": 200}  # seconds that must be left
_FUSED = ("fused", "fused channels_last", "fused triton")
_EAGER = ("eager", "eager channels_last")
_DIVIDED = ("fused, at once, CUDA graph", "fused, micro-batches, CUDA graph")
LARGE = (*_FUSED, *_DIVIDED, *_EAGER, *(f"{name}, cudnn.benchmark" for name in _EAGER))
LATENCY = (*_FUSED, *_EAGER, *(f"{name}, CUDA graph" for name in (*_FUSED, *_EAGER)))
Cell = tuple[str, str, int, Sequence[str]]  # model, precision, batch, providers


def _cells(models: Sequence[str], kinds: Sequence[tuple[str, int]], providers: Sequence[str]) -> list[Cell]:
    return [(model, name, batch, providers) for name, batch in kinds for model in models]


CELLS = [  # what has goals first; a second call with --resume measures what a first one left out
    *_cells(RELEASED, [(name, 256) for name in goals.BF16], LARGE),
    *_cells(RELEASED, [(name, 1) for name in goals.BF16], LATENCY),
    *_cells(RIVALS, [("bf16-model", 256)], LARGE),
    *_cells(RELEASED, [("bf16-model", 256)], LATENCY),
    *_cells((*RELEASED, goals.RIVAL), [("bf16-model", 256)], ["inductor"]),
    *(cell for name in goals.COMPILED[1:] for cell in _cells(RELEASED, [("bf16-model", 256)], [name])),
    *_cells(RELEASED, [("bf16-model", 1)], ["inductor, CUDA graph"]),
    *_cells(_NETWORKS, [("bf16-model", 64), ("bf16", 64), ("bf16-model", 8)], LARGE),
    *_cells([_OTHER], [(name, 256) for name in goals.BF16], LARGE),
    *_cells([_OTHER], [(name, 1) for name in goals.BF16], LATENCY),
    *_cells(_NETWORKS, [(name, 64) for name in ("fp32", "tf32", "fp16")], LARGE),
    *_cells(_NETWORKS, [("bf16-model", 1024), ("fp32", 256), ("tf32", 256), ("fp16", 256)], LARGE),
    *_cells(RIVALS, [("bf16-model", 1)], LATENCY),
    *_cells(RIVALS[1:], [("bf16-model", 256)], ["inductor"]),
    *_cells(RELEASED, [("bf16", 256), ("bf16-model", 64), ("fp32", 64)], ["inductor"]),
    *_cells(_NETWORKS, [(name, 1) for name in ("fp16", "fp32", "tf32")], LATENCY),
    *_cells(_NETWORKS, [("bf16", 8), ("fp16", 8), ("fp32", 8), ("tf32", 8)], LARGE),
    *_cells(RELEASED, [("fp16", 64), ("tf32", 64)], ["inductor"]),
    *_cells([_OTHER], [("bf16-model", 256)], ["inductor"]),
    *_cells(RIVALS, [("bf16-model", 1)], ["inductor, CUDA graph"]),
    *_cells(RIVALS, [("bf16-model", 256)], ["inductor, max-autotune"]),
]
DRY = [
    *_cells(["tiny"], [(name, 2) for name in PRECISIONS], LARGE),
    *_cells(["tiny"], [("bf16-model", 2)], LATENCY),
    *_cells(["tiny"], [("bf16-model", 2)], tuple(INDUCTOR)),
]


def made(device: Device, provider: str, model: nn.Module, fused: nn.Module, x: Tensor) -> Call:
    """What is timed. The model is moved to the provider's layout."""
    head, *marks = provider.split(", ")
    if head == "inductor":
        compiled = device.compiled(model.to(memory_format=torch.contiguous_format), **INDUCTOR[provider])
        return lambda: compiled(x)
    layout = torch.channels_last if head.endswith("channels_last") else torch.contiguous_format
    images = x.contiguous(memory_format=layout)
    if not head.startswith("fused"):
        own = model.to(memory_format=layout)
        call: Call = lambda: own(images)  # noqa: E731
    elif "at once" in marks or "micro-batches" in marks:
        call = divided(fused, images, 0 if "at once" in marks else that_fit(device, fused, images))
    else:
        call = lambda: fused(images)  # noqa: E731
    return graphed(device, call) if "CUDA graph" in marks else call


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


@contextlib.contextmanager
def precision(device: Device, name: str, benchmark: bool) -> Iterator[None]:
    tf32, dtype, _ = PRECISIONS[name]
    mixed = torch.autocast(device.type, dtype or torch.bfloat16, enabled=dtype is not None, cache_enabled=False)
    with flags(tf32, benchmark), mixed:
        yield


def timed(device: Device, call: Call) -> dict[str, Any]:
    """Milliseconds of a call: after three, ten or as many as fill 0.3 s; above 0.2 s, after one, three."""
    slow = device.once(call, flush=False) > 2e5
    for _ in range(0 if device.dry or slow else 2):
        call()
    first = 0.0 if slow else device.once(call, flush=False)
    rounds = 3 if device.dry or slow else max(10, min(100, int(3e5 / max(first, 1))))
    times = sorted(device.once(call, flush=False) for _ in range(rounds))
    low, _, high = quantiles(times, n=4, method="inclusive")
    return {"ms": median(times) / 1e3, "spread": (high - low) / 2 / median(times), "calls": rounds}


def floor_us(device: Device, spec: Spec, batch: int, kind: torch.dtype) -> float | None:
    """Of all blocks, by the cost model; it has no products of float32, and no GPU but those of its table."""
    name, side = str(kind).removeprefix("torch."), spec.image_size // spec.patch_size
    x, kernel = (batch, spec.dim, side, side), (spec.kernel_size, spec.kernel_size)
    if kind == torch.float32:
        return None
    parts = device.cost("depthwise", x, kernel, name), device.cost("product", x, spec.dim, (1, 1), name)
    return spec.depth * sum(p["floor_us"] for p in parts) if all("floor_us" in p for p in parts) else None


def convmixers(spec: Spec, device: Device) -> tuple[nn.Module, nn.Module]:
    with torch.device(device.type):
        model = calibrated(spec, torch.randn(8, 3, spec.image_size, spec.image_size))
        fused = fused_network(spec).eval()
    fused.load_state_dict(model.state_dict())
    return model.requires_grad_(False), fused.requires_grad_(False)


class Networks(NamedTuple):
    """Plain and fused on the same weights in float32, a rival has no fused one; two images, their logits in float64."""

    plain: nn.Module
    fused: nn.Module | None
    images: Tensor
    logits: Tensor


def networks(device: Device, model: str) -> Networks:
    if model in SPECS:
        network, fused = convmixers(SPECS[model], device)
    else:
        network, fused = timm_models.create(model).to(device.type), None
    torch.manual_seed(1)
    size = SPECS[model].image_size if model in SPECS else 224
    images = torch.randn(2, 3, size, size, device=device.type)
    return Networks(network, fused, images, copy.deepcopy(network).double()(images.double()))


def race(device: Device, store: Store, cell: Cell, of_model: Networks) -> None:
    """The providers of one cell that are not there yet; one that fails is a record that says so."""
    model, name, batch, _ = cell
    network, fused = copy.deepcopy(of_model[:2])
    exact, kind = of_model.logits, PRECISIONS[name].model
    x = torch.cat([of_model.images, torch.randn(batch, *of_model.images.shape[1:], device=device.type)])
    x, exact, network = x[:batch].to(kind), exact[:batch], network.to(kind)
    fused = None if fused is None else fused.to(kind)
    with precision(device, name, False):
        of_eager = (network(x[:2]).double() - exact).abs().max().item()
    allowed = 2 * of_eager + 16 * _EPS[name] * exact.abs().max().item()
    backend = "cuda" if device.cuda else backends.select("depthwise_block", x, "gelu")
    with torch.inference_mode():
        for provider in missing(device, store, cell):
            if device.over:
                return
            if device.left < _COMPILING.get(provider, 0) and not device.dry:
                say(f"{model} b{batch} {name} {provider}: left out, there is no time to compile it")
                continue
            record: dict[str, Any] = {"model": model, "batch": batch, "dtype": name, "provider": provider}
            record |= {**described(provider, backend), "kind": provider.split(",")[0].split()[0]}
            record |= {"note": "", "allowed": allowed, "peak_gflops": {}}
            try:
                with precision(device, name, "cudnn.benchmark" in provider), device.backend_of(provider):
                    call = made(device, provider, network, fused, x)
                    record["error"] = error = (call()[:2].double() - exact).abs().max().item()
                    record["match"] = error <= allowed
                    if not record["match"]:
                        raise ArithmeticError(f"error {error:.2g} against float64, allowed are {allowed:.2g}")
                    record |= {**timed(device, call), "memory": device.memory(call)}
            except Exception as failure:  # out of memory, no compiler, a wrong result: the others still run
                record["status"] = "wrong" if isinstance(failure, ArithmeticError) else "failed"
                store.failed(section_of(model), record, failure)
            else:
                store.add(section_of(model), {**record, **rates(device, record), "status": "timed"})
            say(f"{model} b{batch} {name} {provider}: {record.get('ms', record['note'])} ms")


def missing(device: Device, store: Store, cell: Cell) -> list[str]:
    """The providers of a cell that can run here, and have no row."""
    model, name, batch, providers = cell
    key = {"model": model, "batch": batch, "dtype": name}
    wanted = [p for p in providers if model in SPECS or not p.startswith("fused")]
    wanted = [p for p in wanted if device.wants(p) and (device.cuda or not p.startswith("fused triton"))]
    return [p for p in wanted if not store.has(section_of(model), {**key, "provider": p})]


def rates(device: Device, record: dict[str, Any]) -> dict[str, Any]:
    batch, ms, kind = record["batch"], record["ms"], PRECISIONS[record["dtype"]].kind
    found = {"ms_per_image": ms / batch, "images_per_s": 1e3 * batch / ms}
    if record["model"] not in SPECS:
        gmac = next(n.gmac for n in timm_models.NETWORKS if n.name == record["model"])
        return {**found, "gflops": 2 * gmac * found["images_per_s"]}
    spec = SPECS[record["model"]]
    found |= {"gflops": spec.flop * batch / ms * 1e-6, "gb_per_s": spec.bytes(batch, kind.itemsize) / ms * 1e-6}
    floor = floor_us(device, spec, batch, kind)
    return found if floor is None else {**found, "percent_of_floor": floor / ms / 10}


def section_of(model: str) -> str:
    return "models" if model in SPECS else "rival_networks"


def main(arguments: list[str] | None = None) -> int:
    options = parser("Whole networks on a GPU.", "gpu-network").parse_args(arguments)
    device = opened(options)
    if device is None:
        return 2
    store, cells = Store(device, options, goals.NETWORK), DRY if device.dry else CELLS
    if not device.dry and timm_models.why_absent() is not None:
        say(f"the rivals are left out: {timm_models.why_absent()}")
        cells = [cell for cell in cells if cell[0] in SPECS]

    @functools.cache
    def networks_of(model: str) -> Networks:
        return networks(device, model)

    for cell in filter(lambda cell: device.takes(cell[0]), cells):
        if device.over:
            say(f"{options.seconds:.0f} s are over: the remaining networks are left out")
            break
        try:
            if missing(device, store, cell):
                with torch.no_grad():
                    race(device, store, cell, networks_of(cell[0]))
        except Exception as failure:  # the reference does not fit
            say(f"{' '.join(map(str, cell[:3]))}: {reason(failure)}")
    store.tell_goals()
    timed_rows = [row for row in store.rows("models") if row["status"] == "timed"]
    wrong = [row for row in store.rows("models") if row["kind"] == "fused" and row["status"] != "timed"]
    return 1 if wrong or not timed_rows else 0


assert set(DTYPES) <= set(PRECISIONS)

if __name__ == "__main__":
    raise SystemExit(main())
