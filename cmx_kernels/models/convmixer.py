"""ConvMixer (Trockman and Kolter, "Patches Are All You Need?", arXiv 2201.09792), named as in timm 1.0.

stem   conv p x p, stride p -> act -> bn
block  x + (depthwise conv k x k -> act -> bn), then conv 1x1 -> act -> bn
head   global pool -> dropout -> linear
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from cmx_kernels import backends, checkpoints
from cmx_kernels.models.conversion import convert
from cmx_kernels.models.pooling import GlobalPool
from cmx_kernels.models.training import recomputed
from cmx_kernels.ops.checks import MAX_KERNEL, Size, check_int, pair


class Residual(nn.Module):
    def __init__(self, fn: nn.Module) -> None:
        super().__init__()
        self.fn = fn

    def forward(self, x: Tensor) -> Tensor:
        return self.fn(x) + x


class ConvMixer(nn.Module):
    """Images [N, in_chans, H, W] -> logits [N, n_classes].

    Args:
        dim, depth: width h and number of blocks d, as in ConvMixer-h/d.
        kernel_size, patch_size: pixels, or (rows, columns).
        n_classes, num_classes: two names of one thing; 0 leaves the head out.
        global_pool: "avg", "max", "avgmax", "catavgmax", timm's "fast" before one of them, which pools the same, or ""
            for none, with num_classes=0.
        drop_rate: dropout before the head.
        act_layer: class of the activations. It has no keys in a state dict: the released 768/32 needs nn.ReLU.
        fused: run on this package's kernels where they apply; False is the plain PyTorch model with the same keys.

    Raises:
        TypeError, ValueError: an argument of the wrong type or value.
    """

    def __init__(
        self,
        dim: int,
        depth: int,
        kernel_size: Size = 9,
        patch_size: Size = 7,
        n_classes: int = 1000,
        *,
        in_chans: int = 3,
        num_classes: int | None = None,
        global_pool: str = "avg",
        drop_rate: float = 0.0,
        act_layer: Callable[[], nn.Module] = nn.GELU,
        fused: bool = True,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        for name, value in (("dim", dim), ("depth", depth), ("in_chans", in_chans)):
            check_int(name, value, 1, f"a number of {'blocks' if name == 'depth' else 'channels'}")
        for value in pair("kernel_size", kernel_size):
            check_int("kernel_size", value, 1, "pixels; use nn.Conv2d for larger kernels", MAX_KERNEL)
        for value in pair("patch_size", patch_size):
            check_int("patch_size", value, 1, "pixels")
        if not isinstance(drop_rate, (int, float)) or not 0 <= drop_rate <= 1:
            raise ValueError(f"drop_rate: got {drop_rate!r}, wanted a probability from 0 to 1")
        if isinstance(act_layer, nn.Module) or not callable(act_layer):
            raise TypeError(f"act_layer: got {act_layer!r}, wanted a class of activations, as nn.GELU")
        classes = _classes(n_classes, num_classes)
        super().__init__()
        where: dict[str, Any] = {"device": device, "dtype": dtype}
        self.num_classes = classes
        self.in_chans = in_chans
        self.num_features = dim
        self.grad_checkpointing = False
        # Built in timm's order: one seed draws the same weights
        self.stem = nn.Sequential(
            nn.Conv2d(in_chans, dim, patch_size, stride=patch_size, **where), act_layer(), nn.BatchNorm2d(dim, **where)
        )
        self.blocks = nn.Sequential(*(_block(dim, kernel_size, act_layer, where) for _ in range(depth)))
        self.feature_info = [{"num_chs": dim, "reduction": patch_size, "module": f"blocks.{i}"} for i in range(depth)]
        self.global_pool = _pool(global_pool, classes)
        self.head_hidden_size = dim * self.global_pool.feat_mult()
        self.head_drop = nn.Dropout(drop_rate)
        self.head = nn.Linear(self.head_hidden_size, classes, **where) if classes else nn.Identity()
        problem = convert(self).problem if fused else ""
        if problem:
            backends.say_once(f"ConvMixer(fused=True): {problem}")

    def forward_features(self, x: Tensor) -> Tensor:
        """[N, in_chans, H, W] -> [N, dim, H // p, W // p]"""
        x = self.stem(x)
        if self.grad_checkpointing and not torch.jit.is_scripting():
            for block in self.blocks:
                x = recomputed(block, x)
            return x
        return self.blocks(x)

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """[N, dim, H', W'] -> logits, or with ``pre_logits`` what the classifier sees."""
        x = self.head_drop(self.global_pool(x))
        return x if pre_logits else self.head(x)

    def forward(self, x: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(x))

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | Sequence[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> list[Tensor] | tuple[Tensor, list[Tensor]]:
        """The features, and the outputs of some blocks: the last n, those of a sequence, or all. ``norm`` is unused."""
        if output_fmt != "NCHW":
            raise ValueError(f"output_fmt: got {output_fmt!r}, wanted 'NCHW'")
        wanted = self._indices(indices)
        stop = max(wanted) + 1 if stop_early else len(self.blocks)
        intermediates = []
        x = self.stem(x)
        for i, block in enumerate(list(self.blocks)[:stop]):
            x = recomputed(block, x) if self.grad_checkpointing else block(x)
            if i in wanted:
                intermediates.append(x)
        return intermediates if intermediates_only else (x, intermediates)

    def prune_intermediate_layers(
        self, indices: int | Sequence[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Drop the blocks after the last one wanted, and the head; returns the indices that were kept."""
        wanted = self._indices(indices)
        del self.blocks[max(wanted) + 1 :]
        if prune_head:
            self.reset_classifier(0, "")
        return wanted

    def _indices(self, indices: int | Sequence[int] | None) -> list[int]:
        depth = len(self.blocks)
        if indices is None or isinstance(indices, int):
            last = depth if indices is None else indices
            if not 0 < last <= depth:
                raise ValueError(f"indices: got {last}, wanted 1 to {depth}, a number of blocks counted from the last")
            return list(range(depth - last, depth))
        for i in indices:
            if not -depth <= i < depth:
                raise ValueError(f"indices: got {i}, wanted {-depth} to {depth - 1}: the network has {depth} blocks")
        return [i % depth for i in indices]

    def get_classifier(self) -> nn.Module:
        return self.head

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """A new head, and a new pool if one is named, on the same device, in the same dtype and mode."""
        classes = _classes(1000, num_classes)
        pool = _pool(self.global_pool.pool_type if global_pool is None else global_pool, classes)
        if global_pool is not None:
            self.global_pool = pool.train(self.training)
        weight = self.stem[0].weight
        self.num_classes = classes
        self.head_hidden_size = self.num_features * self.global_pool.feat_mult()
        where: dict[str, Any] = {"device": weight.device, "dtype": weight.dtype}
        self.head = nn.Linear(self.head_hidden_size, classes, **where) if classes else nn.Identity()
        self.head.train(self.training)

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Keep no activations inside blocks, compute them again in backward; running statistics change once a step."""
        self.grad_checkpointing = enable

    def group_matcher(self, coarse: bool = False) -> dict[str, str]:
        return {"stem": r"^stem", "blocks": r"^blocks\.(\d+)"}

    def load_state_dict(self, state_dict: Any, strict: bool = True, assign: bool = False) -> Any:
        """As nn.Module's; takes the paper's numeric keys, ``module.`` prefixes and training wrappers too."""
        state_dict = checkpoints.fit(state_dict, self, strict)
        return super().load_state_dict(state_dict, strict=strict, assign=assign)


def _block(dim: int, kernel_size: Size, act_layer: Callable[[], nn.Module], where: dict[str, Any]) -> nn.Sequential:
    depthwise = nn.Conv2d(dim, dim, kernel_size, groups=dim, padding="same", **where)
    return nn.Sequential(
        Residual(nn.Sequential(depthwise, act_layer(), nn.BatchNorm2d(dim, **where))),
        nn.Conv2d(dim, dim, kernel_size=1, **where),
        act_layer(),
        nn.BatchNorm2d(dim, **where),
    )


def _classes(n_classes: int, num_classes: int | None) -> int:
    if num_classes is None:
        num_classes = n_classes
    elif n_classes not in (1000, num_classes):
        raise ValueError(f"num_classes: got {num_classes} and n_classes={n_classes}, wanted one number; give only one")
    check_int("num_classes", num_classes, 0, "a number of classes, 0 for no head")
    return num_classes


def _pool(global_pool: str, classes: int) -> GlobalPool:
    if not global_pool and classes:
        raise ValueError(
            f"global_pool: got {global_pool!r} with {classes} classes, wanted a pool for the classifier to stand on; "
            "take 'avg', or num_classes=0 for features [N, dim, H, W]"
        )
    return GlobalPool(global_pool)
