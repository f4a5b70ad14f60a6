"""The depthwise block, and steps of a depthwise layer, on a GPU against PyTorch: CUDA events, L2 flushed before every
call, providers in turns.

    python -m benchmarks.gpu.ops [--seconds 480] [--device cpu --dry-run]

Every provider is checked before it is timed: |out - ref| <= 2 max|eager - ref| + eps, ref in float64 on two images.
Floors are those of cmx_kernels.cost_model; % of copy: of the bandwidth of a copy in the same run. float32 without TF32.
A step is forward and backward: gradients of x, weight and bias.
"""

import copy
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.gpu import goals
from benchmarks.gpu.device import KINDS, Device, flags, opened, parser, race, rated, reason, say
from benchmarks.gpu.store import Store
from cmx_kernels import LargeKernelDepthwiseConv2d, backends, ops

_MODELS = ((1536, 32, 9), (768, 32, 7), (1024, 16, 9))  # channels, pixels on a side, kernel
BLOCK, STEP = "depthwise_block", goals.STEP
_BLOCKS = [  # (n, c, size), kernel, dtype: what has goals first, so that a short run has it
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
_STEPS = [((64, c, s), k, d) for d in ("bf16", "fp32") for c, s, k in ((96, 56, 7), (384, 14, 7), (384, 32, 31))]
CASES = [*((BLOCK, *case) for case in _BLOCKS), *((STEP, *case) for case in _STEPS)]
DRY = [(BLOCK, (2, 8, 16), k, d) for k, d in ((3, "fp32"), (7, "bf16"), (9, "fp16"))] + [(STEP, (2, 8, 16), 7, "bf16")]


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
    return wanted(device, found, inductor)


def wanted(
    device: Device, found: dict[str, Callable[[], Tensor]], inductor: Callable[[bool], Callable[[], Tensor]]
) -> dict[str, Callable[[], Tensor]]:
    """What is to be timed of ``found``, and of Inductor with and without its choice of layouts."""
    for name, layout in (("inductor", True), ("inductor, layout kept", False)):
        try:
            found |= {name: inductor(layout)} if device.wants(name) else {}
        except Exception as error:  # no compiler, no triton: a row without it
            say(f"   {name}: {reason(error)}")
    return {name: call for name, call in found.items() if device.wants(name)}


def key_of(op: str, shape: tuple[int, int, int], k: int, dtype: str) -> dict[str, Any]:
    return {"op": op, "shape": "{0}x{1}x{2}x{2}".format(*shape), "k": k, "dtype": dtype}


def allowed_error(plain: Tensor, exact: Tensor) -> float:
    return 2 * (plain.double() - exact).abs().max().item() + 4 * torch.finfo(plain.dtype).eps * exact.abs().max().item()


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
        allowed = allowed_error(eager(args[0][:2], *args[1:]), exact)
        us = race(device, providers(device, args, backend), exact, allowed, record)
    cost = device.cost("depthwise", (n, c, size, size), (k, k), str(kind).removeprefix("torch."))
    rated(record, us, cost, backend)
    if "gb_per_s" in record:
        record["percent_of_copy"] = 100 * record["gb_per_s"] / gb_per_s


def step(module: nn.Module, x: Tensor, grad: Tensor) -> tuple[Tensor, ...]:
    x = x.detach().requires_grad_()
    return torch.autograd.grad(module(x), (x, *module.parameters()), grad)


def steps(device: Device, conv: nn.Module, layer: nn.Module, x: Tensor, grad: Tensor, backend: str) -> dict[str, Any]:
    """Each returns the gradient of x."""

    def ours(x: Tensor, grad: Tensor, backend: str = backend) -> Tensor:
        with backends.use(backend):
            return step(layer, x, grad)[0]

    def searched(x: Tensor, grad: Tensor) -> Tensor:
        with flags(benchmark=True):
            return step(conv, x, grad)[0]

    def inductor(layout: bool) -> Callable[[], Tensor]:
        compiled = device.compiled(conv, options={"layout_optimization": layout})
        step(compiled, *given)
        return lambda: step(compiled, *given)[0]

    given, last = (x, grad), tuple(t.contiguous(memory_format=torch.channels_last) for t in (x, grad))
    found = {
        "fused": lambda: ours(*given),
        "fused channels_last": lambda: ours(*last),
        **({"fused triton": lambda: ours(*given, "triton")} if device.cuda else {}),
        "eager": lambda: step(conv, *given)[0],
        "eager channels_last": lambda: step(conv, *last)[0],
        "eager, cudnn.benchmark": lambda: searched(*given),
        "eager channels_last, cudnn.benchmark": lambda: searched(*last),
    }
    return wanted(device, found, inductor)


def measure_step(device: Device, record: dict[str, Any], shape: tuple[int, int, int]) -> None:
    (n, c, size), k = shape, record["k"]
    kind = KINDS[record["dtype"]]
    torch.manual_seed(0)
    x, grad = (torch.randn(n, c, size, size, device=device.type).to(kind) for _ in range(2))
    conv = nn.Conv2d(c, c, k, groups=c, padding="same", device=device.type, dtype=kind)
    layer = LargeKernelDepthwiseConv2d(c, k, device=device.type, dtype=kind)
    layer.load_state_dict(conv.state_dict())
    backend = "cuda" if device.cuda else backends.select(BLOCK, x, "none")
    few = x[:2], grad[:2]
    with flags():
        exact = step(copy.deepcopy(conv).double(), *(t.double() for t in few))
        allowed = [allowed_error(near, ref) for near, ref in zip(step(conv, *few), exact, strict=True)]
        with backends.use(backend):
            found = step(layer, *few)
        for out, ref, most in zip(found, exact, allowed, strict=True):
            error = (out.double() - ref).abs().max().item()
            if not error <= most:
                raise RuntimeError(f"a gradient {list(ref.shape)} is wrong by {error:.3g}, allowed are {most:.3g}")
        us = race(device, steps(device, conv, layer, x, grad, backend), exact[0], allowed[0], record)
    asked = ((n, c, size, size), (k, k), str(kind).removeprefix("torch."), "none")
    forward, backward = (device.cost(name, *asked) for name in ("depthwise", "depthwise_backward"))
    both = {key: forward[key] + backward[key] for key in forward if key != "kernel"}
    if "kernel" in forward:
        both["kernel"] = f"{forward['kernel']}, {backward['kernel']}"
    rated(record, us, both, backend)


def main(arguments: list[str] | None = None) -> int:
    options = parser("The depthwise block on a GPU.", "gpu-ops").parse_args(arguments)
    device = opened(options)
    if device is None:
        return 2
    section = "gpu_ops"
    cases = {case: key_of(*case) for case in (DRY if device.dry else CASES)}
    store = Store(device, options, goals.OPS, section, cases.values())
    store.about["ceilings"] = ceilings = device.ceilings()
    say(f"{device.name}: copy {ceilings['copy']:.0f} GB/s")
    for (op, shape, k, dtype), key in cases.items():
        if store.has(section, key):
            continue
        if device.over:
            say(f"{options.seconds:.0f} s are over: the remaining cases are left out")
            break
        record = {**key, "note": ""}
        try:
            if op == STEP:
                measure_step(device, record, shape)
            else:
                measure(device, record, shape, ceilings["copy"])
        except Exception as error:  # a kernel that fails must not cost the other rows
            store.failed(section, record, error)
        else:
            store.add(section, record)
        say(f"{op} {shape} k={k} {dtype}: " + (", ".join(f"{n} {v:.1f}" for n, v in record.get("us", {}).items())))
    store.tell_goals()
    return int(any("fused" not in row.get("us", {}) for row in store.rows(section)))


if __name__ == "__main__":
    raise SystemExit(main())
