"""examples/train_cifar10.py on a handful of synthetic images."""

import json
import os
import pickle
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from cmx_kernels.models.variants import CIFAR10

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"
if not EXAMPLES.is_dir():
    pytest.skip("these tests run from an installed package, without examples/", allow_module_level=True)
sys.path.insert(0, str(EXAMPLES))

import cifar10  # noqa: E402
import train_cifar10  # noqa: E402

Image = pytest.importorskip("PIL.Image")
pytestmark = pytest.mark.filterwarnings("ignore")
SMALL = ["--dim", "8", "--depth", "1", "--epochs", "3", "--batch-size", "16", "--augment", "light"]
SMALL += ["--device", "cpu", "--threads", "1"]


def draw(count: int, seed: int) -> np.ndarray:
    """[count, 32, 32, 3]; image i is of class i % 10, which its brightness tells."""
    noise = np.random.default_rng(seed).integers(0, 60, (count, 32, 32, 3))
    return (noise + 18 * (np.arange(count) % 10)[:, None, None, None]).astype(np.uint8)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("cifar10")
    for part, count in (("train", 50), ("test", 20)):
        for i, image in enumerate(draw(count, count)):
            path = folder / part / CIFAR10[i % 10] / f"{i:04}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(image).save(path)
    return folder


def weights(folder: Path) -> dict[str, Tensor]:
    from safetensors.torch import load_file

    return load_file(folder / "model.safetensors")


def same(a: Path, b: Path) -> bool:
    first, second = weights(a), weights(b)
    return all(torch.equal(value, second[key]) for key, value in first.items())


