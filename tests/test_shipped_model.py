"""The trained ConvMixer of the package: what classify uses when no model is named."""

import copy
import json
import os
import tarfile
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
ROOT = Path(__file__).resolve().parent.parent
SIDE = 32
# CIFAR-10 as train_cifar10.py's --data takes it, or an archive of that, with the test set alone unpacked here
FOUND = [os.environ.get("CMX_CIFAR10"), *sorted(map(str, ROOT.parent.glob("shared/data/*cifar10*.tar.gz")))]
shipped = pytest.mark.skipif(
    not classify.SHIPPED.is_file(),
    reason="no trained weights are shipped in this version (examples/publish_cifar10.py makes them)",
)


def crops() -> Tensor:
    """Pieces of photographs at three scales, normalised [N, 3, 32, 32]."""
    data = pytest.importorskip("skimage.data")
    found = []
    for name in ("chelsea", "coffee", "rocket", "astronaut"):
        photo = torch.from_numpy(getattr(data, name)().copy()).permute(2, 0, 1)[None].float() / 255
        for size in (64, 96, 192):
            small = torch.nn.functional.interpolate(photo, (size, size), mode="area")
            found.append(
                small.unfold(2, SIDE, SIDE).unfold(3, SIDE, SIDE).permute(0, 2, 3, 1, 4, 5).reshape(-1, 3, 32, 32)
            )
    mean, std = (torch.tensor(v)[:, None, None] for v in (classify.CIFAR.mean, classify.CIFAR.std))
    return (torch.cat(found) - mean) / std


@shipped
@torch.no_grad()
def test_fused_sees_what_plain_sees() -> None:
    """Every top-1 in float32; bfloat16 flips no more of them than plain bfloat16 does, to 0.5 %."""
    images = crops()
    fused = classify.load_shipped()
    plain = unfuse(copy.deepcopy(fused))
    wanted = plain(images).argmax(1)
    assert len(wanted.unique()) > 5
    assert torch.equal(fused(images).argmax(1), wanted)
    flips = [(m.bfloat16()(images.bfloat16()).argmax(1) != wanted).double().mean() for m in (fused, plain)]
    assert flips[0] <= flips[1] + 0.005
    assert classify.SHIPPED.stat().st_size <= 3_000_000


def test_the_accuracy_is_recorded() -> None:
    """On the whole test set, in the run that wrote the weights: bfloat16 within 0.1 point."""
    if not classify.SHIPPED.is_file():
        pytest.skip("no trained weights are shipped in this version (examples/publish_cifar10.py makes them)")
    record = json.loads((ROOT / "examples" / "cifar10_curves.json").read_text())
    assert record["accuracy"] >= 0.7 and abs(record["bfloat16"] - record["accuracy"]) <= 0.001


@shipped
@torch.no_grad()
def test_accuracy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same on a fifth of the test set: fused and plain agree on each, bfloat16 is as often right, to 0.1 point."""
    place = next(filter(None, FOUND), None)
    if place is None or not (ROOT / "examples").is_dir():
        pytest.skip("no CIFAR-10 at hand (CMX_CIFAR10=FOLDER); the stored accuracy and the photographs are tested")
    if place.endswith(".tar.gz"):
        with tarfile.open(place) as archive:
            archive.extractall(tmp_path, [m for m in archive if m.name.split("/")[0] != "train"], filter="data")
        place = str(tmp_path)
    monkeypatch.syspath_prepend(ROOT / "examples")
    import cifar10

    pixels, labels = (part[::5] for part in cifar10.load(place, "test"))
    assert len(labels) >= 1000
    fused = classify.load_shipped()
    models = {"fused": fused, "plain": unfuse(copy.deepcopy(fused)), "bfloat16": copy.deepcopy(fused).bfloat16()}
    found = {
        name: torch.cat(
            [model(part.to(model.head.weight.dtype)).argmax(1) for part in cifar10.normalised(pixels).split(500)]
        )
        for name, model in models.items()
    }
    assert torch.equal(found["fused"], found["plain"])
    accuracy, low = (float((found[name] == labels).double().mean()) for name in ("fused", "bfloat16"))
    assert accuracy >= 0.7 and abs(low - accuracy) <= 0.001, (accuracy, low)


@shipped
def test_by_default(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Image.new("RGB", (SIDE, SIDE), (90, 140, 210)).save(tmp_path / "x.png")
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
