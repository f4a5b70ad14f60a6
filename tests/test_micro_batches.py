"""What the cost model says of micro-batches: where they pay, how many images they have."""

from types import SimpleNamespace

import pytest
import torch
from plain_models import needs_kernels, trained
from torch._subclasses.fake_tensor import FakeTensorMode

from cmx_kernels import ConvMixer, micro_batches
from cmx_kernels.ops import depth_first

pytestmark = needs_kernels
NETS = ((1536, 20, 9, 32), (768, 32, 7, 32), (1024, 20, 9, 16), (512, 16, 8, 32))  # channels, depth, kernel, side


def predict(gpu: str, n: int, net: tuple[int, ...] = NETS[1], dtype: str = "bfloat16") -> micro_batches.MicroBatch:
    c, depth, k, side = net
    return micro_batches.predict(gpu, (n, c, side, side), depth, (k, k), dtype)


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("net", NETS, ids=str)
def test_where_they_pay(net: tuple[int, ...], dtype: str) -> None:
    """Nowhere where the memory is nearly as fast as L2; where it is much slower, and the products do not hide it."""
    for n in (0, 1, 8, 64, 256):
        for gpu in ("H200", "H100", "A100"):
            assert not predict(gpu, n, net, dtype).pays
    assert predict("L40S", 64, net, dtype).pays
    assert predict("RTX 4090", 64, net, dtype).pays == (dtype == "float32" or net[0] != 1536)


@pytest.mark.parametrize("gpu", micro_batches.L2)
def test_two_activations_and_the_weights_fit(gpu: str) -> None:
    for c, depth, k, side in NETS:
        best = predict(gpu, 64, (c, depth, k, side))
        taken = 2 * (2 * best.images * c * side * side + c * c + c * k * k)
        assert best.images == 64 or taken <= micro_batches.SHARE * micro_batches.L2[gpu].mib * 2**20
        assert (
            best.us >= depth * 4 * 2 * 64 * c * side * side / micro_batches.L2[gpu].tb_per_s * 1e-6 or best.images == 64
        )
    assert predict(gpu, 1).images == 1, "an image is not divided"
    assert predict(gpu, 0) == (0, 0, 0)
    assert predict(gpu, 64, (4096, 2, 3, 64)).images == 64, "not even one image fits"


def test_the_host_counts() -> None:
    """Kernels that are over before the next one is launched gain nothing from L2."""
    call = "L40S", (64, 512, 32, 32), 8, (5, 5), "float32"
    assert micro_batches.predict(*call).pays
    best = micro_batches.predict(*call, host_us=1000)
    assert not best.pays
    assert best.whole_us == 2 * 8 * 1000


def test_what_is_asked_of_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Shape, dtype and device decide, without memory; a GPU, dtype or activation that is not known: all."""
    names = iter(("RTX 4090", None, "RTX 4090", "RTX 4090", "H200"))
    monkeypatch.setattr(depth_first, "_gpu", lambda device: next(names))
    with FakeTensorMode():
        y = torch.empty(64, 768, 32, 32, dtype=torch.bfloat16, device="meta")
        wanted = predict("RTX 4090", 64).images
        assert 1 < wanted < 64
        assert depth_first.images(y, 32, (7, 7), "gelu") == wanted
        assert depth_first.images(y, 32, (7, 7), "gelu") == 64
        assert depth_first.images(y.double(), 32, (7, 7), "gelu") == 64
        assert depth_first.images(y, 32, (7, 7), "silu") == 64
        assert depth_first.images(y, 32, (7, 7), "gelu") == 64


def test_both_ways_to_ask_for_tf32(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the newer one was used, PyTorch refuses to answer by the older."""
    monkeypatch.setattr(depth_first, "_gpu", lambda device: "RTX 4090")
    monkeypatch.setattr(micro_batches, "predict", lambda *args: asked.append(args[-1]) or SimpleNamespace(pays=False))
    asked: list[object] = []
    y = torch.empty(64, 768, 32, 32, device="meta")
    before = torch.backends.cudnn.conv.fp32_precision
    try:
        for precision in ("ieee", "tf32"):
            torch.backends.cudnn.conv.fp32_precision = precision
            assert depth_first.images(y, 32, (7, 7), "gelu") == 64
    finally:
        torch.backends.cudnn.conv.fp32_precision = before
    assert asked == [micro_batches.STRICT, micro_batches.TF32]


@torch.no_grad()
def test_what_a_network_asks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of images on a GPU, whose activations take the layout of the images; never on a CPU, unless it is told to."""
    monkeypatch.setattr(depth_first, "_gpu", lambda device: "L40S")
    net = trained(ConvMixer(768, 32, 7, 7, 10, device="meta"))
    call = "L40S", (64, 768, 32, 32), 32, (7, 7), "bfloat16", "gelu"
    with FakeTensorMode():
        for layout in (torch.contiguous_format, torch.channels_last):
            x = torch.empty(64, 3, 224, 224, dtype=torch.bfloat16, device="cuda", memory_format=layout)
            m, y = net.stack().micro_batch_of(x)
            wanted = micro_batches.predict(*call, channels_last=layout == torch.channels_last).images
            assert 1 < wanted < 64
            assert (m, y.shape, y.dtype, y.device) == (wanted, (64, 768, 32, 32), x.dtype, x.device)
            assert y.is_contiguous(memory_format=layout)
        assert net.stack().micro_batch_of(x.cpu()) is None
        net.micro_batch = 0
        assert net.stack().micro_batch_of(x)[0] == 64
        assert net.stack().micro_batch_of(x.cpu()) is None
        net.micro_batch = 5
        assert net.stack().micro_batch_of(x.cpu())[0] == 5
