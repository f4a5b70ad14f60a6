"""Goals and pictures of a GPU's records, here invented ones: every goal can be decided, every provider is drawn."""

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

gpu_records = pytest.importorskip("gpu_records", reason="the benchmarks are not in this checkout")
plots = pytest.importorskip("benchmarks.plots", reason="the plots are an extra: pip install '.[plots]'")
records, network, goals = gpu_records.records, gpu_records.network, gpu_records.network.goals

PARTS = {"models": goals.NETWORK, "training": goals.TRAINING, "gpu_ops": goals.OPS, "gpu_product": goals.PRODUCT}


@pytest.mark.parametrize("section", PARTS)
def test_all_rows_decide_all_goals(section: str) -> None:
    """Whether ours takes a hundredth of PyTorch's time or a hundred times as much."""
    for factor, verdict in ((0.1, "met"), (1000.0, "missed")):
        rows = goals.judged(PARTS[section], records(factor))
        assert [row["goal"] for row in rows if row["verdict"] != verdict] == []
        assert all(verdict in line for line in goals.lines(rows))


@pytest.mark.parametrize("provider", goals.PEERS)
def test_a_peer_that_was_not_measured_leaves_a_goal_open(provider: str) -> None:
    """Until then it is not met. It is missed all the same if another peer is too fast."""

    def without(factor: float) -> list[Any]:
        content = records(factor)
        kept = [row for row in content["models"] if (row["batch"], row["provider"]) != (256, provider)]
        rows = goals.judged(goals.NETWORK, {**content, "models": kept})
        return [row["met"] for row in rows if row["goal"].endswith("times the best PyTorch")]

    assert (without(0.1), without(1000.0)) == ([None] * 3, [False] * 3)


def test_rows_that_are_missing_leave_a_goal_open() -> None:
    content = records(0.1)
    del content["gpu_ops"][0]["speedup"]  # 1536 channels, k 9: as where the fused kernel has failed
    verdicts = {row["goal"]: row["met"] for row in goals.judged(goals.OPS, content)}
    assert verdicts["depthwise block, batch 64, bf16, k 9, times the best PyTorch"] is None
    assert verdicts["depthwise block, batch 64, bf16, k 7, times the best PyTorch"] is True
    assert {row["verdict"] for row in goals.judged(goals.NETWORK, {})} == {"not measured"}


def test_rows_with_goals_come_first() -> None:
    """A run that is cut has them: no cell without a goal stands before one that has, compiled peers aside."""
    wanted = [cell[:3] for cell in network.CELLS if cell[3] in (network.LARGE, network.LATENCY)]
    models = (goals.WIDE, goals.DEEP, goals.SMALL)
    cells = {(model, dtype, batch) for model in models for dtype in goals.BF16 for batch in (1, 256)}
    assert set(wanted[: len(cells)]) == cells and wanted[len(cells)] == (goals.RIVAL, "bf16-model", 256)


@pytest.mark.parametrize("name", network.INDUCTOR)
def test_inductor_knows_its_options(name: str) -> None:
    torch.compile(torch.nn.Identity(), **network.INDUCTOR[name])  # raises on a name that it does not know
    with pytest.raises(RuntimeError, match="Unexpected optimization option"):
        torch.compile(torch.nn.Identity(), options={"layout_optimisation": False})


def test_floor_of_a_network() -> None:
    """A block moves its activation four times and its weights; on a GPU that the cost model does not know: nothing."""
    device = network.Device(argparse.Namespace(dry_run=True, device="cpu", seconds=60, without=[], only=[]))
    spec = network.SPECS[goals.WIDE]
    assert network.floor_us(device, spec, 64, torch.bfloat16) is None
    device.name = "NVIDIA H200"
    floor = network.floor_us(device, spec, 64, torch.bfloat16)
    moved = spec.depth * 2 * 2 * 64 * spec.dim * spec.pixels * 2
    assert floor is not None and moved / 4.8e12 < floor * 1e-6 < 3 * moved / 4.8e12
    assert network.floor_us(device, spec, 64, torch.float32) is None


