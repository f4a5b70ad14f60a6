"""A training step: forward, cross entropy, backward, AdamW. bf16 is autocast, as users train."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks import memory
from benchmarks.fields import backends_of
from benchmarks.networks import Spec, plain
from benchmarks.peers import Runner, fused


def network(spec: Spec, weights: Path, provider: str) -> tuple[nn.Module, Callable[[Tensor], Tensor]]:
    """The network in training mode, and the same as its user calls it."""
    model = fused.network(spec) if provider.startswith("fused") else plain(spec)
    model.load_state_dict(torch.load(weights, weights_only=True))
    if provider == "eager channels_last":
        model = model.to(memory_format=torch.channels_last)
    return model.train(), torch.compile(model, dynamic=False) if provider == "inductor" else model


def gradients(model: nn.Module, call: Callable[[Tensor], Tensor], x: Tensor, labels: Tensor, mixed: bool) -> Tensor:
    """Backward of the mean cross entropy; returns the loss, and leaves the gradients in the parameters."""
    model.zero_grad(set_to_none=True)
    with torch.enable_grad():
        with torch.autocast(x.device.type, torch.bfloat16, enabled=mixed):
            logits = call(x)
        loss = F.cross_entropy(logits.to(torch.promote_types(logits.dtype, torch.float32)), labels)
        loss.backward()
    return loss.detach()


def runner(spec: Spec, weights: Path, provider: str, dtype: str, device: str = "cpu") -> Runner:
    model, call = network(spec, weights, provider)
    model.to(device)
    layout = torch.channels_last if provider == "eager channels_last" else torch.contiguous_format
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)

    def step(feed: tuple[Tensor, Tensor]) -> Tensor:
        loss = gradients(model, call, feed[0].contiguous(memory_format=layout), feed[1], dtype == "bf16")
        optimizer.step()
        return loss

    settings: dict[str, Any] = {"layout": "NHWC" if layout == torch.channels_last else "NCHW", "optimizer": "AdamW"}
    if provider.startswith("fused"):
        image = torch.empty(1, 3, spec.image_size, spec.image_size, device=device)
        with torch.enable_grad(), torch.autocast(device, torch.bfloat16, enabled=dtype == "bf16"):
            backends = backends_of(model, image)
        settings |= {"backend": " + ".join(sorted({*backends.values()} - {"torch"})), "backends": backends}
    return Runner(feed=lambda x: x, run=step, model=model, settings=settings)


def check(spec: Spec, weights: Path, provider: str, dtype: str, images: Tensor, labels: Tensor) -> dict[str, Any]:
    """Gradients of the first step, by name, as numpy: a tensor would travel in shared memory."""
    model, call = network(spec, weights, provider)
    loss = gradients(model, call, images, labels, dtype == "bf16")
    found = {name: p.grad.float().numpy() for name, p in model.named_parameters() if p.grad is not None}
    return {"loss": float(loss), "gradients": found}


def measured(step: Callable[[], Any]) -> dict[str, float]:
    """Memory of the second step: the first one also allocates the optimizer's state."""
    step()
    return memory.of_steady_call(step)
