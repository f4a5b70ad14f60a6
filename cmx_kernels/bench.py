"""A first look at the speed on this machine: fused against plain PyTorch, checked, in turns. For more: `make bench`."""

import statistics
import time

import torch
from torch import Tensor

from cmx_kernels.models import ConvMixer, create_model


def compare(name: str, batch: int, size: int, dtype: torch.dtype, rounds: int) -> str:
    """One line: images per second of both, their ratio, and how far the logits are apart.

    Raises:
        RuntimeError: the logits disagree; no figure is given then.
    """
    torch.manual_seed(0)
    fused = create_model(name, dtype=dtype).eval()
    plain = create_model(name, fused=False, dtype=dtype).eval()
    plain.load_state_dict(fused.state_dict())
    x = torch.randn(batch, 3, size, size, dtype=dtype)
    with torch.inference_mode():
        difference = _difference(fused, plain, x)
        seconds: dict[str, list[float]] = {"fused": [], "plain": []}
        for _ in range(rounds):
            seconds["fused"].append(_time(fused, x))
            seconds["plain"].append(_time(plain, x))
    fast, slow = (batch / statistics.median(times) for times in seconds.values())
    return (
        f"{name}  batch {batch}  {str(dtype).removeprefix('torch.')}  fused {fast:.2f}  plain {slow:.2f} images/s  "
        f"{fast / slow:.2f}x  median of {rounds} turns  logits differ by {difference:.1e}"
    )


def _time(model: ConvMixer, x: Tensor) -> float:
    start = time.perf_counter()
    model(x)
    return time.perf_counter() - start


def _difference(fused: ConvMixer, plain: ConvMixer, x: Tensor) -> float:
    """Also the warm-up of both. Half precision may differ in the last digits of every layer."""
    a, b = fused(x).float(), plain(x).float()
    allowed = 1e-4 if x.dtype == torch.float32 else 5e-2
    difference = float((a - b).abs().max() / b.abs().max())
    if not difference <= allowed:
        raise RuntimeError(f"fused and plain logits differ by {difference:.1e} of the largest, more than {allowed}")
    return difference