def _words(figure: Any) -> list[str]:
    """What stands in legends and beside bars."""
    legends = [*figure.legends, *(axes.get_legend() for axes in figure.axes)]
    found = [text.get_text() for legend in legends if legend for text in legend.get_texts()]
    return found + [text.get_text() for axes in figure.axes for text in axes.get_yticklabels()]


def _at_256(row: dict[str, Any]) -> bool:
    return bool(row["batch"] == 256)


PICTURES: dict[str, tuple[Callable[[Any], Any], str, Callable[[dict[str, Any]], bool]]] = {
    "throughput": (plots.networks.throughput, "models", _at_256),
    "latency": (plots.networks.latency, "models", lambda row: True),
    "errors": (plots.networks.errors, "models", lambda row: True),
    "training": (plots.kernels.training, "training", lambda row: True),
}


@pytest.mark.parametrize("name", PICTURES)
def test_every_provider_is_in_the_legend(name: str) -> None:
    picture, section, where = PICTURES[name]
    content = records(0.5)
    wanted = {row["provider"] for row in content[section] if where(row)}
    assert len(wanted) >= 5 and wanted <= set(_words(picture(content)))


@pytest.mark.parametrize("picture", [plots.kernels.speedup, plots.kernels.roofline])
def test_every_kernel_is_in_the_legend(picture: Callable[[Any], Any]) -> None:
    words = " ".join(_words(picture(records(0.5))))
    wanted = {"fused channels_last", "fused triton", "bfloat16", "float16", "float32"}
    wanted |= {"pointwise_block", "patch_embed", "pool_head", "TF32"} if picture is plots.kernels.roofline else set()
    assert {word for word in wanted if word not in words} == set()


def test_an_unknown_provider_is_not_left_out() -> None:
    content = records(0.5)
    content["models"].append({**content["models"][0], "provider": "another"})
    with pytest.raises(ValueError, match="another"):
        plots.networks.latency(content)


def test_accuracy_against_throughput_with_rivals() -> None:
    """An arrow for each ConvMixer, and the rivals beside it."""
    figure = plots.accuracy.accuracy(records(0.5))
    assert figure is not None
    texts = [text.get_text() for text in figure.axes[0].texts]
    assert {"convmixer_768_32", "deit_base", "resnet152", "mixer_b16", "convnext_base"} <= set(texts)
    arrows = [text for text in figure.axes[0].texts if getattr(text, "arrow_patch", None)]
    assert len(arrows) == 3
    assert plots.accuracy.accuracy({**records(0.5), "rival_networks": []}) is None


def test_every_picture_says_where_it_is_from(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Machine, versions, date and command, in small pictures too, and inside of them."""
    said = []

    def kept(figure: Any, path: Path, **_: Any) -> None:
        figure.draw_without_rendering()
        (text,) = [text for text in figure.texts if "command: " in text.get_text()]
        box = text.get_window_extent()
        assert figure.bbox.x0 <= box.x0 and box.x1 <= figure.bbox.x1 and figure.bbox.y0 <= box.y0
        assert all(axes.get_tightbbox().y0 >= box.y1 for axes in figure.axes)
        said.append(text.get_text().replace("\n", " "))

    monkeypatch.setattr(plots.style.Figure, "savefig", kept)
    file = tmp_path / "gpu.json"
    content = records(0.5)
    file.write_text(json.dumps({key: content[key] for key in ("machine", "training", "gpu_ops")}))
    assert len(plots.draw([file])) == len(said) == 3
    machine = content["machine"]
    wanted = (machine["title"], machine["date"], machine["command"], machine["commit"], "torch 2.13.0", "triton 3.9.0")
    assert all(word in text for word in wanted for text in said)
