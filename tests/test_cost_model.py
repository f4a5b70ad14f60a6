"""The cost model of the CUDA kernels: floors from first principles, a plan that fits for every shape."""

import cases
import pytest
import torch

from cmx_kernels import cost_model, registry

pytestmark = pytest.mark.skipif(registry.C is None, reason=str(registry.WHY_NO_C))
SHARED = {"H200": 227, "H100": 227, "A100": 163, "L40S": 99, "RTX 4090": 99}  # KB a block may have


def test_floor() -> None:
    """x read and y written once, over the bandwidth."""
    p = cost_model.depthwise("H200", (64, 1536, 32, 32), (9, 9))
    elements = 64 * 1536 * 32 * 32
    assert p.bytes == 2 * (2 * elements + 1536 * 81)
    assert p.flop == 2 * 81 * elements
    assert p.floor_us == pytest.approx(p.bytes / 4.3e6)
    assert p.predicted_us >= p.floor_us
    assert p.kernel == "mma_plane"


@pytest.mark.parametrize("gpu", SHARED)
def test_every_shape_has_a_plan(gpu: str) -> None:
    assert gpu in cost_model.gpus()
    for n, c, h, w, kh, kw in (shape for shape in cases.DEPTHWISE if shape[0]):
        for dtype in cost_model.DTYPES:
            for last in (False, True):
                p = cost_model.depthwise(gpu, (n, c, h, w), (kh, kw), dtype, channels_last=last)
                assert p.blocks > 0
                assert 0 < p.threads <= 256
                assert p.shared_bytes <= SHARED[gpu] << 10
                assert p.kernel == "ffma" or dtype != "float32"


def test_float32_reaches_the_pipes() -> None:
    """Instructions take at most 1 / 0.7 of the floor, the bytes, or an FFMA for every tap, 128 a cycle, were every
    issue slot filled; of an H200's, 0.74 are."""
    n, c, size = 64, 1536, 32
    for k in (7, 9):
        p = cost_model.depthwise("H200", (n, c, size, size), (k, k), "float32")
        pipes_us = n * c * size**2 * k**2 / (132 * 128 * 1.755e3)
        assert p.kernel == "ffma"
        assert max(p.floor_us, pipes_us) >= 0.7 * 0.74 * p.issue_us


def test_unknown_gpu() -> None:
    with pytest.raises(ValueError, match="gpu: got 'Voodoo'"):
        cost_model.depthwise("Voodoo", (1, 1, 1, 1), (1, 1))


def test_depthwise_without_tensor_cores() -> None:
    """Where FFMA keeps up with memory: Ada, up to 9x9, and not Hopper or Ampere's server chip."""
    for gpu, kernel in (("RTX 4090", "ffma"), ("L40S", "ffma"), ("A100", "mma_plane"), ("H200", "mma_plane")):
        assert cost_model.depthwise(gpu, (64, 1536, 32, 32), (9, 9)).kernel == kernel


def test_depthwise_channels_last() -> None:
    """Tensor cores where FFMA does not keep up with memory; 16 channels a block where two of them fit."""
    for gpu, *kernels in (
        ("RTX 4090", "ffma", "mma_last"),
        ("L40S", "ffma", "ffma"),
        ("A100", "mma_last", "mma_last"),
        ("H200", "mma_last", "mma_last"),
    ):
        p = [cost_model.depthwise(gpu, (64, 1536, 32, 32), (k, k), channels_last=True) for k in (7, 9)]
        assert [one.kernel for one in p] == kernels
        assert p[1].floor_us == pytest.approx(cost_model.depthwise(gpu, (64, 1536, 32, 32), (9, 9)).floor_us)
    assert cost_model.depthwise("H200", (64, 768, 32, 32), (7, 7), channels_last=True).threads == 256
    assert cost_model.depthwise("A100", (64, 768, 32, 32), (7, 7), channels_last=True).threads == 128
    assert cost_model.depthwise("H200", (64, 768, 32, 32), (7, 7), "float32", channels_last=True).kernel == "ffma"


