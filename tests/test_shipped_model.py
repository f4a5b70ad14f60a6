"""The trained ConvMixer of the package: what classify uses when no model is named."""

import copy
from pathlib import Path

import pytest
import torch
from plain_models import trained
from torch import Tensor

from cmx_kernels import ConvMixer, classify, unfuse
from cmx_kernels.__main__ import main
from cmx_kernels.models.variants import CIFAR10

Image = pytest.importorskip("PIL.Image")
save_file = pytest.importorskip("safetensors.torch").save_file
SHEET = Path(__file__).parent / "cifar10_sheet.png"
SIDE = 32
shipped = pytest.mark.skipif(
    not (classify.SHIPPED.is_file() and SHEET.is_file()),
    reason="no trained weights are shipped in this version (examples/publish_cifar10.py makes them)",
)


def photographs() -> tuple[Tensor, Tensor]:
    """Images of CIFAR-10's test set, normalised [N, 3, 32, 32], and their classes: a row of the sheet a class."""
    with Image.open(SHEET) as file:
        pixels = torch.frombuffer(bytearray(file.convert("RGB").tobytes()), dtype=torch.uint8)
        per_class = file.width // SIDE
    images = pixels.view(len(CIFAR10), SIDE, per_class, SIDE, 3).permute(0, 2, 4, 1, 3).reshape(-1, 3, SIDE, SIDE)
    mean, std = (torch.tensor(v)[:, None, None] for v in (classify.CIFAR.mean, classify.CIFAR.std))
    return (images.float() / 255 - mean) / std, torch.arange(len(CIFAR10)).repeat_interleave(per_class)


@shipped
@torch.no_grad()
def test_fused_sees_what_plain_sees() -> None:
    """Every top-1 in float32; in bfloat16 the accuracy within 0.1 point."""
    images, labels = photographs()
    fused = classify.load_shipped()
    plain = unfuse(copy.deepcopy(fused))
    wanted = plain(images).argmax(1)
    assert torch.equal(fused(images).argmax(1), wanted)
    accuracy = (wanted == labels).double().mean()
    assert accuracy >= 0.6, "at least 70 % of the whole test set"
    low = fused.bfloat16()(images.bfloat16()).argmax(1)
    assert abs((low == labels).double().mean() - accuracy) <= 0.001
    assert classify.SHIPPED.stat().st_size <= 3_000_000 and SHEET.stat().st_size <= 300_000


@shipped
def test_by_default(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Image.open(SHEET).crop((0, 0, SIDE, SIDE)).save(tmp_path / "x.png")
    assert main(["classify", str(tmp_path / "x.png")]) == 0
    captured = capsys.readouterr()
    assert len(captured.out.splitlines()) == 5 and not captured.err


@pytest.mark.filterwarnings("ignore:cmx_kernels")
@pytest.mark.parametrize("half", [False, True])
def test_any_size_of_model(half: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its size is read from the shapes of its weights."""
    model = trained(ConvMixer(16, 3, (3, 5), 4, 10))
    floats = {key: value for key, value in model.state_dict().items() if value.is_floating_point()}
    state = {**model.state_dict(), **{key: value.half() for key, value in floats.items() if half}}
    save_file(state, tmp_path / "w.safetensors")
    monkeypatch.setattr(classify, "SHIPPED", tmp_path / "w.safetensors")
    Image.new("RGB", (40, 50), (200, 10, 90)).save(tmp_path / "x.png")
    best = classify.classify(tmp_path / "x.png")
    model.load_state_dict(state)
    with torch.no_grad():
        wanted = model(classify.read_image(tmp_path / "x.png", classify.CIFAR))[0].softmax(0).topk(5)
    assert [name for name, _ in best] == [CIFAR10[i] for i in wanted.indices.tolist()]
    assert [p for _, p in best] == pytest.approx(wanted.values.tolist())


def test_what_is_missing_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    Image.new("RGB", (32, 32)).save(tmp_path / "x.png")
    monkeypatch.setattr(classify, "SHIPPED", tmp_path / "none.safetensors")
    for flags in ([], ["--pretrained"], ["--checkpoint", "w.pth"]):
        assert main(["classify", str(tmp_path / "x.png"), *flags]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith("error: --model: got none")
