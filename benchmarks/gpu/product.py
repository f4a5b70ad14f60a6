"""pointwise_block, patch_embed and pool_head on a GPU against PyTorch and cuBLAS, as ops.py.

    python -m benchmarks.gpu.product [--seconds 480] [--device cpu --dry-run]

"cuBLAS" is the matrix product alone, without bias, activation and scale, on the same numbers: its rate is the measure.
"kernel wgmma" and its like are the CUDA backend with that kernel of the product, whatever is predicted to be fastest.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.gpu import goals
from benchmarks.gpu.device import KINDS, Device, flags, opened, parser, race, rated, say
from benchmarks.gpu.store import Store
from cmx_kernels import backends, cost_model, cuda, ops

MODELS = ((1536, 32, 7), (768, 32, 7), (1024, 16, 14))  # channels, pixels on a side, patch
CASES = [  # op, (n, c, size, patch), dtype: what has goals first
    *[("pointwise_block", (n, c, size, 1), "bf16") for n in (64, 1, 8, 256) for c, size, _ in MODELS],
    *[("pointwise_block", (64, c, size, 1), d) for c, size, _ in MODELS for d in ("fp16", "fp32", "tf32")],
    *[("patch_embed", (64, c, size, p), d) for c, size, p in MODELS for d in ("bf16", "fp32", "tf32")],
    *[("pool_head", (n, c, size, 1), "bf16") for n in (64, 1) for c, size, _ in MODELS],
    *[("pointwise_block", (64, 384, size, 1), "bf16") for size in (7, 14, 56)],
]
DRY = [
    (op, (2, 8, 4, 2 if op == "patch_embed" else 1), dtype)
    for op, dtype in dict.fromkeys((op, dtype) for op, _, dtype in CASES)
]
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


def tiles_for(op: str, x: Tensor, weight: Tensor) -> list[str]:
    """The kernels that take this product: of 16-bit types; patches have one tile, and wgmma is Hopper's."""
    if op != "pointwise_block" or x.dtype == torch.float32 or not x.is_cuda:
        return []
    whole = all(count % 8 == 0 for count in (*weight.shape[:2], x.shape[2] * x.shape[3]))
    wgmma = whole and torch.cuda.get_device_capability(x.device) == (9, 0)
    return [tile for tile in cost_model.TILES if tile != "wgmma" or wgmma]


def providers(
    device: Device, op: str, backend: str, x: Tensor, weight: Tensor, *vectors: Tensor
) -> dict[str, Callable[[], Tensor]]:
    last = x.contiguous(memory_format=torch.channels_last)

    def ours(x: Tensor, backend: str = backend) -> Callable[[], Tensor]:
        def call() -> Tensor:
            with backends.use(backend):
                return getattr(ops, op)(x, weight, *vectors)

        return call

    def by(place: int) -> Callable[[], Tensor]:
        def call() -> Tensor:
            with cuda.only_product(place):
                return ours(x)()

        return call

    found = {
        "fused": ours(x),
        "fused channels_last": ours(last),
        **({"fused triton": ours(x, "triton")} if device.cuda else {}),
        **{f"kernel {tile}": by(cost_model.TILES.index(tile)) for tile in tiles_for(op, x, weight)},
        "eager": lambda: eager(op, x, weight, *vectors),
        "eager channels_last": lambda: eager(op, last, weight, *vectors),
    }
    if op == "pointwise_block":
        a, b, rows = weight.flatten(1), x.flatten(2), last.permute(0, 2, 3, 1).flatten(0, 2)
        found["cuBLAS"] = lambda: torch.matmul(a, b)
        found["cuBLAS channels_last"] = lambda: torch.matmul(rows, a.t())
    return {name: call for name, call in found.items() if device.wants(name)}


def key_of(op: str, case: tuple[int, int, int, int], dtype: str) -> dict[str, Any]:
    return {"op": op, "shape": "{0}x{1}x{2}x{2}, {3}".format(*case), "dtype": dtype}


def cost(device: Device, op: str, case: tuple[int, int, int, int], dtype: str) -> dict[str, Any]:
    """As Device.cost, which has products of 16 bits; those of float32 are torch's, and have no floor here."""
    n, c, size, patch = case
    if op == "pool_head":
        itemsize = KINDS[dtype].itemsize
        return {"flop": 2.0 * n * c * _CLASSES, "bytes": float(itemsize * (n * c * size**2 + (n + c) * _CLASSES))}
    x = n, 3 if op == "patch_embed" else c, size * patch, size * patch
    found = device.cost("product", x, c, (patch, patch), "float16" if dtype == "fp16" else "bfloat16")
    if KINDS[dtype] == torch.float32 and found:
        return {"flop": found["flop"], "bytes": 2 * found["bytes"]}
    return found


def measure(device: Device, record: dict[str, Any], case: tuple[int, int, int, int]) -> None:
    op, dtype = record["op"], record["dtype"]
    kind = KINDS[dtype]
    args = arguments_of(device, op, case, kind)
    exact = eager(op, args[0][:2].double(), *(a.double() for a in args[1:]))
    backend = "cuda" if device.cuda else backends.select(op, args[0], "gelu")
    with flags(tf32=dtype == "tf32"):
        of_eager = (eager(op, args[0][:2], *args[1:]).double() - exact).abs().max().item()
        eps = 2**-11 if dtype == "tf32" else torch.finfo(kind).eps  # PyTorch may have no TF32, as for patches
        allowed = 2 * of_eager + 4 * eps * exact.abs().max().item()
        us = race(device, providers(device, op, backend, *args), exact, allowed, record, unchecked="cuBLAS")
    rated(record, us, cost(device, op, case, dtype), backend)
    products = [value for name, value in us.items() if name.startswith("cuBLAS")]
    if "fused" in us and products:
        record["percent_of_cublas"] = 100 * min(products) / us["fused"]


def main(arguments: list[str] | None = None) -> int:
    options = parser("pointwise_block, patch_embed and pool_head on a GPU.", "gpu-product").parse_args(arguments)
    device = opened(options)
    if device is None:
        return 2
    section = "gpu_product"
    cases = {(op, case, dtype): key_of(op, case, dtype) for op, case, dtype in (DRY if device.dry else CASES)}
    store = Store(device, options, goals.PRODUCT, section, cases.values())
    for (op, case, dtype), key in cases.items():
        if store.has(section, key):
            continue
        if device.over:
            say(f"{options.seconds:.0f} s are over: the remaining cases are left out")
            break
        record = {**key, "note": ""}
        try:
            measure(device, record, case)
        except Exception as error:  # a kernel that fails must not cost the other rows
            store.failed(section, record, error)
        else:
            store.add(section, record)
        say(f"{op} {case} {dtype}: " + (", ".join(f"{n} {v:.1f}" for n, v in record.get("us", {}).items())))
    store.tell_goals()
    return int(any("fused" not in row.get("us", {}) for row in store.rows(section)))


if __name__ == "__main__":
    raise SystemExit(main())
