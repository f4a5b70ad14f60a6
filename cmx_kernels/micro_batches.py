"""Whether to run blocks a few images at a time, depth-first, so that each kernel finds in L2 what the last one wrote.

    python -m cmx_kernels.micro_batches [GPU]

A prediction by the cost model, with L2's bandwidth in place of the memory's, and with the launches, ragged rounds of
tiles and time of the host that micro-batches add. Nothing of it was measured.
"""

import functools
import sys
from typing import NamedTuple

from cmx_kernels import cost_model
from cmx_kernels.cost_model import TERMS, Prediction


class Cache(NamedTuple):
    mib: int
    tb_per_s: float


# Sizes as published; rates are assumed, of the order of published micro-benchmarks
L2 = {
    "H200": Cache(50, 6.0),
    "H100": Cache(50, 6.0),
    "A100": Cache(40, 4.4),
    "L40S": Cache(96, 4.5),
    "RTX 4090": Cache(72, 4.8),
}
SHARE = 0.5  # of L2, for two activations and a block's weights: both halves of a server GPU's may hold the same line
MARGIN = 1.05  # so much faster, or the whole batch runs at once
# Of an operator, for the thread that launches it. In a CUDA graph 0, but it must get what its warm-up had
HOST_US = 20.0
TF32, STRICT = 2, 16  # times of float32 products by torch's convolution, beside those of 16-bit types


class MicroBatch(NamedTuple):
    """``images``: the best number that fits; the whole batch where that fits, or not a single image."""

    images: int
    us: float
    whole_us: float

    @property
    def pays(self) -> bool:
        return self.us * MARGIN < self.whole_us


@functools.lru_cache(1024)
def predict(
    gpu: str,
    shape: tuple[int, int, int, int],
    depth: int,
    kernel_size: tuple[int, int],
    dtype: str = "bfloat16",
    act: str = "gelu",
    channels_last: bool = False,
    float32: int = TF32,
    host_us: float = HOST_US,
) -> MicroBatch:
    """Microseconds of ``depth`` blocks on activations of ``shape``, at once and in the best micro-batches."""
    n, c, h, w = shape
    wide = dtype == "float32"
    size = 4 if wide else 2
    image, weights = size * c * h * w, size * c * (c + kernel_size[0] * kernel_size[1])
    fit = min(n, max(0, int(SHARE * L2[gpu].mib * 2**20) - weights) // (2 * image))
    one = cost_model.depthwise(gpu, (1, c, h, w), kernel_size, dtype, act, channels_last)
    launch, of_memory = _launch_us(one), one.bytes / one.memory_us * 1e-6

    def blocks(images: int, tb_per_s: float) -> float:
        x = images, c, h, w
        first = cost_model.depthwise(gpu, x, kernel_size, dtype, act, channels_last)
        second = cost_model.product(gpu, x, c, (1, 1), "bfloat16" if wide else dtype, act, channels_last)
        us = _us(first, tb_per_s) + (_us(second, tb_per_s, 2, float32) if wide else _us(second, tb_per_s))
        return depth * (us + (_copy_us(images * image, tb_per_s) + launch if wide else 0))  # float32's epilogue

    if fit == n:
        us = blocks(n, L2[gpu].tb_per_s) if n else 0.0
        return MicroBatch(n, us, us)
    whole = max(blocks(n, of_memory), 2 * depth * host_us)
    found = []
    for m in range(1, fit + 1):
        parts = -(-n // m)
        us = n // m * blocks(m, L2[gpu].tb_per_s) + (blocks(n % m, L2[gpu].tb_per_s) if n % m else 0)
        us += _copy_us(n * image, of_memory) / 2 + parts * launch  # results to their place in the whole batch
        found.append(MicroBatch(m, max(us, parts * (2 * depth + 1) * host_us), whole))
    return min(found, key=lambda one: one.us, default=MicroBatch(n, whole, whole))


def _launch_us(p: Prediction) -> float:
    return p.predicted_us - max(getattr(p, f"{term}_us") for term in TERMS)


def _us(p: Prediction, tb_per_s: float, more_bytes: int = 1, slower: int = 1) -> float:
    memory = more_bytes * p.bytes / tb_per_s * 1e-6
    return _launch_us(p) + max(memory, *(slower * getattr(p, f"{term}_us") for term in TERMS if term != "memory"))


def _copy_us(size: int, tb_per_s: float) -> float:
    return 2 * size / tb_per_s * 1e-6


def main() -> None:
    gpu = sys.argv[1] if len(sys.argv) > 1 else "H200"
    print(
        f"{gpu}, predicted: all blocks in us in a CUDA graph, and in the best micro-batches that fit {SHARE:.0%} of L2"
    )
    print(f"{'network':>8} {'dtype':>9} {'batch':>5} {'at once':>8} {'images':>6} {'in parts':>8}  of at once")
    nets = ((1536, 20, 9, 32, "gelu"), (768, 32, 7, 32, "relu"), (1024, 20, 9, 16, "gelu"), (512, 16, 8, 32, "gelu"))
    for c, depth, k, size, act in nets:
        for dtype in ("bfloat16", "float32"):
            for n in (1, 8, 64, 256):
                call = gpu, (n, c, size, size), depth, (k, k), dtype, act
                p, used = predict(*call, host_us=0), predict(*call).pays
                parts = f"{p.images:>6} {p.us:8.0f}  {100 * p.us / p.whole_us:.0f} %" if p.images < n else ""
                print(f"{f'{c}/{depth}':>8} {dtype:>9} {n:>5} {p.whole_us:8.0f} {parts}{', used' if used else ''}")


if __name__ == "__main__":
    main()
