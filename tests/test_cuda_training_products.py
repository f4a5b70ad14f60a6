"""pointwise_block and patch_embed of training as CUDA runs them: what is ours emulated, torch's products on the CPU."""

from types import SimpleNamespace

import cases
import emulated
import emulated_product
import emulated_training
import pytest
import torch
import training_cases as problems
from compare import check_equal
from product_checks import check_passes, check_patch_embed, check_pointwise, last

from cmx_kernels.ops import training_products

pytestmark = [emulated.needs(emulated.library), emulated.needs(emulated_product.library)]
F32, BF16 = torch.float32, torch.bfloat16
POINTWISE = ((2, 5, 7, 9, 11), (3, 16, 8, 4, 4), (1, 130, 3, 5, 8), (2, 1, 1, 3, 2), (4, 3, 70, 1, 1))
PATCH = ((2, 3, 10, 14, 14, 7, 7), (1, 2, 5, 9, 11, 2, 3))
EMULATED = SimpleNamespace(
    training_sum=emulated_training.form_sum,
    training_gradient=emulated_training.form_gradient,
    training_moments=emulated_training.moments,
    training_sums=emulated_training.sums,
    training_product=emulated_product.training_product,
    training_product_sums=emulated_product.training_product_sums,
)


@pytest.mark.parametrize("layout", ("contiguous", "channels_last"))
@pytest.mark.parametrize("dtype", cases.DTYPES, ids=cases.name)
@pytest.mark.parametrize("skips", (2, 1, 0))
def test_pointwise(skips: int, dtype: torch.dtype, layout: str) -> None:
    for shape in POINTWISE:
        check_pointwise(EMULATED, shape, skips, dtype, layout)


@pytest.mark.parametrize("layout", ("contiguous", "channels_last"))
@pytest.mark.parametrize("dtype", (F32, BF16), ids=cases.name)
def test_patch_embed(dtype: torch.dtype, layout: str) -> None:
    for shape in PATCH:
        check_patch_embed(EMULATED, shape, dtype, layout)


def test_products_of_16_bits_need_no_pass_for_statistics() -> None:
    passes = SimpleNamespace(**{**vars(EMULATED), "training_moments": None, "training_sums": None})
    check_pointwise(passes, POINTWISE[0], 2, BF16, "contiguous")
    check_patch_embed(passes, PATCH[0], BF16, "contiguous")


def test_who_multiplies(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ours in 16 bits, but where tensor cores want tcgen05; torch in float32 and around Triton's passes."""
    with torch._subclasses.FakeTensorMode(allow_non_fake_inputs=True):
        x = torch.empty(1, 1, 1, 1, device="cuda", dtype=BF16)
    for major, ours in ((8, True), (9, True), (10, False), (11, False), (12, True)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device, major=major: (major, 0))
        training_products._mma_has_its_rate.cache_clear()
        assert training_products._is_ours(torch.ops.cmx, x) == ours
        assert not training_products._is_ours(torch.ops.cmx_triton, x)
    training_products._mma_has_its_rate.cache_clear()
    assert not training_products._is_ours(torch.ops.cmx, torch.empty(1))


ROWS = (
    ((3, 5, 7, 9), "gelu"),
    ((2, 70, 4, 8), "relu"),
    ((300, 2, 2, 2), "gelu_tanh"),
    ((1, 6, 3, 3), "none"),
    ((5, 12, 2, 6), "gelu"),  # a unit of 16 bytes and a half, in accesses of 8
    ((40, 72, 4, 10), "gelu"),  # several images on, in whole units
)


@pytest.mark.parametrize(("shape", "act"), ROWS, ids=cases.name)
@pytest.mark.parametrize("dtype", (F32, BF16), ids=cases.name)
@pytest.mark.parametrize("layout", ("contiguous", "channels_last"))
def test_passes(
    layout: str, dtype: torch.dtype, shape: tuple[int, ...], act: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Sizes around the units of 16 bytes; any order of threads gives the same bits."""
    first = check_passes(EMULATED, shape, dtype, act, layout)
    for order in (1, 2):
        monkeypatch.setattr(emulated_training, "ORDER", order)
        for out, same in zip(check_passes(EMULATED, shape, dtype, act, layout), first, strict=True):
            check_equal(out, same)


@pytest.mark.parametrize("layout", ("contiguous", "channels_last"))
def test_opcheck(layout: str) -> None:
    x, affine = problems.normal(2, 3, 4, 5).float(), problems.rows(3, 3)
    x, wide = last(x) if layout == "channels_last" else x, problems.normal(6, 3, 1, 1).float()
    for name, args in (
        ("training_sum", (x, affine, x, None, "gelu")),
        ("training_gradient", (x, x, problems.rows(4, 3), "gelu")),
        ("training_moments", (x, "relu")),
        ("training_product", (x, problems.normal(6, 3, 2, 2).float(), None, "gelu", layout != "channels_last")),
        ("training_product_sums", (problems.normal(2, 6, 4, 5).float(), wide, x, affine, "gelu")),
        ("training_sums", (x, x, affine, "none")),
    ):
        operator = getattr(torch.ops.cmx, name).default
        found = torch.library.opcheck(operator, args, test_utils=("test_schema", "test_faketensor"))
        assert set(found.values()) == {"SUCCESS"}, name
