"""What the CUDA kernels must cost on a GPU, and what they are predicted to take: csrc/cuda/cost.h, for Python.

    python -m cmx_kernels.cost_model [GPU]

``floor_us`` is the compulsory traffic over the bandwidth; the other ``_us`` are the predicted time and its terms.
Predictions come from instruction counts and published rates, not from measurements.
"""

import ctypes
import functools
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from cmx_kernels import registry

KERNELS = ("ffma", "mma", "mma_plane", "mma_last")
TILES = ("128x128", "64x64", "64x32", "wgmma")  # of the matrix product by mma.sync; by wgmma
DTYPES = ("float32", "float16", "bfloat16")
TERMS = ("memory", "issue", "tensor", "ffma", "shared")
USES = ("inference", "moments", "sums")  # of a product
ACTS = ("none", "relu", "gelu", "gelu_tanh")
LAUNCH = 2.0  # us, as in csrc/cuda/cost.h


class _Prediction(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_int) for name in ("kernel", "blocks", "threads", "shared_bytes", "unfolded", "relaid")),
        *((name, ctypes.c_double) for name in ("bytes", "flop", "floor_us", "predicted_us")),
        *((f"{term}_us", ctypes.c_double) for term in TERMS),
        ("why_not_wgmma", ctypes.c_char_p),
    )


@dataclass(frozen=True)
class Prediction:
    kernel: str
    blocks: int
    threads: int
    shared_bytes: int
    unfolded: bool  # of patches: a kernel lays them out before the product, and is counted too
    relaid: bool  # channels_last tensors are copied to NCHW and back, which is counted too
    bytes: float
    flop: float
    floor_us: float
    predicted_us: float
    memory_us: float
    issue_us: float
    tensor_us: float
    ffma_us: float
    shared_us: float
    why_not_wgmma: str | None  # None: it is, or the GPU has none

    @property
    def bound_by(self) -> str:
        return max(TERMS, key=lambda term: getattr(self, f"{term}_us"))


@functools.cache
def _library() -> ctypes.CDLL:
    if registry.C is None:
        raise RuntimeError(registry.WHY_NO_C)
    library = ctypes.CDLL(registry.C.__file__)
    library.cmx_cost_gpu.restype = ctypes.c_char_p
    library.cmx_cost_activation.restype = ctypes.c_double
    return library


@functools.cache
def gpus() -> tuple[str, ...]:
    """The GPUs whose numbers the model has."""
    names: list[str] = []
    while (name := _library().cmx_cost_gpu(len(names))) is not None:
        names.append(name.decode())
    return tuple(names)


def named(device: str) -> str | None:
    """The GPU of the table whose name this device bears; None for another one."""
    known = gpus() if registry.C is not None else ()
    return next((gpu for gpu in known if gpu.removeprefix("RTX ") in device), None)


def activation_instructions(act: str, dtype: str, slope: bool = False) -> float:
    """Of a CUDA kernel, for one number of ``dtype``; with ``slope`` those of the derivative too."""
    return _library().cmx_cost_activation(ACTS.index(act), DTYPES.index(dtype), int(slope))


def depthwise(
    gpu: str,
    shape: tuple[int, int, int, int],
    kernel_size: tuple[int, int],
    dtype: str = "bfloat16",
    act: str = "gelu",
    channels_last: bool = False,
) -> Prediction:
    """The plan that would run for x of ``shape`` on ``gpu``, and its cost."""
    return _ask("depthwise", KERNELS, gpu, (*shape, *kernel_size), dtype, act, channels_last)


def depthwise_backward(
    gpu: str,
    shape: tuple[int, int, int, int],
    kernel_size: tuple[int, int],
    dtype: str = "bfloat16",
    act: str = "gelu",
    channels_last: bool = False,
    kernel: str | None = None,
) -> Prediction:
    """Both gradients: the plan that would run, or that of one of the kernels, ffma or mma (16-bit types)."""
    chosen = -1 if kernel is None else KERNELS.index(kernel)
    return _ask("depthwise_backward", KERNELS, gpu, (*shape, *kernel_size), dtype, act, channels_last, (chosen,))


