"""Strassen's products inside stacks of float32 blocks: where they are used, the error rule, no dependence on tiling."""

import os
import subprocess
import sys
from collections.abc import Iterator

import pytest
import torch
from compare import check_equal
from test_block_stack import F32, _check, _layers, _one_by_one
from torch import Tensor

from cmx_kernels import ConvMixer, registry
from cmx_kernels.ops import block_stack as stack

BF16, F16 = torch.bfloat16, torch.float16
WIDE = 512  # channels from which they are used
CASES = (  # a stem with few inputs and one that has enough; whole pairs, a last pixel without a partner, one pixel
    ((2, 3, 18, 14), WIDE, 2, (3, 3), (2, 2)),
    ((1, 3, 32, 48), WIDE, 1, (5, 4), (16, 16)),
    ((3, WIDE, 5, 7), WIDE, 1, (7, 7), None),
    ((1, WIDE, 1, 1), WIDE, 1, (3, 3), None),
    ((1, 640, 4, 6), 640, 1, (3, 3), None),
    ((0, WIDE, 4, 6), WIDE, 1, (3, 3), None),
)
needs_kernels = pytest.mark.skipif(registry.C is None, reason=str(registry.WHY_NO_C))


@pytest.fixture(autouse=True)
def as_before() -> Iterator[None]:
    before = registry.packing()[1]
    yield
    if registry.C is not None:
        registry.C.allow_strassen(before)


def _product_bytes(packed: stack.PackedStack) -> int:
    last = packed.tensors[-2]
    return last.numel() * last.element_size()


def _both(x: Tensor, layers: object, act: str = "gelu") -> tuple[Tensor, Tensor]:
    """With and without, each on weights packed for it."""
    results = []
    for allowed in (True, False):
        registry.C.allow_strassen(allowed)
        results.append(stack.block_stack(x, stack.pack(*layers, act, x.dtype)))
    return results[0], results[1]


