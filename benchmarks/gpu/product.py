"""pointwise_block, patch_embed and pool_head on a GPU against PyTorch and cuBLAS, as ops.py.

    python -m benchmarks.gpu.product [--seconds 480] [--device cpu --dry-run]

"cuBLAS" is the matrix product alone, without bias, activation and scale, on the same numbers: its rate is the measure.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.gpu.device import Device, Store, flags, opened, parser, race, say
from cmx_kernels import backends, cost_model, ops

MODELS = ((1536, 32, 7), (768, 32, 7), (1024, 16, 14))  # channels, pixels on a side, patch
CASES = [  # op, (n, c, size, patch), dtype
    *[("pointwise_block", (n, c, size, 1), "bfloat16") for n in (64, 1, 8, 256) for c, size, _ in MODELS],
    *[("pointwise_block", (64, c, size, 1), d) for c, size, _ in MODELS for d in ("float16", "float32")],
    *[("patch_embed", (64, c, size, p), d) for c, size, p in MODELS for d in ("bfloat16", "float32")],
    *[("pool_head", (n, c, size, 1), "bfloat16") for n in (64, 1) for c, size, _ in MODELS],
    *[("pointwise_block", (64, 384, size, 1), "bfloat16") for size in (7, 14, 56)],
]
DRY = [(op, (2, 8, 4, 2 if op == "patch_embed" else 1), "bfloat16") for op in dict.fromkeys(c[0] for c in CASES)]
_CLASSES = 1000


def eager(op: str, x: Tensor, weight: Tensor, *vectors: Tensor) -> Tensor:
    """The plain model's layers, BatchNorm already folded to scale and shift."""
    if op == "pool_head":
        return F.linear(x.mean((2, 3)), weight, vectors[0])
    bias, scale, shift = vectors
    y = F.gelu(F.conv2d(x, weight, bias, stride=weight.shape[2:]))
    return torch.addcmul(shift[:, None, None], y, scale[:, None, None])


def arguments_of(device: Device, op: str, case: tuple[int, int, int, int], kind: torch.dtype) -> tuple[Tensor, ...]:
    n, c, size, patch = case
    generator = torch.Generator(device.type).manual_seed(0)

    def normal(*sizes: int, scale: float = 1.0) -> Tensor:
        return (torch.randn(sizes, device=device.type, generator=generator) * scale).to(kind)

    if op == "pool_head":
        return normal(n, c, size, size), normal(_CLASSES, c, scale=c**-0.5), normal(_CLASSES)
    c_in = 3 if op == "patch_embed" else c
    weight = normal(c, c_in, patch, patch, scale=(c_in * patch * patch) ** -0.5)
    return normal(n, c_in, size * patch, size * patch), weight, normal(c), normal(c), normal(c)


def providers(device: Device, op: str, x: Tensor, weight: Tensor, *vectors: Tensor) -> dict[str, Callable[[], Tensor]]:
    last = x.contiguous(memory_format=torch.channels_last)
    backend = "cuda" if device.cuda else backends.select(op, x, "gelu")

    def ours(x: Tensor, backend: str = backend) -> Callable[[], Tensor]:
        def call() -> Tensor:
            with backends.use(backend):
                return getattr(ops, op)(x, weight, *vectors)

        return call

    found = {
        "fused": ours(x),
        "fused channels_last": ours(last),
        **({"fused triton": ours(x, "triton")} if device.cuda else {}),
        "eager": lambda: eager(op, x, weight, *vectors),
        "eager channels_last": lambda: eager(op, last, weight, *vectors),
    }
    if op == "pointwise_block":
        a, b, rows = weight.flatten(1), x.flatten(2), last.permute(0, 2, 3, 1).flatten(0, 2)
        found["cuBLAS"] = lambda: torch.matmul(a, b)
        found["cuBLAS channels_last"] = lambda: torch.matmul(rows, a.t())
    return found


def predicted(device: Device, op: str, case: tuple[int, int, int, int], dtype: str) -> dict[str, Any]:
    """As ops.predicted: the cost model's kernel and time for a matrix product in 16 bits."""
    known = cost_model.named(device.name)
    if known is None or op == "pool_head" or dtype == "float32":
        return {}
    n, c, size, patch = case
    x = (n, 3 if op == "patch_embed" else c, size * patch, size * patch)
    p = cost_model.product(known, x, c, (patch, patch), dtype)
    return {"kernel": p.kernel, "predicted_us": p.predicted_us}


def measure(device: Device, record: dict[str, Any], case: tuple[int, int, int, int]) -> None:
    (n, _, size, _), op = case, record["op"]
    kind = getattr(torch, record["dtype"])
    args = arguments_of(device, op, case, kind)
    flop = 2.0 * n * args[1].numel() * (1 if op == "pool_head" else size * size)
    record |= predicted(device, op, case, record["dtype"])
    exact = eager(op, args[0][:2].double(), *(a.double() for a in args[1:]))
    with flags():
        of_eager = (eager(op, args[0][:2], *args[1:]).double() - exact).abs().max().item()
        allowed = 2 * of_eager + 4 * torch.finfo(kind).eps * exact.abs().max().item()
        calls = providers(device, op, *args)
        us = race(device, calls, exact, allowed, record, unchecked="cuBLAS")
    record["us"] = us
    if "fused" in us:
        record["tflop_per_s"] = flop / us["fused"] * 1e-6
        for key, kind_of, factor in (("speedup", "eager", 1), ("percent_of_cublas", "cuBLAS", 100)):
            others = [value for name, value in us.items() if name.startswith(kind_of)]
            if others:
                record[key] = factor * min(others) / us["fused"]


def main(arguments: list[str] | None = None) -> int:
    options = parser("pointwise_block, patch_embed and pool_head on a GPU.", "gpu-product").parse_args(arguments)
    device = opened(options)
    if device is None:
        return 2
    store, section = Store(device, options), "gpu_product"
    for op, case, dtype in DRY if device.dry else CASES:
        record: dict[str, Any] = {"op": op, "shape": "{0}x{1}x{2}x{2}, {3}".format(*case), "dtype": dtype}
        if store.has(section, record):
            continue
        if device.over:
            say(f"{options.seconds:.0f} s are over: the remaining cases are left out")
            break
        record["note"] = ""
        try:
            measure(device, record, case)
        except Exception as error:  # a kernel that fails must not cost the other rows
            store.failed(section, record, error)
        else:
            store.add(section, record)
        say(f"{op} {case} {dtype}: " + (", ".join(f"{n} {v:.1f}" for n, v in record.get("us", {}).items())))
    return int(any("fused" not in row.get("us", {}) for row in store.rows(section)))


if __name__ == "__main__":
    raise SystemExit(main())
