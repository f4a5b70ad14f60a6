"""What modules were when their fused form was made: classes, settings, children, hooks, methods, tensors.

All of it is asked for in every call, so the answer comes from C++ where that is built.
"""

from collections.abc import Iterable
from typing import Any

from torch import Tensor, nn

from cmx_kernels import registry
from cmx_kernels.models.obstacles import HOOKS, methods

_SETTINGS: dict[type, tuple[str, ...]] = {
    nn.Conv2d: ("stride", "padding", "dilation", "groups", "padding_mode"),
    nn.BatchNorm2d: ("eps",),  # and its mode, which is asked for in every call
    nn.SyncBatchNorm: ("eps",),
    nn.GELU: ("approximate",),
    nn.AdaptiveAvgPool2d: ("output_size",),
    nn.Flatten: ("start_dim", "end_dim"),
}


Dict = dict[str, Any]


class Watch:
    """unchanged() is True as long as objects have their classes, and dictionaries what they held.

    Tensors and modules must be the same ones; settings may be others that are equal.

    Args:
        modules: with all that is theirs but parameters, buffers and training.
        dictionaries: (dict, name, keys) watches what dict[name] is, and what that holds under these keys or, None, all.
    """

    def __init__(
        self,
        modules: Iterable[nn.Module] = (),
        dictionaries: Iterable[tuple[Dict, str, Iterable[str] | None]] = (),
    ) -> None:
        self.objects: list[Any] = []
        self.entries: list[tuple[Dict, str, Any]] = []
        self.absent: list[tuple[Dict, str]] = []
        self.sizes: list[tuple[Dict, int]] = []
        for module in modules:
            self._module(module)
        for state, name, keys in dictionaries:
            self._dictionary(state, name, keys)
        self._form: Any = _form(self.objects, self.entries, self.absent, self.sizes)  # which does not hold them

    def _module(self, module: nn.Module) -> None:
        state = module.__dict__
        self.objects.append(module)
        self.entries += [(state, name, state[name]) for name in _SETTINGS.get(type(module), ())]
        for name in HOOKS if type(module) in _SETTINGS else ("_modules", *HOOKS):
            self._dictionary(state, name)
        self.absent += [(state, name) for name in methods(type(module))]

    def _dictionary(self, state: Dict, name: str, keys: Iterable[str] | None = None) -> None:
        held = state[name]
        found = [(held, key, held[key]) for key in (held if keys is None else keys)]
        self.entries += [(state, name, held), *found]
        self.objects += [value for _, _, value in found if isinstance(value, Tensor)]
        if keys is None:
            self.sizes.append((held, len(held)))

    def read(self) -> list[Any]:
        """What unchanged() looks at."""
        return [*self.objects, *(entry[0] for entry in (*self.entries, *self.sizes))]

    def unchanged(self) -> bool:
        return self._form.unchanged()


class _InPython:
    """The same in Python."""

    def __init__(self, objects: list[Any], *found: Any) -> None:
        self.classes = [(value, type(value)) for value in objects]
        self.entries, self.absent, self.sizes = found

    def unchanged(self) -> bool:
        if any(type(value) is not kind for value, kind in self.classes) or any(n != len(d) for d, n in self.sizes):
            return False
        same = (key in d and (d[key] is value or _equal(d[key], value)) for d, key, value in self.entries)
        return all(same) and not any(key in d for d, key in self.absent)


def _equal(found: Any, value: Any) -> bool:
    return type(found) is type(value) and isinstance(value, (tuple, int, float, str)) and found == value


_form: Any = _InPython if registry.C is None else registry.C.Watch
