"""State dicts and files of weights: the keys of timm and of the paper, wrappers, and what is wrong with a bad one."""

import argparse
import collections
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from plain_models import check_against, paper, timms, trained
from torch import nn

from cmx_kernels import ConvMixer, convert_state_dict, create_model, fuse, load_checkpoint

SIZES = (16, 2, 3, 4, 5)
X = torch.randn(1, 3, 12, 16, generator=torch.Generator().manual_seed(2))


class Dangerous:
    def __reduce__(self) -> Any:
        return print, ("code ran",)


@pytest.mark.parametrize("depth", [1, 2, 12])
def test_round_trip_between_the_layouts(depth: int) -> None:
    theirs, flat = timms(16, depth, 3, 4, 5).state_dict(), paper(16, depth, 3, 4, 5).state_dict()
    to_paper, to_timm = convert_state_dict(theirs, "paper"), convert_state_dict(flat, "timm")
    assert list(to_paper) == list(flat)
    assert list(to_timm) == list(theirs)
    for start, there in ((theirs, to_paper), (flat, to_timm)):
        back = convert_state_dict(there, "timm" if start is theirs else "paper")
        assert all(back[key] is start[key] for key in start)
    for state, to in ((theirs, "timm"), (flat, "paper")):
        assert list(convert_state_dict(state, to)) == list(state)
    headless = {key: value for key, value in theirs.items() if not key.startswith("head")}
    assert list(convert_state_dict(convert_state_dict(headless, "paper"), "timm")) == list(headless)


@pytest.mark.parametrize(
    ("change", "to", "says"),
    [
        (lambda s: s, "onnx", "to: got 'onnx'"),
        (lambda s: {}, "timm", "got the keys none"),
        (lambda s: {"conv1.weight": s["0.weight"]}, "timm", "got the keys conv1.weight"),
        (lambda s: s | {"extra.weight": s["0.weight"]}, "timm", "got the key extra.weight"),
        (lambda s: s | {"9.weight": s["0.weight"]}, "timm", "got the key 9.weight, wanted the classifier at 7"),
    ],
)
def test_what_cannot_be_converted(change: Callable[[Any], Any], to: str, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        convert_state_dict(change(dict(paper(*SIZES).state_dict())), to)


WRAPPED: dict[str, Callable[[Any], Any]] = {
    "bare": lambda s: s,
    "state_dict": lambda s: {"epoch": 3, "state_dict": s, "optimizer": {"state": {}}},
    "model": lambda s: {"model": s},
    "the average first": lambda s: {"state_dict": {k: v * 0 for k, v in s.items()}, "state_dict_ema": s},
    "DataParallel": lambda s: {f"module.{k}": v for k, v in s.items()},
    "compiled DataParallel in a wrapper": lambda s: {"state_dict": {f"module._orig_mod.{k}": v for k, v in s.items()}},
    "an old file": lambda s: collections.OrderedDict((k, v) for k, v in s.items() if "num_batches" not in k),
}
TARGETS: dict[str, Callable[[], nn.Module]] = {
    "ours": lambda: ConvMixer(*SIZES),
    "ours, plain": lambda: ConvMixer(*SIZES, fused=False),
    "timm, fused": lambda: fuse(timms(*SIZES)),
    "paper, fused": lambda: fuse(paper(*SIZES)),
}


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("wrapper", WRAPPED)
@pytest.mark.parametrize("source", [timms, paper])
@torch.no_grad()
def test_load_state_dict_takes_all_of_them(source: Any, wrapper: str, target: str) -> None:
    plain = trained(source(*SIZES))
    model = TARGETS[target]().eval()
    result = model.load_state_dict(WRAPPED[wrapper](plain.state_dict()))
    assert not result.missing_keys and not result.unexpected_keys
    check_against(model(X), plain, X)


BAD: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "missing": (lambda s: {k: v for k, v in s.items() if k != "blocks.1.1.bias"}, r"Missing key.*blocks\.1\.1\.bias"),
    "unexpected": (lambda s: s | {"blocks.2.1.bias": s["stem.0.bias"]}, r"Unexpected key.*blocks\.2\.1\.bias"),
    "shape": (lambda s: s | {"head.bias": torch.zeros(7)}, r"size mismatch for head\.bias: got \[7\], wanted \[5\]"),
    "another model": (
        lambda s: timms(24, 3, 5, 2, 5).state_dict(),
        r"stem\.0\.weight: got \[24, 3, 2, 2\], wanted \[16, 3, 4, 4\].*ConvMixer-24/3 with 5x5 kernels, 2x2 patches",
    ),
    "no ConvMixer": (lambda s: nn.Linear(2, 2).state_dict(), "the checkpoint no ConvMixer"),
}


@pytest.mark.parametrize("target", ["ours", "timm, fused"])
@pytest.mark.parametrize("name", BAD)
def test_a_bad_state_dict_changes_nothing(name: str, target: str) -> None:
    model = TARGETS[target]()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    change, says = BAD[name]
    torch.manual_seed(5)
    with pytest.raises(RuntimeError, match=says):
        model.load_state_dict(change(dict(timms(*SIZES).state_dict())))
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    with pytest.raises(TypeError, match="wanted a dict"):
        model.load_state_dict("weights.pth")