def test_a_run(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """It learns, tells how it goes, and leaves weights, history and curves."""
    args = [
        *SMALL,
        "--epochs",
        "12",
        "--lr",
        "0.05",
        "--augment",
        "none",
        "--data",
        str(data),
        "--output",
        str(tmp_path),
    ]
    assert train_cifar10.main(args) == 0
    captured = capsys.readouterr()
    history = json.loads((tmp_path / "history.json").read_text())
    assert len(history["losses"]) == 12 * 4 and len(history["test_accuracy"]) == 12
    assert np.mean(history["losses"][-4:]) < 0.8 * history["losses"][0]
    assert history["settings"]["dim"] == 8
    assert "epoch 12/12" in captured.err and "images/s" in captured.err
    assert captured.out.startswith("test accuracy")
    assert (tmp_path / "curves.png").is_file() or "need matplotlib" in captured.err
    model = train_cifar10.ConvMixer(8, 1, 5, 2, 10).eval()
    model.load_state_dict(weights(tmp_path))
    test = cifar10.load(str(data), "test")
    with torch.no_grad():
        right = model(cifar10.normalised(test.pixels)).argmax(1) == test.labels
    assert float(right.double().mean()) == pytest.approx(history["test_accuracy"][-1])
    assert train_cifar10.main(args) == 0, "a finished run is finished"


def test_killed_and_continued(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """By SIGKILL, at any moment, also while a checkpoint is written: the end is the same to the bit."""
    args = [*SMALL, "--epochs", "20", "--save-every", "1", "--data", str(data)]
    assert train_cifar10.main([*args, "--output", str(tmp_path / "whole")]) == 0
    killed = tmp_path / "killed"
    command = [sys.executable, str(EXAMPLES / "train_cifar10.py"), *args, "--output", str(killed)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    process = subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True)
    while not (killed / "last.pt").is_file() and process.poll() is None:
        time.sleep(0.002)
    time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    error = process.communicate()[1]
    assert process.returncode == -signal.SIGKILL, error
    step = torch.load(killed / "last.pt", weights_only=True)["at"][2]
    assert 0 < step < 80
    capsys.readouterr()
    assert train_cifar10.main([*args, "--output", str(killed)]) == 0
    assert f"after step {step}" in capsys.readouterr().err
    assert same(tmp_path / "whole", killed)
    histories = [json.loads((tmp_path / name / "history.json").read_text()) for name in ("whole", "killed")]
    assert histories[0] == histories[1]


@pytest.mark.parametrize("stop", [1, 4, 6])
def test_stopped_and_continued(data: Path, tmp_path: Path, stop: int) -> None:
    """In the middle and at the end of an epoch, with workers before and without after; fp16 with its scale."""
    args = [*SMALL, "--amp", "bf16" if stop == 1 else "fp16", "--clip-norm", "1", "--data", str(data), "--output"]
    assert train_cifar10.main([*args, str(tmp_path / "whole")]) == 0
    part = [*args, str(tmp_path / "part")]
    assert train_cifar10.main([*part, "--stop-after", str(stop), "--workers", str(int(stop == 6))]) == 130
    assert train_cifar10.main(part) == 0
    assert same(tmp_path / "whole", tmp_path / "part")


# gloo's threads can abort a process that ends before them
ALONE = """import glob, sys, train_cifar10; code = train_cifar10.main(sys.argv[1:])
assert not [f for f in glob.glob("/proc/self/task/*/comm") if "gloo" in open(f).read()]; sys.exit(code)"""


def test_two_processes(data: Path, tmp_path: Path) -> None:
    """As torchrun starts them, stopped once: the same run as one process with the whole batch, but for rounding."""
    args = [*SMALL, "--augment", "none", "--epochs", "1", "--data", str(data), "--output"]
    assert train_cifar10.main([*args, str(tmp_path / "one")]) == 0
    command = [sys.executable, "-c", ALONE, *args, str(tmp_path / "two")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "GLOO_SOCKET_IFNAME": "lo"}
    for more, code in ((["--stop-after", "2"], 130), ([], 0)):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = str(free.getsockname()[1])
        environment |= {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        processes = [
            subprocess.Popen([*command, *more], env={**environment, "RANK": rank, "LOCAL_RANK": rank}) for rank in "01"
        ]
        try:
            assert [process.wait(240) for process in processes] == [code, code]
        finally:
            for process in processes:
                process.kill()
    one, two = (json.loads((tmp_path / name / "history.json").read_text()) for name in ("one", "two"))
    assert two["losses"] == pytest.approx(one["losses"], abs=2e-4)
    assert len(two["test_accuracy"]) == 1


@pytest.mark.parametrize(("amp", "other"), [("none", "plain bf16"), ("bf16", "plain float32")])
def test_compare(amp: str, other: str, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Beside plain in another precision than that of the run: the same one would differ by nothing."""
    command = [*SMALL, "--data", str(data), "--output", str(tmp_path), "--amp", amp, "--compare", "3"]
    assert train_cifar10.main(command) == 0
    losses = json.loads((tmp_path / "compare.json").read_text())
    assert {len(curve) for curve in losses.values()} == {3}
    assert losses["fused"] == pytest.approx(losses["plain"], abs=1e-4 if amp == "none" else 0.05)
    assert losses[other] != losses["plain"]
    printed = capsys.readouterr().out
    assert f"{other} against plain" in printed and "fused is nearer to plain" in printed


# ---- data


def batches(folder: Path, data: Path, change: Any = lambda batch: batch) -> Path:
    """The synthetic images as the python batches of Python 2."""
    for part, names in cifar10.BATCHES.items():
        images = cifar10.load(str(data), part)
        share = len(images.labels) // len(names)
        for i, name in enumerate(names):
            rows = slice(i * share, (i + 1) * share)
            batch = {b"data": images.pixels[rows].flatten(1).numpy(), b"labels": images.labels[rows].tolist()}
            (folder / name).write_bytes(pickle.dumps(change(batch), protocol=2))
    return folder


def test_readers_agree(data: Path, tmp_path: Path) -> None:
    batches(tmp_path, data)
    for part, count in (("train", 50), ("test", 20)):
        found = cifar10.load(str(data), part)
        assert found.pixels.shape == (count, 3, 32, 32) and found.pixels.dtype == torch.uint8
        assert found.labels.bincount().tolist() == [count // 10] * 10
        assert torch.equal(found.pixels[count // 10], torch.from_numpy(draw(count, count)[1]).permute(2, 0, 1))
        other = cifar10.load(str(tmp_path), part)
        assert torch.equal(other.pixels, found.pixels) and torch.equal(other.labels, found.labels)


class Evil:
    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, ("echo pwned > pwned",)


def test_what_is_wrong_is_named(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "torchvision.datasets", None)
    folders = {name: tmp_path / name for name in ("empty", "evil", "short", "class", "text", "size")}
    for folder in folders.values():
        folder.mkdir()
    batches(folders["evil"], data, lambda batch: {**batch, b"labels": Evil()})
    batches(folders["short"], data, lambda batch: {**batch, b"labels": [0]})
    (folders["class"] / "train").mkdir()
    for name in ("text", "size"):
        (folders[name] / "train" / "airplane").mkdir(parents=True)
    (folders["text"] / "train" / "airplane" / "1.jpg").write_text("no image")
    Image.new("RGB", (31, 32)).save(folders["size"] / "train" / "airplane" / "1.png")
    base = [*SMALL, "--output", str(tmp_path / "run")]
    cases = [([*base, "--data", str(tmp_path / "none")], "is no folder"), ([*base, "--data", "torchvision"], "import")]
    for name, says in (
        ("empty", "holds neither"),
        ("evil", "wants to load"),
        ("short", "is damaged"),
        ("class", "airplane holds no .jpg"),
        ("text", "1.jpg is damaged"),
        ("size", "31 x 32, wanted 32 x 32"),
    ):
        cases.append(([*base, "--data", str(folders[name])], says))
    run = [*base, "--data", str(data)]
    assert train_cifar10.main([*run, "--stop-after", "1"]) == 130
    capsys.readouterr()
    cases.append(([*run, "--lr", "1"], "--lr: got 1.0, but the run"))
    cases.append(([*run, "--plain"], "--plain: got True"))
    for args, says in cases:
        assert train_cifar10.main(args) == 2, says
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith("error: --") and says in line, line
    (tmp_path / "run" / "last.pt").write_bytes(b"no checkpoint")
    assert train_cifar10.main(run) == 2
    assert "is damaged" in capsys.readouterr().err and not (tmp_path / "pwned").exists()
    assert train_cifar10.main([*run, "--restart", "--stop-after", "1"]) == 130


# ---- recipe


def test_the_authors_recipe() -> None:
    """The arguments of their README, and the schedule of their train.py."""
    args = train_cifar10.arguments([], "")
    wanted = {"lr": 0.05, "ra_n": 2, "ra_m": 12, "weight_decay": 0.005, "scale": 1.0, "jitter": 0.0, "erasing": 0.0}
    wanted |= {"dim": 256, "depth": 8, "patch_size": 2, "kernel_size": 5, "batch_size": 512, "epochs": 25}
    assert {key: getattr(args, key) for key in wanted} == wanted
    for epoch in np.linspace(0, 25, 101):
        rate = np.interp(epoch, [0, 10, 20, 25], [0, 0.05, 0.05 / 20, 0])
        assert train_cifar10.learning_rate(0.05, epoch / 25) == pytest.approx(rate)


def test_light_augmentation() -> None:
    """Every image is shifted by up to 4, flipped or not, and loses a square, on its own."""
    row, column = torch.meshgrid(torch.arange(32), torch.arange(32), indexing="ij")
    image = torch.stack((row + 10, column + 50, row * 0 + 7)).to(torch.uint8)
    out = cifar10.light(image.expand(400, 3, 32, 32)).long()
    shifts, flips, holes = set(), 0, 0
    for picture in out:
        inside = picture[2] == 7
        y, x = inside.nonzero().T
        down = set((picture[0] - 10)[inside].sub(y).tolist())
        right = (picture[1] - 50)[inside]
        flipped = len(set((right + x).tolist())) == 1
        across = set((right + x if flipped else right - x).tolist())
        assert len(down) == len(across) == 1, "one shift for the whole image"
        assert (picture[:, ~inside] == 128).all()
        shifts |= {(down.pop(), (across.pop() - 31) if flipped else across.pop())}
        flips, holes = flips + flipped, holes + int((~inside[8:24, 8:24]).any())
    assert {abs(s) for pair in shifts for s in pair} == {0, 1, 2, 3, 4}
    assert len(shifts) == 81 or len(shifts) > 70
    assert 150 < flips < 250 and holes > 150


def test_batches_depend_on_their_place_alone(data: Path) -> None:
    pytest.importorskip("torchvision.transforms.v2")
    images = cifar10.load(str(data), "train")

    def epoch(number: int, augment: Any, **kw: Any) -> cifar10.Epoch:
        return cifar10.Epoch(images, 16, number, 3, augment, **kw)

    for augment in (cifar10.authors(0.75, 2, 12, 0.1), cifar10.light):
        first = [epoch(0, augment, erasing=0.5)[i] for i in range(4)]
        state = torch.random.get_rng_state()
        again = epoch(0, augment, erasing=0.5)[2]
        assert torch.equal(torch.random.get_rng_state(), state)
        assert torch.equal(again[0], first[2][0]) and torch.equal(again[1], first[2][1])
        assert not torch.equal(epoch(1, augment)[2][1], first[2][1])
        assert first[0][0].shape == (16, 3, 32, 32) and first[3][2] == 2
    plain = epoch(0, lambda pixels: pixels)
    assert sorted(torch.cat([plain[i][1] for i in range(4)]).tolist()) == sorted(images.labels.tolist())
    halves = [epoch(0, lambda pixels: pixels, rank=rank, world=2) for rank in range(2)]
    for i in range(4):
        assert torch.equal(torch.cat([half[i][0] for half in halves]), plain[i][0])
