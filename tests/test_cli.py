"""python -m cmx_kernels: info, explain, bench, classify."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from plain_models import NATIVE, trained
from torch import nn

from cmx_kernels import bench, convert_state_dict, create_model
from cmx_kernels.__main__ import main
from cmx_kernels.classify import CIFAR, IMAGENET, classify, read_image
from cmx_kernels.models.variants import CIFAR10

Image = pytest.importorskip("PIL.Image")
pytestmark = pytest.mark.filterwarnings("ignore:cmx_kernels")


def picture(path: Path, size: tuple[int, int] = (70, 50), mode: str = "RGB") -> Path:
    pixels = torch.randint(0, 256, (size[1], size[0], 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    Image.fromarray(pixels.numpy()).convert(mode).save(path)
    return path


def test_info(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["info"]) == 0
    out = capsys.readouterr().out
    assert torch.__version__ in out
    for word in ("isa_level", "backends", "cuda", "missing"):
        assert word in out


@pytest.mark.parametrize("flags", [[], ["--dtype", "bf16", "--batch", "2"], ["--size", "64"]])
def test_explain(flags: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["explain", "256/8_p2", *flags]) == 0
    out = capsys.readouterr().out
    assert "blocks.0-7" in out
    assert ("no refusals" in out) == NATIVE


def test_bench(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "256/8_p2", "convmixer_256_8_ks9_p1", "--size", "8", "--rounds", "2"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines[1:]] == ["convmixer_256_8_ks5_p2", "convmixer_256_8_ks9_p1"]
    assert "images/s" in lines[1] and "logits differ by" in lines[1]


def test_bench_without_a_model_is_the_suite(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setattr(bench, "__file__", str(tmp_path / "cmx_kernels" / "bench.py"))
    assert main(["bench"]) == 2
    assert "make bench" in capsys.readouterr().err
    (tmp_path / "benchmarks").mkdir()
    (tmp_path / "benchmarks" / "conftest.py").touch()
    (tmp_path / "benchmarks" / "test_it.py").write_text("def test_it(benchmark): benchmark(lambda: None)")
    assert main(["bench"]) == 0


def test_bench_gives_no_figure_for_wrong_results(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(nn.Linear, "forward", lambda self, x: torch.rand(len(x), self.out_features))
    assert main(["bench", "256/8_p2", "--size", "8", "--rounds", "1"]) == 2
    captured = capsys.readouterr()
    assert "differ" in captured.err and "images/s" not in captured.out


@pytest.mark.parametrize("size", [(70, 50), (50, 70), (333, 500), (224, 224), (8, 300)])
@pytest.mark.parametrize("mode", ["RGB", "L", "RGBA", "P", "CMYK"])
def test_preprocessing_is_timms(tmp_path: Path, size: tuple[int, int], mode: str) -> None:
    factory = pytest.importorskip("timm.data")
    path = picture(tmp_path / ("x.tif" if mode == "CMYK" else "x.png"), size, mode)
    for how, kw in (
        (IMAGENET, {"input_size": 224, "crop_pct": 0.96}),
        (CIFAR, {"input_size": 32, "crop_pct": 1.0, "mean": CIFAR.mean, "std": CIFAR.std}),
    ):
        transform = factory.create_transform(interpolation="bicubic", is_training=False, **kw)
        wanted = transform(Image.open(path).convert("RGB"))
        torch.testing.assert_close(read_image(path, how)[0], wanted, rtol=0, atol=1e-5)


@pytest.mark.parametrize("to", ["timm", "paper"])
def test_classify(to: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    image = picture(tmp_path / "x.jpg")
    model = trained(create_model("256/8_p2", fused=False))
    weights = tmp_path / "w.pth"
    torch.save({"state_dict": convert_state_dict(model.state_dict(), to)}, weights)
    assert main(["classify", str(image), "--model", "256/8_p2", "--checkpoint", str(weights)]) == 0
    captured = capsys.readouterr()
    with torch.no_grad():
        wanted = model(read_image(image, CIFAR))[0].softmax(0)
    lines = [line.split() for line in captured.out.splitlines()]
    assert [CIFAR10.index(name) for _, name in lines] == wanted.topk(5).indices.tolist()
    assert [float(p[:-1]) for p, _ in lines] == pytest.approx(
        [100 * p for p in wanted.topk(5).values.tolist()], abs=0.006
    )
    assert not captured.err


def test_classes_of_other_checkpoints(tmp_path: Path) -> None:
    image = picture(tmp_path / "x.png")
    torch.save(create_model("256/8_p2", num_classes=3).state_dict(), tmp_path / "w.pth")
    best = classify(image, "256/8_p2", tmp_path / "w.pth")
    assert sorted(name for name, _ in best) == ["class 0", "class 1", "class 2"]
    assert sum(p for _, p in best) == pytest.approx(1)


def test_names_of_imagenet() -> None:
    pytest.importorskip("timm.data")
    from cmx_kernels.classify import class_names
    from cmx_kernels.models.variants import find_variant

    names = class_names(find_variant("768/32"), 1000)
    assert "tabby" in names[281]
    assert class_names(find_variant("768/32"), 7)[5] == "class 5"


def test_random_weights_are_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["classify", str(picture(tmp_path / "x.png")), "--model", "256/8_p2"]) == 0
    captured = capsys.readouterr()
    assert "weights are random" in captured.err
    assert len(captured.out.splitlines()) == 5


def test_bad_input_is_one_sentence_and_exit_code_2(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    image = picture(tmp_path / "good.jpg", (400, 300))
    truncated = tmp_path / "truncated.jpg"
    truncated.write_bytes(image.read_bytes()[:4000])
    (tmp_path / "text.jpg").write_text("no image")
    (tmp_path / "empty.png").touch()
    torch.save(create_model("256/8_p1").state_dict(), tmp_path / "other.pth")
    (tmp_path / "bad.pth").write_bytes((tmp_path / "other.pth").read_bytes()[:5000])
    model = ["--model", "256/8_p2"]
    for args, says in (
        ([str(tmp_path / "none.jpg"), *model], "is missing"),
        ([str(tmp_path), *model], "a folder"),
        ([str(truncated), *model], "truncated"),
        ([str(tmp_path / "text.jpg"), *model], "no image"),
        ([str(tmp_path / "empty.png"), *model], "no image"),
        ([str(image), "--model", "resnet"], "no published ConvMixer"),
        ([str(image), *model, "--checkpoint", str(tmp_path / "bad.pth")], "truncated"),
        ([str(image), *model, "--checkpoint", str(tmp_path / "none.pth")], "missing"),
        ([str(image), *model, "--checkpoint", str(tmp_path / "other.pth")], "9x9 kernels"),
    ):
        assert main(["classify", *args]) == 2, says
        lines = [line for line in capsys.readouterr().err.splitlines() if not line.startswith("warning")]
        assert len(lines) == 1 and lines[0].startswith("error: ") and says in lines[0], lines
    for args in (["explain", "none"], ["bench", "none"]):
        assert main(args) == 2
        assert "no published" in capsys.readouterr().err
    for args in ([], ["bench", "--batch", "x"], ["explain", "768/32", "--batch", "0"]):
        with pytest.raises(SystemExit) as exit_:
            main(args)
        assert exit_.value.code == 2


def test_as_a_program(tmp_path: Path) -> None:
    """Also without timm, Pillow or huggingface_hub: nothing of them is imported before it is needed."""
    code = (
        "import sys, cmx_kernels.__main__; print({'timm', 'PIL', 'huggingface_hub', 'safetensors'} & set(sys.modules))"
    )
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env, check=True).stdout
    assert out.strip() == "set()"
    command = [sys.executable, "-m", "cmx_kernels", "classify", str(tmp_path / "none.png"), "--model", "512/16"]
    done = subprocess.run(command, capture_output=True, text=True, env=env)
    assert done.returncode == 2
    assert "Traceback" not in done.stderr and "is missing" in done.stderr
