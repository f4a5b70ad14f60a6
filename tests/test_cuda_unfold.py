"""Patches in front of the product of 16-bit types, executed on the CPU (tests/emulator): exactly torch's unfold."""

import cases
import emulated
import emulated_product
import pytest
import torch
import torch.nn.functional as F
from compare import check_equal
from torch import Tensor

pytestmark = emulated.needs(emulated_product.library)
SHAPES = (  # n, c, h, w of patches, ph, pw
    *((2, 3, 2, 8, p, p) for p in range(1, 17)),
    *((1, 3, 3, w, 7, 7) for w in (1, 2, 7, 9, 16, 31, 32)),
    *((2, 5, 3, 5, 3, 4), (1, 1, 1, 1, 1, 9), (3, 17, 2, 24, 4, 1), (1, 2, 2, 200, 16, 3), (1, 20, 1, 16, 16, 2)),
)


def padded(rows: Tensor) -> Tensor:
    """[..., K] with zeros behind, in eights"""
    return F.pad(rows, (0, -rows.shape[-1] % 8))


def check_unfold(x: Tensor, weight: Tensor, last: bool, **how: int) -> None:
    ph, pw = weight.shape[2:]
    h, w = x.shape[2] // ph, x.shape[3] // pw
    columns = F.unfold(x.float()[:, :, : h * ph, : w * pw], (ph, pw), stride=(ph, pw))  # [N, K, h * w]
    wanted = padded(columns.mT).mT.unflatten(2, (h, w)).to(x.dtype)
    patches, rows = emulated_product.unfold(x, weight, last, **how)
    check_equal(patches, wanted, f"patches of {list(x.shape)} in {ph}x{pw}")
    check_equal(rows, padded(weight.flatten(1)), f"weight of {list(x.shape)} in {ph}x{pw}")


@pytest.mark.parametrize("last", (False, True), ids=("planes", "channels_last"))
@pytest.mark.parametrize("shape", SHAPES, ids=cases.name)
def test_shapes(shape: tuple[int, ...], last: bool) -> None:
    """Also with pixels beyond the last patch; on so many multiprocessors that rows of patches are divided."""
    n, c, h, w, ph, pw = shape
    for dtype, right, below in ((torch.bfloat16, 0, 0), (torch.float16, pw - 1, ph - 1)):
        x = torch.randn(n, c, h * ph + below, w * pw + right).to(dtype)
        weight = torch.randn(3, c, ph, pw).to(dtype)
        for multiprocessors in (1, 132):
            check_unfold(x, weight, last, multiprocessors=multiprocessors, order=(sum(shape) + right) % 6)


@pytest.mark.parametrize("last", (False, True), ids=("planes", "channels_last"))
@pytest.mark.parametrize("layout", cases.LAYOUTS)
def test_layouts(layout: str, last: bool) -> None:
    """Every layout of the image, its neighbours in memory NaN; of the weight too."""
    for w, ph, pw in ((16, 4, 4), (9, 3, 5)):
        x, weight = torch.randn(2, 3, 3 * ph, w * pw).bfloat16(), torch.randn(6, 3, ph, pw).bfloat16()
        check_unfold(cases.LAYOUTS[layout](x), cases.LAYOUTS["column_slice"](weight), last)


def test_too_much_for_shared_memory() -> None:
    """A patch of 64 x 16 x 32 numbers: gathered as before."""
    with pytest.raises(emulated.NoPlan):
        emulated_product.unfold(torch.empty(1, 64, 16, 256).bfloat16(), torch.empty(2, 64, 16, 32).bfloat16(), False)