@pytest.mark.parametrize("allowed", (True, False), ids=("strassen", "plain"))
@pytest.mark.parametrize("dtype", (F32, F16, BF16), ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_error_rule(isa: str, case: tuple, dtype: torch.dtype, allowed: bool) -> None:
    registry.C.allow_strassen(allowed)
    for layout in (torch.contiguous_format, torch.channels_last):
        _check(torch.randn(case[0]).to(dtype, memory_format=layout), _layers(case, dtype))


def test_where_it_is_used(isa: str) -> None:
    """From 512 channels on, where vectors multiply float32; 7/4 of the memory, other bits."""
    for channels in (WIDE // 2, WIDE, WIDE + 8):
        for dtype in (F32, F16, BF16):
            case = ((1, channels, 4, 6), channels, 1, (3, 3), None)
            layers = _layers(case, dtype)
            x = torch.randn(case[0]).to(dtype)
            registry.C.allow_strassen(False)
            plain = _product_bytes(stack.pack(*layers, "gelu", dtype))
            registry.C.allow_strassen(True)
            wanted = channels == WIDE and isa != "amx" and not (dtype == BF16 and isa == "avx512bf16")
            assert _product_bytes(stack.pack(*layers, "gelu", dtype)) == (plain * 7 // 4 if wanted else plain)
            if dtype == F32:
                assert torch.equal(*_both(x, layers)) != wanted


def test_as_exact_as_without(isa: str) -> None:
    """Shorter runs make up for larger terms: root mean squares of the errors; in runs of 256 it would be 1.6 times."""
    case = ((1, 768, 8, 8), 768, 2, (3, 3), None)
    x, layers = torch.randn(case[0]), _layers(case, F32)
    ref = _one_by_one(x, layers, "relu", False, torch.float64, torch.float64)
    strassen, plain = ((y.double() - ref).square().mean().sqrt().item() for y in _both(x, layers, "relu"))
    assert strassen <= 1.3 * plain, f"{strassen:.3g}, {plain:.3g} without"


def test_threads_and_batches(isa: str) -> None:
    """Bit-equal for any number of threads and any batch: pairs of pixels are the image's, not the band's."""
    for size in ((5, 9), (6, 4)):
        case = ((3, WIDE, *size), WIDE, 2, (3, 3), None)
        x, packed = torch.randn(case[0]), stack.pack(*_layers(case, F32), "gelu", F32)
        torch.set_num_threads(1)
        alone = stack.block_stack(x, packed)
        for threads in (2, 3, 7):
            torch.set_num_threads(threads)
            check_equal(stack.block_stack(x, packed), alone, f"{threads} threads")
        check_equal(stack.block_stack(x[1:2], packed), alone[1:2], "an image by itself")


def test_memory_is_not_reused(isa: str) -> None:
    """The last pixel of an odd number has zeros as partner, not what a larger image left there."""
    torch.set_num_threads(1)
    packed = stack.pack(*_layers(CASES[2], F32), "gelu", F32)
    x = torch.randn(CASES[2][0])
    wanted = stack.block_stack(x, packed)
    assert stack.block_stack(torch.full((1, WIDE, 6, 7), torch.nan), packed).isnan().all()
    check_equal(stack.block_stack(x, packed), wanted)


@pytest.mark.parametrize("value", (torch.inf, -torch.inf, torch.nan), ids=str)
def test_nonfinite_values_stay_in_their_pixel(isa: str, value: float) -> None:
    """As in eager, and not in the other pixel of a pair: first, second, the one without a partner; both halves."""
    case = ((3, WIDE, 5, 7), WIDE, 1, (1, 1), None)
    x, layers = torch.randn(case[0]), _layers(case, F32)
    wanted, _ = _both(x, layers, "relu")
    x[0, 3].view(-1)[16] = x[1, -1].view(-1)[17] = x[2, 3].view(-1)[34] = value
    (strassen, plain), there = _both(x, layers, "relu"), torch.zeros(3, 5 * 7, dtype=torch.bool)
    there[0, 16] = there[1, 17] = there[2, 34] = True
    assert torch.equal(plain.flatten(2).isfinite().all(1), ~there)
    same = lambda y: torch.nan_to_num(y.flatten(2).movedim(1, 2)[there], 0.0, 1e30, -1e30)  # noqa: E731
    torch.testing.assert_close(same(strassen), same(plain), rtol=0.0, atol=0.0)
    rest = strassen.flatten(2).movedim(1, 2)[~there]
    torch.testing.assert_close(rest, wanted.flatten(2).movedim(1, 2)[~there], rtol=1e-5, atol=1e-4)


@pytest.fixture
def vectors(isa: str) -> None:
    if isa == "amx":
        pytest.skip("float32 is multiplied by tiles there, never by Strassen's products")


@pytest.mark.usefixtures("vectors")
def test_other_weights_are_refused(isa: str) -> None:
    """What was packed with them does not run without, and the other way round."""
    case = CASES[2]
    for allowed in (True, False):
        registry.C.allow_strassen(allowed)
        packed = stack.pack(*_layers(case, F32), "gelu", F32)
        registry.C.allow_strassen(not allowed)
        with pytest.raises(RuntimeError, match=r"packed: got .* bytes for a pointwise weight"):
            stack.block_stack(torch.randn(case[0]), packed)


@pytest.mark.usefixtures("vectors")
def test_model_follows_the_switch(isa: str) -> None:
    net = ConvMixer(WIDE, 1, kernel_size=3, patch_size=4, n_classes=5).eval()
    x = torch.randn(2, 3, 16, 16)
    outputs = []
    for allowed in (True, False, True):
        registry.C.allow_strassen(allowed)
        with torch.no_grad():
            outputs.append(net(x))
    check_equal(outputs[2], outputs[0])
    assert not torch.equal(outputs[1], outputs[0])


@needs_kernels
@pytest.mark.parametrize(("given", "allowed"), (("0", "False"), ("1", "True"), (None, "True")))
def test_environment(given: str | None, allowed: str) -> None:
    environment = {k: v for k, v in os.environ.items() if k != "CMX_STRASSEN"}
    environment |= {} if given is None else {"CMX_STRASSEN": given}
    code = "from cmx_kernels import registry; print(registry.packing()[1])"
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert (done.stdout.strip(), done.returncode) == (allowed, 0), done.stderr
