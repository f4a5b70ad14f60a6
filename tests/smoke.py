"""An installed package at work, with nothing but torch beside it: python tests/smoke.py

`make wheel-test` and `make install-test` run it. The rule, in Euclidean norms, with ref in float64:
|out - ref| <= 2 |plain - ref| + rounding
"""

import subprocess
import sys

import torch
from torch import Tensor, nn

import cmx_kernels
from cmx_kernels import registry


def results(model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    """Logits for inference, and all gradients of a training step."""
    with torch.no_grad():
        logits = model.eval()(x)
    model.train()(x).square().mean().backward()
    return {"logits": logits, "gradients": torch.cat([p.grad.flatten() for p in model.parameters()])}


def main() -> None:
    assert registry.C is not None, f"no compiled kernels: {registry.WHY_NO_C}"
    subprocess.run([sys.executable, "-m", "cmx_kernels", "info"], check=True)
    torch.manual_seed(0)
    fused, plain, exact = (cmx_kernels.ConvMixer(64, 2, 7, 7, 10, fused=mine) for mine in (True, False, False))
    x = torch.randn(4, 3, 112, 112)
    for model in (plain, exact):
        model.load_state_dict(fused.state_dict())
    ran = {row.backend for row in cmx_kernels.explain(fused.eval(), x)}
    assert "cpu" in ran, f"no kernel of ours ran: {ran}"
    ours, plains, refs = results(fused, x), results(plain, x), results(exact.double(), x.double())
    for name, ref in refs.items():
        error, of_plain = (float((y[name].double() - ref).norm()) for y in (ours, plains))
        allowed = 2 * of_plain + 16 * torch.finfo(torch.float32).eps / 2 * float(ref.norm())
        assert error <= allowed, f"{name}: error {error:.2g}, allowed are {allowed:.2g}"
    where = cmx_kernels.__file__
    print(f"right: inference and a training step with torch {torch.__version__}, {registry.isa_level()}, {where}")


if __name__ == "__main__":
    main()
