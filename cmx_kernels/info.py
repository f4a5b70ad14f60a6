"""build_info: what was compiled, what is used now, and why anything is missing."""

from typing import Any

import torch

from cmx_kernels import _build_info, backends, registry

_OPS = ("patch_embed", "depthwise_block", "pointwise_block", "pool_head", "block_stack")


def build_info() -> dict[str, Any]:
    """Facts about the build and this process.

    torch_at_build, torch_now   versions; torch_at_build is None where nothing was built
    isa_levels, isa_level       CPU instruction sets that were compiled and run here; the one in use, or None
    cuda_archs                  GPU architectures that were compiled
    dtypes, activations         what the CPU kernels take
    backends                    name -> None if it is available, else why not
    missing                     what was not built -> why
    build                       the whole record of the build: compiler, flags, Python, ...
    """
    try:
        record = _build_info.read()
    except ValueError as error:
        record = {"missing": {"build record": f"_build.json is damaged ({error}): install again"}}
    native, missing = registry.C, dict(record.get("missing", {}))
    if native is None:
        missing.setdefault("compiled kernels", str(registry.WHY_NO_C))
    from cmx_kernels import __version__  # which imports this file

    return {
        "version": __version__,
        "torch_at_build": record.get("torch"),
        "torch_now": torch.__version__,
        "isa_levels": list(native.isa_levels()) if native is not None else [],
        "isa_level": registry.isa_level(),
        "cuda_archs": list(record.get("cuda_archs", [])),
        "dtypes": list(native.dtypes()) if native is not None else [],
        "activations": list(native.activations()) if native is not None else [],
        "backends": _backends(),
        "missing": missing,
        "build": record,
    }


def _backends() -> dict[str, str | None]:
    """Each backend, asked with an input on its own device."""
    found: dict[str, str | None] = {}
    for backend in backends.BACKENDS:
        on_gpu = backend.name in ("cuda", "triton")
        if on_gpu and not torch.cuda.is_available():
            found[backend.name] = "torch sees no CUDA device"
            continue
        x = torch.empty(0, device="cuda" if on_gpu else "cpu")
        reasons = [backend.reason(op, x, "gelu") for op in _OPS]
        found[backend.name] = None if None in reasons else reasons[0]
    return found
