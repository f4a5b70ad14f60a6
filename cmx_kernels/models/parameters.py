"""The parameters and running statistics of a stack's convolutions, as they are in a call."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from cmx_kernels.ops.batchnorm import alike, constants, fold_rows
from cmx_kernels.ops.block_stack import ConvParams
from cmx_kernels.ops.depth_first import Blocks
from cmx_kernels.ops.kept_weights import Group, converted

Stores = Sequence[tuple[dict[str, Any], dict[str, Any]]]  # of a convolution and its BatchNorm: their __dict__


class Parameters:
    """Read from the modules' dictionaries: asking the modules takes as long as launching a kernel."""

    def __init__(self, stores: Stores) -> None:
        parts = [(conv["_parameters"], norm["_buffers"], norm["_parameters"]) for conv, norm in stores]
        self.convs = [(conv["weight"], conv["bias"]) for conv, _, _ in parts]
        self.norms = [(b["running_mean"], b["running_var"], p["weight"], p["bias"]) for _, b, p in parts]
        self.eps = [norm["eps"] for _, norm in stores]

    def fit(self, shapes: Sequence[tuple[int, ...]], x: Tensor, mixed: bool) -> bool:
        """Whether all are on x's device and have the shapes, [C, Cin, kh, kw] and [C], and weights x's dtype.

        mixed: weights may have any dtype.
        """
        for shape, (weight, bias), norm in zip(shapes, self.convs, self.norms, strict=True):
            if weight.shape != shape or weight.device != x.device or not (mixed or weight.dtype == x.dtype):
                return False
            if any(v is not None and (v.shape != shape[:1] or v.device != x.device) for v in (bias, *norm)):
                return False
        return True

    def prepare(self, dtype: torch.dtype) -> None:
        """Remember for rows() what does not change while the tensors are where they are."""
        weights, biases = zip(*self.convs, strict=True)
        self.weights = [weight.detach() for weight in weights]
        self.same = {weight.dtype for weight in weights} == {dtype}
        self.group = Group(weights, dtype)
        self.vectors = alike(biases, self.norms, self.eps)

    def rows(self) -> tuple[Sequence[Tensor], Tensor] | None:
        """Weights in that dtype, and the rest folded, [units, 3, C]; None where one launch cannot fold all units."""
        if self.vectors is None:
            return None
        return self.weights if self.same else self.group.converted(), fold_rows(self.vectors, self.eps[0])

    def layers(self, dtype: torch.dtype, stem: bool) -> tuple[ConvParams | None, Blocks]:
        """Weights in ``dtype``, the rest folded in float32: of the stem, if there is one, and of each block."""
        weights, biases = zip(*self.convs, strict=True)
        with torch.autocast(weights[0].device.type, enabled=False):  # which refuses to stack float16 beside bfloat16
            rows = zip(converted(weights, dtype), constants(biases, self.norms, self.eps), strict=True)
        found = [ConvParams(weight, *vectors) for weight, vectors in rows]
        first = found.pop(0) if stem else None
        return first, list(zip(found[::2], found[1::2], strict=True))