def test_depthwise_backward() -> None:
    """Three tensors read, one written; tensor cores for the ConvMixers where FFMA does not keep up with memory."""
    elements = 64 * 1536 * 32 * 32
    for gpu, kernel in (("RTX 4090", "ffma"), ("L40S", "ffma"), ("A100", "mma"), ("H200", "mma"), ("H100", "mma")):
        p = cost_model.depthwise_backward(gpu, (64, 1536, 32, 32), (9, 9))
        assert p.bytes == 2 * (4 * elements + 1536 * 81)
        assert p.flop == 4 * 81 * elements
        assert p.kernel == kernel
        assert p.predicted_us >= p.floor_us
        both = [cost_model.depthwise_backward(gpu, (64, 1536, 32, 32), (9, 9), kernel=k) for k in ("ffma", "mma")]
        assert p == both[kernel == "mma"]
        assert p.predicted_us == min(b.predicted_us for b in both)
    for n, c, h, w, kh, kw in (shape for shape in cases.DEPTHWISE if shape[0]):
        for dtype in cost_model.DTYPES:
            for last in (False, True):
                p = cost_model.depthwise_backward("H200", (n, c, h, w), (kh, kw), dtype, channels_last=last)
                assert p.blocks > 0
                assert p.kernel == "ffma" or (dtype != "float32" and p.relaid == (last and c > 1))
                where_they_lie = cost_model.depthwise_backward(
                    "H200", (n, c, h, w), (kh, kw), dtype, "gelu", last, "ffma"
                )
                assert p.predicted_us <= where_they_lie.predicted_us and not where_they_lie.relaid
    for gpu in cost_model.gpus():  # where taps bind FFMA on every GPU
        p = cost_model.depthwise_backward(gpu, (64, 384, 32, 32), (31, 31))
        last = cost_model.depthwise_backward(gpu, (64, 384, 32, 32), (31, 31), channels_last=True)
        assert (p.kernel, p.relaid, last.kernel, last.relaid) == ("mma", False, "mma", True), gpu
        assert p.predicted_us < last.predicted_us
    with pytest.raises(ValueError, match="kernel: the one asked for takes no shape"):
        cost_model.depthwise_backward("H200", (1, 1, 32, 32), (11, 11), "float32", kernel="mma")


def test_product() -> None:
    """Bytes and FLOP from first principles; large tiles for large batches, more blocks than multiprocessors for one.

    wgmma: on Hopper only, and where TMA takes the shape.
    """
    p = cost_model.product("H200", (64, 1536, 32, 32), 1536)
    assert p.flop == 2 * 64 * 1024 * 1536**2
    assert p.bytes == 2 * (2 * 64 * 1024 * 1536 + 1536**2)
    assert p.kernel == "wgmma"
    assert p.blocks == 132
    assert p.floor_us <= p.predicted_us
    assert cost_model.product("A100", (64, 1536, 32, 32), 1536).kernel == "128x128"
    assert cost_model.product("A100", (1, 768, 32, 32), 768).blocks >= 108
    for gpu in SHARED:
        for op in ("pointwise_block", "patch_embed"):
            for n, c_in, c_out, h, w, *patch in (shape for shape in cases.SHAPES[op] if shape[0]):
                for last in (False, True):
                    p = cost_model.product(gpu, (n, c_in, h, w), c_out, tuple(patch or (1, 1)), channels_last=last)
                    assert p.blocks > 0
                    assert p.shared_bytes <= SHARED[gpu] << 10
                    whole = p.unfolded if patch else c_in % 8 == 0
                    takes = whole and (c_out if last else h * w) % 8 == 0
                    assert p.kernel != "wgmma" or (takes and gpu in ("H200", "H100"))


def test_patches_are_unfolded() -> None:
    """For the ConvMixers, whose stems then run as 1x1 products do; not where planes are odd, or patches too large."""
    for last in (False, True):
        for c, size, p in ((1536, 32, 7), (768, 32, 7), (1024, 16, 14)):
            found = cost_model.product("H200", (64, 3, size * p, size * p), c, (p, p), channels_last=last)
            assert (found.kernel, found.unfolded) == ("wgmma", True)
            assert found.floor_us < found.predicted_us < 2.5 * found.floor_us
            training = cost_model.product("H200", (64, 3, size * p, size * p), c, (p, p), use="moments")
            assert not training.unfolded  # which brings its own
    assert not cost_model.product("H200", (64, 3, 49, 49), 768, (7, 7)).unfolded
    assert not cost_model.product("H200", (1, 256, 256, 256), 768, (16, 16)).unfolded
    image = torch.empty((64, 3, 224, 224), dtype=torch.bfloat16, device="meta")
    note = cost_model.product_note("NVIDIA H200", "patch_embed", image, (768, 3, 7, 7), "gelu")
    assert note == "patch_embed: unfolded, then wgmma"


@pytest.mark.parametrize(
    ("shape", "note"),
    (
        ((64, 768, 32, 32), "pointwise_block: wgmma"),
        (
            (1, 768, 16, 16),
            "pointwise_block: mma.sync 64x32, not wgmma: predicted to be slower for so few pixels and channels",
        ),
        (
            (64, 768, 7, 7),
            "pointwise_block: mma.sync 64x64, not wgmma: patches, or pixels that TMA would have to gather",
        ),
    ),
)
def test_what_explain_says_of_a_product(shape: tuple[int, int, int, int], note: str) -> None:
    x = torch.empty(shape, dtype=torch.bfloat16, device="meta")
    weight = (768, 768, 1, 1)
    assert cost_model.product_note("NVIDIA H200", "pointwise_block", x, weight, "gelu") == note
    assert "not wgmma" not in cost_model.product_note("NVIDIA L40S", "pointwise_block", x, weight, "gelu")
    assert cost_model.product_note("NVIDIA T4", "pointwise_block", x, weight, "gelu") == ""
    assert cost_model.product_note("NVIDIA H200", "pointwise_block", x.float(), weight, "gelu") == ""
