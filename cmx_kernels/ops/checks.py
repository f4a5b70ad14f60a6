"""Checks that operators and layers share: each error names the argument, what it got, what it wants and the way out."""

from numbers import Integral

import torch
from torch import Tensor

from cmx_kernels import backends

Size = int | tuple[int, int]
MAX_KERNEL = 31
_FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


def pair(name: str, value: Size) -> tuple[int, int]:
    if isinstance(value, Integral):
        return value, value
    if not isinstance(value, (tuple, list)) or len(value) != 2:
        raise TypeError(f"{name}: got {value!r}, wanted an int or a pair (rows, columns)")
    return value[0], value[1]


def check_int(name: str, value: int, least: int, unit: str, most: float = float("inf")) -> None:
    if not isinstance(value, Integral) or isinstance(value, bool):  # NumPy's integers are some
        raise TypeError(f"{name}: got {value!r}, wanted an int")
    if not least <= value <= most:
        limit = f"{least} to {most}" if most < float("inf") else f"at least {least}"
        raise ValueError(f"{name}: got {value}, wanted {limit}, {unit}")


def _check_tensor(tensor: Tensor, name: str, shape: str) -> None:
    """Dense and on its own memory."""
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name}: got {type(tensor).__name__}, wanted a torch.Tensor {shape}")
    if tensor.is_nested:
        raise TypeError(f"{name}: got a nested tensor, wanted a dense tensor; torch.nested.to_padded_tensor makes one")
    if tensor.layout != torch.strided or tensor.is_quantized:
        kind = "a quantized tensor" if tensor.is_quantized else f"layout {tensor.layout}"
        way_out = "dequantize()" if tensor.is_quantized else "to_dense()"
        raise TypeError(f"{name}: got {kind}, wanted a dense tensor; call .{way_out} first")


def check_activations(x: Tensor, name: str = "x") -> None:
    """[N, C, H, W], dense, floating point."""
    _check_tensor(x, name, "[N, C, H, W]")
    if x.dtype not in _FLOATS:
        raise TypeError(
            f"{name}: got dtype {x.dtype}, wanted float32, float16, bfloat16 or float64; convert with .to()"
        )
    if x.dim() != 4:
        hint = "; add the batch dimension with x[None]" if x.dim() == 3 else ""
        raise ValueError(f"{name}: got shape {list(x.shape)}, wanted 4 dimensions [N, C, H, W]{hint}")
    if x.shape[1] < 1:
        raise ValueError(f"{name}: got shape {list(x.shape)}, wanted at least one channel")


def check_weight(x: Tensor, weight: Tensor, shape: str, want: tuple[int, ...], dims: int = 4) -> None:
    """``want`` holds the sizes of a weight, with -1 where any size will do."""
    _check_tensor(weight, "weight", shape)
    fits = weight.dim() == dims and all(w in (-1, s) for s, w in zip(weight.shape, want, strict=True))
    if not fits or weight.shape[0] < 1:
        channels = f" (x has {x.shape[1]} channels)"
        raise ValueError(f"weight: got shape {list(weight.shape)}, wanted {shape}{channels}")
    same_device(x, weight, "weight")
    if weight.dtype != x.dtype:
        raise TypeError(
            f"weight: got dtype {weight.dtype} with x in {x.dtype}, wanted the same; "
            f"convert one with .to(), or run under torch.autocast"
        )


def check_vector(x: Tensor, vector: Tensor | None, name: str, channels: int) -> None:
    """A per-channel vector [C] in x's dtype or float32."""
    if vector is None:
        return
    _check_tensor(vector, name, f"[{channels}] or None")
    if vector.dim() != 1 or vector.shape[0] != channels:
        raise ValueError(
            f"{name}: got shape {list(vector.shape)}, wanted [{channels}], one value per output channel; "
            f"flatten() or expand({channels}) makes one of [C, 1, 1] or [1]"
        )
    same_device(x, vector, name)
    if vector.dtype not in (x.dtype, torch.float32):
        wanted = " or ".join(dict.fromkeys((str(x.dtype), "torch.float32")))
        raise TypeError(f"{name}: got dtype {vector.dtype} with x in {x.dtype}, wanted {wanted}; convert with .to()")


def check_kernel(weight: Tensor) -> None:
    kh, kw = weight.shape[-2:]
    if not (1 <= kh <= MAX_KERNEL and 1 <= kw <= MAX_KERNEL):
        raise ValueError(
            f"weight: got a {kh}x{kw} kernel, wanted 1 to {MAX_KERNEL} on each side; use nn.Conv2d for larger ones"
        )


def same_device(x: Tensor, other: Tensor, name: str) -> None:
    if other.device != x.device:
        raise ValueError(
            f"{name}: got device {other.device} with x on {x.device}, wanted the same; move one with .to()"
        )


def memory_format(x: Tensor) -> torch.memory_format:
    """The layout of an operator's output: channels_last for channels_last input, contiguous for everything else."""
    if backends.transformed():  # vmap cannot ask
        return torch.contiguous_format
    last = x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()
    return torch.channels_last if last else torch.contiguous_format


def in_format(y: Tensor, wanted: torch.memory_format) -> Tensor:
    """``y`` in a layout, with the strides of a new tensor also where a size of 1 leaves them open."""
    y = y.contiguous(memory_format=wanted)
    if all(size > 1 for size in y.shape):  # strides are the layout's
        return y
    new = torch.empty(y.shape, dtype=y.dtype, device="meta").to(memory_format=wanted)
    return y if y.stride() == new.stride() else y.clone(memory_format=wanted)


def compute_dtype(x: Tensor) -> torch.dtype:
    """float32 accumulation for everything up to 32 bits."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def column(vector: Tensor) -> Tensor:
    """[C] -> [1, C, 1, 1]"""
    return vector.reshape(1, -1, 1, 1)


# Asked once, because torch.compile of torch 2.11 cannot ask; of devices that nobody here knows, none has it
_DEVICES = ("cpu", "cuda", "xpu", "mps", "mtia", "hpu", "xla")
_WITH_AUTOCAST = frozenset(kind for kind in _DEVICES if torch.amp.is_autocast_available(kind))


def autocast_is_on(x: Tensor) -> bool:
    """False too for what is no tensor, and for a device that has no autocast."""
    kind = x.device.type if isinstance(x, Tensor) else "meta"
    return kind in _WITH_AUTOCAST and torch.is_autocast_enabled(kind)


def autocast(x: Tensor, *weights: Tensor) -> tuple[Tensor, ...]:
    """Our autocast rule: x and the convolution weights take the autocast dtype, BatchNorm's vectors stay."""
    if not autocast_is_on(x) or x.dtype == torch.float64:
        return (x, *weights)
    dtype = torch.get_autocast_dtype(x.device.type)
    return tuple(t.to(dtype) if t.is_floating_point() else t for t in (x, *weights))


def wants_grad(*tensors: Tensor | None) -> bool:
    """Whether autograd would record a call on these."""
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)
