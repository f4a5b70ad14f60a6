"""The CUDA kernels, emulated, on images and channels that lie 2^31 and more elements apart: offsets of 64 bits."""

import itertools
import math
import mmap

import cases
import emulated
import emulated_product
import emulated_training
import pytest
import torch
import training_cases as problems
from compare import check
from torch import Tensor

pytestmark = [emulated.needs(emulated.library), emulated.needs(emulated_product.library)]
BF16 = torch.bfloat16
F32S = (torch.float32,) * 3
MAP_NORESERVE = 0x4000  # on x86-64 Linux, which the emulator needs
CHANNELS, PIXELS = 2**30, 2**27  # elements from one to the next


def far_apart(t: Tensor, channels_last: bool = False) -> Tensor:
    """The same numbers in memory that is reserved, of which a few pages are touched."""
    _, c, h, w = t.shape
    if channels_last:
        strides = ((h * w + 2) * PIXELS, 1, w * PIXELS, PIXELS)
    else:
        strides = ((c + 2) * CHANNELS, CHANNELS, w, 1)
    count = 1 + sum((size - 1) * stride for size, stride in zip(t.shape, strides, strict=True))
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | MAP_NORESERVE
    memory = torch.frombuffer(mmap.mmap(-1, count * t.element_size(), flags), dtype=t.dtype)
    return memory.as_strided(t.shape, strides).copy_(t)


def nowhere(t: Tensor, channels_last: bool = False) -> Tensor:
    return far_apart(torch.full_like(t, math.nan), channels_last)


@pytest.mark.parametrize(
    ("kernel", "dtype"),
    (("ffma", torch.float32), *((kernel, BF16) for kernel in ("ffma", "mma", "mma_plane", "mma_last"))),
    ids=cases.name,
)
def test_depthwise(kernel: str, dtype: torch.dtype) -> None:
    for shape in ((3, 4, 16, 16, 7, 7), *([(2, 3, 9, 40, 5, 4)] if kernel != "mma_plane" else [])):
        x, *rest = args = cases.inputs("depthwise_block", shape, dtype, "gelu", F32S)
        for last in (False, True) if kernel == "ffma" else (kernel == "mma_last",):
            out = emulated.depthwise(kernel, far_apart(x, last), *rest, out=nowhere(x, last))
            check(out, cases.expect("depthwise_block", args), f"{shape}, channels_last {last}")


@pytest.mark.parametrize("kernel", ("ffma", "mma"))
def test_gradients(kernel: str) -> None:
    args = problems.depthwise_inputs((3, 4, 9, 40, 5, 4), BF16)
    grad, a, k, x, *rest = back = problems.backward_inputs(args, problems.expect_pre_activation(args).ref.to(BF16))
    far = (far_apart(grad), far_apart(a), k, far_apart(x), *rest)
    found = emulated_training.depthwise_backward(*far, kernel=kernel, dx=nowhere(x))
    for out, wanted in zip(found, problems.expect_gradients(back, rounded=kernel == "mma"), strict=False):
        check(out, wanted)


TILES = (*emulated_product.TILES, emulated_product.WGMMA)


@pytest.mark.parametrize(
    ("layout", "tile"), [*itertools.product(("pixels", "channels_last"), TILES), ("gather", 1)], ids=cases.name
)
def test_product(layout: str, tile: int) -> None:
    shape = (3, 8, 40, 5, 8) if layout != "gather" else (3, 8, 40, 5, 7)
    x, *rest = args = cases.inputs("pointwise_block", shape, BF16, "gelu", F32S)
    expected = cases.expect("pointwise_block", args)
    y = torch.full_like(expected.ref, math.nan, dtype=BF16)
    last = layout == "channels_last"
    out, found = emulated_product.product(far_apart(x, last), *rest, tile=tile, out=far_apart(y, last))
    assert found == layout
    check(out, expected)
    if tile == emulated_product.TILES[-1]:
        return  # not of training
    like, rows, sums = problems.normal(*y.shape).to(BF16), problems.rows(3, 40), torch.empty(2, 40)
    training = {"found": sums, "like": far_apart(like, last), "mean": rows[0].contiguous()}
    y = far_apart(y, last)
    emulated_product.product(far_apart(x, last), rest[0], act="gelu", tile=tile, out=y, **training)
    check(sums, problems.expect_sums(y, like, rows, "gelu"), "sums")


def test_pool_head() -> None:
    x, *rest = args = cases.inputs("pool_head", (3, 4, 11, 5, 7), BF16, vectors=F32S)
    for last in (False, True):
        check(emulated_product.pool_head(far_apart(x, last), *rest), cases.expect("pool_head", args))
