"""Global pooling with the names, the shapes and the attributes of timm's SelectAdaptivePool2d."""

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class AvgMaxPool(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return 0.5 * (F.adaptive_avg_pool2d(x, 1) + F.adaptive_max_pool2d(x, 1))


class CatAvgMaxPool(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.cat((F.adaptive_avg_pool2d(x, 1), F.adaptive_max_pool2d(x, 1)), 1)


_POOLS: dict[str, Callable[[], nn.Module]] = {
    "avg": partial(nn.AdaptiveAvgPool2d, 1),
    "max": partial(nn.AdaptiveMaxPool2d, 1),
    "avgmax": AvgMaxPool,
    "catavgmax": CatAvgMaxPool,
    "": nn.Identity,
}


class GlobalPool(nn.Module):
    """[N, C, H, W] -> [N, C] ("avg", "max", or "avgmax", their mean), [N, 2 C] ("catavgmax"), unchanged ("").

    timm's "fast" before one of these, or alone for "avg", is another way to the same.
    """

    def __init__(self, pool_type: str = "avg") -> None:
        super().__init__()
        pool_type = str(pool_type or "").lower()
        kind = "avg" if pool_type == "fast" else pool_type.removeprefix("fast")
        if kind not in _POOLS:
            known = ", ".join(map(repr, _POOLS))
            raise ValueError(f"global_pool: got {pool_type!r}, wanted one of {known}")
        self.pool_type = pool_type
        self.pool = _POOLS[kind]()
        self.flatten = nn.Flatten(1) if pool_type else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return self.flatten(self.pool(x))

    def is_identity(self) -> bool:
        return not self.pool_type

    def feat_mult(self) -> int:
        """Features a channel."""
        return 2 if self.pool_type.endswith("catavgmax") else 1

    def extra_repr(self) -> str:
        return f"pool_type={self.pool_type!r}"
