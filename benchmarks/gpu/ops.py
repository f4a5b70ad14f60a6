"""The depthwise block on a GPU against PyTorch: CUDA events, L2 flushed before every call, providers in turns.

    python -m benchmarks.gpu.ops [--seconds 480] [--device cpu --dry-run]

Every provider is checked before it is timed: |out - ref| <= 2 max|eager - ref| + eps, ref in float64 on two images.
Floors are those of cmx_kernels.cost_model; % of copy: of the bandwidth of a copy in the same run. float32 without TF32.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.gpu import goals
from benchmarks.gpu.device import KINDS, Device, flags, opened, parser, race, rated, reason, say
from benchmarks.gpu.store import Store
from cmx_kernels import backends, ops

_MODELS = ((1536, 32, 9), (768, 32, 7), (1024, 16, 9))  # channels, pixels on a side, kernel
CASES = [  # (n, c, size), kernel, dtype: what has goals first, so that a short run has it
    *[((64, c, s), k, d) for d in ("bf16", "fp32") for c, s, k in _MODELS],
    *[((64, 384, 56), k, d) for k in (7, 9) for d in ("bf16", "fp32")],
    *[((n, 768, 32), k, "bf16") for n in (1, 8, 256) for k in (7, 9)],
    *[((64, 1024, 16), k, d) for k in (7, 9) for d in ("bf16", "fp32", "fp16")],
    *[((64, c, s), k, "fp16") for c, s, k in _MODELS],
    *[((64, 768, 32), k, "bf16") for k in (3, 31, 9, 5, 11, 13, 17, 21, 25)],
    *[((64, 384, s), k, "bf16") for s in (14, 16, 32) for k in (7, 9)],
    *[((64, 384, 56), k, d) for k in (3, 31) for d in ("bf16", "fp32")],
    *[((n, c, s), k, "bf16") for n in (1, 8, 256) for c, s, k in _MODELS],
    *[((64, 768, 32), k, "fp32") for k in (3, 9, 31)],
    *[((64, 768, 32), 9, "fp16"), ((64, 384, 56), 7, "fp16"), ((64, 384, 56), 9, "fp16")],
]
DRY = [((2, 8, 16), k, d) for k, d in ((3, "fp32"), (7, "bf16"), (9, "fp16"))]


def eager(x: Tensor, weight: Tensor, bias: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    """The plain model's layers, BatchNorm already folded to scale and shift."""
    y = F.gelu(F.conv2d(x, weight, bias, padding="same", groups=len(weight)))
    return torch.addcmul(x + shift[:, None, None], y, scale[:, None, None])


def providers(device: Device, args: tuple[Tensor, ...], backend: str) -> dict[str, Callable[[], Tensor]]:
    x, *rest = args
    last = x.contiguous(memory_format=torch.channels_last)

    def ours(x: Tensor, backend: str = backend) -> Callable[[], Tensor]:
        def call() -> Tensor:
            with backends.use(backend):
                return ops.depthwise_block(x, *rest)

        return call

    def searched(x: Tensor) -> Tensor:
        with flags(benchmark=True):
            return eager(x, *rest)

    def inductor(layout: bool) -> Callable[[], Tensor]:
        compiled = device.compiled(eager, options={"layout_optimization": layout})
        compiled(*args)
        return lambda: compiled(*args)

    found = {
        "fused": ours(x),
        "fused channels_last": ours(last),
        **({"fused triton": ours(x, "triton")} if device.cuda else {}),
        "eager": lambda: eager(*args),
        "eager channels_last": lambda: eager(last, *rest),
        "eager, cudnn.benchmark": lambda: searched(x),
        "eager channels_last, cudnn.benchmark": lambda: searched(last),
    }
    for name, layout in (("inductor", True), ("inductor, layout kept", False)):
        try:
            found |= {name: inductor(layout)} if device.wants(name) else {}
        except Exception as error:  # no compiler, no triton: a row without it
            say(f"   {name}: {reason(error)}")
    return {name: call for name, call in found.items() if device.wants(name)}


def key_of(shape: tuple[int, int, int], k: int, dtype: str) -> dict[str, Any]:
    return {"op": "depthwise_block", "shape": "{0}x{1}x{2}x{2}".format(*shape), "k": k, "dtype": dtype}


def measure(device: Device, record: dict[str, Any], shape: tuple[int, int, int], gb_per_s: float) -> None:
    (n, c, size), k = shape, record["k"]
    kind = KINDS[record["dtype"]]
    generator = torch.Generator(device.type).manual_seed(0)

    def normal(*sizes: int, scale: float = 1.0) -> Tensor:
        return (torch.randn(sizes, device=device.type, generator=generator) * scale).to(kind)

    args = (normal(n, c, size, size), normal(c, 1, k, k, scale=1 / k), normal(c), normal(c), normal(c))
    exact = eager(args[0][:2].double(), *(a.double() for a in args[1:]))
    backend = "cuda" if device.cuda else backends.select("depthwise_block", args[0], "gelu")
    with flags():
        of_eager = (eager(args[0][:2], *args[1:]).double() - exact).abs().max().item()
        allowed = 2 * of_eager + 4 * torch.finfo(kind).eps * exact.abs().max().item()
        us = race(device, providers(device, args, backend), exact, allowed, record)
    cost = device.cost("depthwise", (n, c, size, size), (k, k), str(kind).removeprefix("torch."))
    rated(record, us, cost, backend)
    if "gb_per_s" in record:
        record["percent_of_copy"] = 100 * record["gb_per_s"] / gb_per_s


def main(arguments: list[str] | None = None) -> int:
    options = parser("The depthwise block on a GPU.", "gpu-ops").parse_args(arguments)
    device = opened(options)
    if device is None:
        return 2
    section = "gpu_ops"
    cases = {(shape, k, dtype): key_of(shape, k, dtype) for shape, k, dtype in (DRY if device.dry else CASES)}
    store = Store(device, options, goals.OPS, section, cases.values())
    store.about["ceilings"] = ceilings = device.ceilings()
    say(f"{device.name}: copy {ceilings['copy']:.0f} GB/s")
    for (shape, k, dtype), key in cases.items():
        if store.has(section, key):
            continue
        if device.over:
            say(f"{options.seconds:.0f} s are over: the remaining cases are left out")
            break
        record = {**key, "note": ""}
        try:
            measure(device, record, shape, ceilings["copy"])
        except Exception as error:  # a kernel that fails must not cost the other rows
            store.failed(section, record, error)
        else:
            store.add(section, record)
        say(f"{shape} k={k} {dtype}: " + (", ".join(f"{n} {v:.1f}" for n, v in record.get("us", {}).items())))
    store.tell_goals()
    return int(any("fused" not in row.get("us", {}) for row in store.rows(section)))


if __name__ == "__main__":
    raise SystemExit(main())
