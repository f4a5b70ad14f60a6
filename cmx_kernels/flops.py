"""Formulas for torch.utils.flop_counter, handed over when somebody imports it: that import may import Triton, and ours
must not."""

import importlib.util
import sys
from collections.abc import Callable
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from typing import Any

_COUNTER = "torch.utils.flop_counter"
_waiting: list[tuple[Any, Callable[..., int]]] = []


def count(operator: Any, formula: Callable[..., int]) -> None:
    """Let FlopCounterMode know ``operator``. ``formula`` gets its arguments with shapes in place of tensors, and
    ``out_shape``; a multiply-add counts as two, as in PyTorch's formulas."""
    _waiting.append((operator, formula))
    if _COUNTER in sys.modules:
        _hand_over()


def _hand_over() -> None:
    while _waiting:
        operator, formula = _waiting.pop()
        sys.modules[_COUNTER].register_flop_formula(operator)(formula)


class _AtImport(MetaPathFinder):
    """Leaves the import as it is, hands the formulas over behind it, and is gone."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        if name != _COUNTER:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        if spec is None or spec.loader is None:
            return spec
        run = spec.loader.exec_module

        def exec_module(module: Any) -> None:
            run(module)
            _hand_over()

        spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


if _COUNTER not in sys.modules:
    sys.meta_path.insert(0, _AtImport())