def product(
    gpu: str,
    shape: tuple[int, int, int, int],
    channels: int,
    patch: tuple[int, int] = (1, 1),
    dtype: str = "bfloat16",
    act: str = "gelu",
    channels_last: bool = False,
    use: str = "inference",
) -> Prediction:
    """pointwise_block, or patch_embed, on x of ``shape``, to ``channels``; ``kernel`` is the tile. 16-bit types.

    use: of training, "moments" where the product takes those of its output, "sums" of a gradient beside a tensor.
    """
    n, c, h, w = shape
    numbers = (n, c, channels, h // patch[0], w // patch[1], *patch)
    return _ask("product", TILES, gpu, numbers, dtype, act, channels_last, (USES.index(use),))


def _ask(
    what: str,
    kernels: tuple[str, ...],
    gpu: str,
    shape: tuple[int, ...],
    dtype: str,
    act: str,
    channels_last: bool,
    more: tuple[int, ...] = (),
) -> Prediction:
    if gpu not in gpus():
        raise ValueError(f"gpu: got {gpu!r}, wanted one of {', '.join(gpus())}")
    numbers = (*shape, DTYPES.index(dtype), ACTS.index(act), *more)
    out = _Prediction()
    function = getattr(_library(), f"cmx_cost_{what}")
    if function(gpu.encode(), (ctypes.c_int * len(numbers))(*numbers), int(channels_last), ctypes.byref(out)):
        raise ValueError(f"kernel: the one asked for takes no shape {shape} in {dtype}")
    values = {name: getattr(out, name) for name in Prediction.__dataclass_fields__}
    why = None if out.why_not_wgmma is None else out.why_not_wgmma.decode()
    found = {
        "kernel": kernels[out.kernel],
        "unfolded": bool(out.unfolded),
        "relaid": bool(out.relaid),
        "why_not_wgmma": why,
    }
    return Prediction(**{**values, **found})


def product_note(device: str, op: str, x: Tensor, weight: Sequence[int], act: str) -> str:
    """For `explain`: the kernel of a matrix product, and why it is not wgmma; "" for a GPU that is not in the table."""
    known = named(device)
    kind = str(x.dtype).removeprefix("torch.")
    if known is None or kind == "float32" or op not in ("pointwise_block", "patch_embed") or act not in ACTS:
        return ""
    last = x.stride(1) == 1 and x.shape[1] > 1
    p = product(known, tuple(x.shape), weight[0], tuple(weight[2:]), kind, act, last)  # type: ignore[arg-type]
    before = "unfolded, then " if p.unfolded else ""
    if p.kernel == "wgmma":
        return f"{op}: {before}wgmma"
    why = "" if p.why_not_wgmma is None else f", not wgmma: {p.why_not_wgmma}"
    return f"{op}: {before}mma.sync {p.kernel}{why}"


def main() -> None:
    gpu = sys.argv[1] if len(sys.argv) > 1 else "H200"
    print(f"{gpu}, predicted, GELU and residual. Times in us; 'of floor' is floor / predicted.")
    print(f"{'shape':>20} {'k':>3} {'dtype':>9} {'kernel':>10} {'floor':>8} {'predicted':>9} {'of floor':>8}  bound by")
    for n, c, size in ((64, 1536, 32), (64, 768, 32), (64, 1024, 16), (64, 384, 56), (1, 1536, 32)):
        for k in (3, 7, 9, 13, 31):
            for dtype in ("bfloat16", "float32"):
                _print((n, c, size), str(k), dtype, depthwise(gpu, (n, c, size, size), (k, k), dtype))
    print("both gradients of the depthwise convolution, by each kernel")
    gradients = (
        (64, 1536, 32, 9, "gelu"),
        (64, 768, 32, 7, "relu"),
        (64, 1024, 16, 9, "gelu"),
        (64, 384, 32, 31, "none"),
    )
    for n, c, size, k, act in gradients:
        for kernel in ("ffma", "mma"):
            p = depthwise_backward(gpu, (n, c, size, size), (k, k), act=act, kernel=kernel)
            _print((n, c, size), str(k), "bfloat16", p)
    print("products")
    for n in (1, 8, 64, 256):
        for c, size in ((1536, 32), (768, 32), (1024, 16)):
            _print((n, c, size), "1x1", "bfloat16", product(gpu, (n, c, size, size), c))
    print("patches")
    for n in (1, 8, 64, 256):
        for c, size, patch in ((1536, 32, 7), (768, 32, 7), (1024, 16, 14)):
            p = product(gpu, (n, 3, size * patch, size * patch), c, (patch, patch))
            _print((n, c, size), f"{patch}x{patch}", "bfloat16", p)
    print("products of training; in us: with their statistics, and as fast a product with a pass for them behind it")
    for c, size in ((1536, 32), (768, 32), (1024, 16)):
        shape = (64, c, size, size)
        plain = product(gpu, shape, c, act="none")
        tensor = 2 * math.prod(shape) * plain.memory_us / plain.bytes
        for use, passes in (("moments", tensor), ("sums", 2 * tensor)):
            ours = product(gpu, shape, c, use=use).predicted_us
            print(f"{'x'.join(map(str, shape)):>20} {use:>13} {ours:8.1f} {plain.predicted_us + passes + LAUNCH:9.1f}")


def _print(shape: tuple[int, int, int], k: str, dtype: str, p: Prediction) -> None:
    n, c, size = shape
    share = f"{100 * p.floor_us / p.predicted_us:.0f} %"
    print(
        f"{f'{n}x{c}x{size}x{size}':>20} {k:>3} {dtype:>9} {p.kernel:>10} {p.floor_us:8.1f} "
        f"{p.predicted_us:9.1f} {share:>8}  {p.bound_by}"
    )


if __name__ == "__main__":
    main()
