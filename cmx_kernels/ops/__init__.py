"""The operators: one file each, with formula, reference, schema, gradient and public function."""

from cmx_kernels.ops import training_products  # noqa: F401  (registers)
from cmx_kernels.ops.depthwise_block import depthwise_block
from cmx_kernels.ops.patch_embed import patch_embed
from cmx_kernels.ops.pointwise_block import pointwise_block
from cmx_kernels.ops.pool_head import pool_head
from cmx_kernels.ops.training_forms import depthwise_block_train, patch_embed_train, pointwise_block_train

__all__ = [
    "depthwise_block",
    "depthwise_block_train",
    "patch_embed",
    "patch_embed_train",
    "pointwise_block",
    "pointwise_block_train",
    "pool_head",
]
