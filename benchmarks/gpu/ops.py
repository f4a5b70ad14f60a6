"""The depthwise block on a GPU against PyTorch: CUDA events, L2 flushed before every call, providers in turns.

    python -m benchmarks.gpu.ops [--seconds 480] [--device cpu --dry-run]

Every provider is checked before it is timed: |out - ref| <= 2 max|eager - ref| + eps, ref in float64 on two images.
Bandwidth is that of a copy measured in the same run. float32 without TF32.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.gpu.device import Device, Store, flags, opened, parser, race, reason, say
from cmx_kernels import backends, cost_model, ops

CASES = [  # (n, c, size), kernel, dtype: the models first, so that a short run has them
    *[((64, c, s), k, "bfloat16") for c, s, k in ((1536, 32, 9), (768, 32, 7), (1024, 16, 9))],
    *[((64, c, s), k, "float32") for c, s, k in ((1536, 32, 9), (768, 32, 7), (1024, 16, 9))],
    *[((n, 768, 32), k, "bfloat16") for n in (1, 256) for k in (7, 9)],
    *[((64, 768, 32), k, "bfloat16") for k in (3, 5, 11, 13, 17, 21, 25, 31)],
    *[((64, 384, 56), k, d) for k in (3, 7, 9, 31) for d in ("bfloat16", "float32")],
    *[((64, 768, 32), k, "float16") for k in (7, 9)],
    *[((64, 384, 14), k, "bfloat16") for k in (7, 9)],
]
DRY = [((2, 8, 16), k, d) for k in (3, 7) for d in ("float32", "bfloat16")]


def eager(x: Tensor, weight: Tensor, bias: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    """The plain model's layers, BatchNorm already folded to scale and shift."""
    y = F.gelu(F.conv2d(x, weight, bias, padding="same", groups=len(weight)))
    return torch.addcmul(x + shift[:, None, None], y, scale[:, None, None])


def providers(device: Device, args: tuple[Tensor, ...]) -> dict[str, Callable[[], Tensor]]:
    x, *rest = args
    last = x.contiguous(memory_format=torch.channels_last)
    backend = "cuda" if device.cuda else backends.select("depthwise_block", x, "gelu")

    def ours(x: Tensor, backend: str = backend) -> Callable[[], Tensor]:
        def call() -> Tensor:
            with backends.use(backend):
                return ops.depthwise_block(x, *rest)

        return call

    def searched() -> Tensor:
        with flags(benchmark=True):
            return eager(last, *rest)

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
        "cudnn.benchmark": searched,
    }
    for name, layout in (("inductor", True), ("inductor, layout kept", False)):
        try:
            found[name] = inductor(layout)
        except Exception as error:  # no compiler, no triton: a row without it
            say(f"   {name}: {reason(error)}")
    return found


def predicted(device: Device, shape: tuple[int, int, int], k: int, dtype: str) -> dict[str, Any]:
    """The cost model's kernel and time for the GPU of its table whose name this one bears; nothing for another GPU."""
    known = cost_model.named(device.name)
    if known is None:
        return {}
    n, c, size = shape
    p = cost_model.depthwise(known, (n, c, size, size), (k, k), dtype)
    return {"kernel": p.kernel, "predicted_us": p.predicted_us}


def measure(device: Device, record: dict[str, Any], shape: tuple[int, int, int], bandwidth: float) -> None:
    (n, c, size), k = shape, record["k"]
    kind = getattr(torch, record["dtype"])
    generator = torch.Generator(device.type).manual_seed(0)

    def normal(*sizes: int, scale: float = 1.0) -> Tensor:
        return (torch.randn(sizes, device=device.type, generator=generator) * scale).to(kind)

    args = (normal(n, c, size, size), normal(c, 1, k, k, scale=1 / k), normal(c), normal(c), normal(c))
    exact = eager(args[0][:2].double(), *(a.double() for a in args[1:]))
    with flags():
        of_eager = (eager(args[0][:2], *args[1:]).double() - exact).abs().max().item()
        allowed = 2 * of_eager + 4 * torch.finfo(kind).eps * exact.abs().max().item()
        calls = providers(device, args)
        us = race(device, calls, exact, allowed, record)
    floor = (2 * args[0].nbytes + args[1].nbytes) / bandwidth * 1e-6
    record |= {"us": us, "floor_us": floor, **predicted(device, shape, k, record["dtype"])}
    plain = [value for name, value in us.items() if not name.startswith("fused")]
    if "fused" in us:
        record["percent_of_copy"] = 100 * floor / us["fused"]
    if "fused" in us and plain:
        record["speedup"] = min(plain) / us["fused"]


def main(arguments: list[str] | None = None) -> int:
    options = parser("The depthwise block on a GPU.", "gpu-ops").parse_args(arguments)
    device = opened(options)
    if device is None:
        return 2
    store, section = Store(device, options), "gpu_ops"
    bandwidth = device.copy_bandwidth()
    store.about["ceilings"] = {"copy": bandwidth * 1e3}
    say(f"{device.name}: copy {bandwidth:.2f} TB/s")
    for shape, k, dtype in DRY if device.dry else CASES:
        record: dict[str, Any] = {"shape": "{0}x{1}x{2}x{2}".format(*shape), "k": k, "dtype": dtype}
        if store.has(section, record):
            continue
        if device.over:
            say(f"{options.seconds:.0f} s are over: the remaining cases are left out")
            break
        record["note"] = ""
        try:
            measure(device, record, shape, bandwidth)
        except Exception as error:  # a kernel that fails must not cost the other rows
            store.failed(section, record, error)
        else:
            store.add(section, record)
        say(f"{shape} k={k} {dtype}: " + (", ".join(f"{n} {v:.1f}" for n, v in record.get("us", {}).items())))
    return int(any("fused" not in row.get("us", {}) for row in store.rows(section)))


if __name__ == "__main__":
    raise SystemExit(main())