def test_not_strict() -> None:
    model, other = ConvMixer(*SIZES), timms(*SIZES).state_dict()
    del other["head.bias"]
    result = model.load_state_dict({**other, "more": torch.ones(1)}, strict=False)
    assert (result.missing_keys, result.unexpected_keys) == (["head.bias"], ["more"])
    assert torch.equal(model.stem[0].weight, other["stem.0.weight"])
    with pytest.raises(RuntimeError, match="size mismatch"):
        model.load_state_dict({"head.bias": torch.zeros(7)}, strict=False)


def test_blocks_alone_keep_their_own_keys() -> None:
    """The keys of model.blocks look like the paper's, and are not."""
    model, other = ConvMixer(*SIZES), timms(*SIZES)
    model.blocks.load_state_dict(other.blocks.state_dict())
    assert torch.equal(model.blocks[1][1].weight, other.blocks[1][1].weight)


def save(model: nn.Module, path: Path) -> Path:
    """As timm's training script does, in the format that the name asks for."""
    if path.suffix == ".safetensors":
        pytest.importorskip("safetensors.torch").save_file(model.state_dict(), path)
    else:
        wrapped = {"state_dict": model.state_dict(), "args": argparse.Namespace(lr=0.1), "epoch": 1}
        torch.save(wrapped, path, _use_new_zipfile_serialization=path.name != "old.pt")
    return path


@pytest.mark.parametrize("name", ["w.pth", "w.pth.tar", "w.safetensors", "old.pt"])
@torch.no_grad()
def test_files(tmp_path: Path, name: str) -> None:
    plain = trained(timms(*SIZES))
    path = save(plain, tmp_path / name)
    assert load_checkpoint(path).keys() == plain.state_dict().keys()
    model = ConvMixer(*SIZES).eval()
    model.load_state_dict(load_checkpoint(str(path)))
    check_against(model(X), plain, X)


@pytest.mark.parametrize("name", ["w.pth", "w.safetensors", "old.pt"])
@pytest.mark.parametrize("keep", [0.0, 0.01, 0.5, 0.99])
def test_truncated_files(tmp_path: Path, name: str, keep: float) -> None:
    path = save(timms(*SIZES), tmp_path / name)
    data = path.read_bytes()
    path.write_bytes(data[: int(keep * len(data))])
    with pytest.raises(ValueError, match="is truncated or no") as error:
        load_checkpoint(path)
    assert str(path) in str(error.value)


def test_files_that_are_no_checkpoints(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "text.pth").write_text("<html>404</html>")
    torch.save([1, 2], tmp_path / "list.pth")
    torch.save({"epoch": 3}, tmp_path / "empty.pth")
    torch.save(torch.ones(3), tmp_path / "tensor.pth")
    torch.save({"state_dict": {"a": Dangerous()}}, tmp_path / "code.pth")
    for name, says in (
        ("text.pth", "no PyTorch checkpoint"),
        ("list.pth", "holds a list without weights"),
        ("empty.pth", "without weights"),
        ("tensor.pth", "holds a Tensor"),
        ("code.pth", "is not data"),
    ):
        with pytest.raises(ValueError, match=says):
            load_checkpoint(tmp_path / name)
    assert "code ran" not in capsys.readouterr().out
    for path in (tmp_path, tmp_path / "none.pth"):
        with pytest.raises(FileNotFoundError, match="checkpoint"):
            load_checkpoint(path)


def test_create_model_reads_files(tmp_path: Path) -> None:
    source = create_model("256/8_p2", fused=False)
    torch.save(convert_state_dict(source.state_dict(), "paper"), tmp_path / "w.pth")
    model = create_model("256/8_p2", checkpoint_path=tmp_path / "w.pth")
    assert torch.equal(model.head.weight, source.head.weight)
    with pytest.raises(RuntimeError, match="ConvMixer-256/8 with 9x9 kernels, 1x1 patches"):
        create_model("256/8_p1", checkpoint_path=tmp_path / "w.pth")


def test_released_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub = pytest.importorskip("huggingface_hub")
    save_file = pytest.importorskip("safetensors.torch").save_file
    source = create_model("768/32", fused=False)
    save_file(source.state_dict(), tmp_path / "model.safetensors")
    asked: list[tuple[str, ...]] = []
    monkeypatch.setattr(hub, "hf_hub_download", lambda *a: asked.append(a) or str(tmp_path / "model.safetensors"))
    model = create_model("768/32", pretrained=True)
    assert asked == [("timm/convmixer_768_32.in1k", "model.safetensors")]
    assert torch.equal(model.head.weight, source.head.weight)
    small = create_model("768/32", pretrained=True, num_classes=3, in_chans=1)
    assert small.head.weight.shape == (3, 768)
    torch.testing.assert_close(small.stem[0].weight, source.stem[0].weight.sum(1, keepdim=True))
    torch.testing.assert_close(small.blocks[31][1].weight, source.blocks[31][1].weight)

    def offline(*args: str) -> str:
        raise ConnectionError("no route to the hub\nand a long trace")

    monkeypatch.setattr(hub, "hf_hub_download", offline)
    with pytest.raises(RuntimeError, match=r"no route to the hub.*checkpoint_path="):
        create_model("768/32", pretrained=True)
    with pytest.raises(ValueError, match="no released weights"):
        create_model("512/16", pretrained=True)
    with pytest.raises(ValueError, match="one of the two"):
        create_model("768/32", pretrained=True, checkpoint_path=tmp_path / "model.safetensors")
