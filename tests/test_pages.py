"""What the pages say: tables and figures against the stored results, the README's other statements against tests."""

import json
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
if not (ROOT / "benchmarks").is_dir():
    pytest.skip("the pages and their results are not in this checkout", allow_module_level=True)

from page_figures import NETWORKS, SENTENCES, TRAINING  # noqa: E402

from benchmarks import pages  # noqa: E402
from benchmarks.networks import SPECS  # noqa: E402


def text_of(page: str) -> str:
    """In one line, so that a sentence may be broken anywhere."""
    return " ".join((ROOT / page).read_text().split())


@pytest.mark.parametrize("page", pages.PAGES)
def test_tables_are_those_of_the_stored_results(page: str) -> None:
    """`python -m benchmarks.pages` writes them."""
    text = (ROOT / page).read_text()
    assert len(pages.TABLE.findall(text)) == text.count("<!-- table: ") >= 2
    assert pages.written(text) == text
    assert pages.written(re.sub(r"\*\*\d", "**9", text)) == text, "a figure that is wrong would stay"


@pytest.mark.parametrize("page", SENTENCES)
def test_figures_in_sentences(page: str) -> None:
    """Each is made anew from the stored results, and stands in the page."""
    text = text_of(page)
    wrong = [sentence for about in SENTENCES[page] for sentence in about() if sentence not in text]
    assert not wrong, "the stored results say:\n" + "\n".join(wrong)


def test_what_the_readme_says_of_every_row() -> None:
    """Errors and classes; ratios against the best of all others in this dtype or float32; depthwise convolutions."""
    for name in (NETWORKS, TRAINING):
        results = pages.stored(name)
        assert "cuda" not in json.dumps(results["machine"]).lower()
        for row in [*results.get("models", ()), *results["training"]]:
            right, images = row["top1"].split("/")
            assert row["status"] == "timed" and row["error"] <= row["allowed"] and right == images, row
    peak = pages.stored(NETWORKS)["machine"]["ceilings"]["fp32"]
    for row in pages.stored(NETWORKS)["breakdown"]:
        rate = SPECS[row["model"]].depthwise_flop * row["batch"] / row["ms"]["depthwise"] / 1e6
        assert row["provider"] == "fused" or rate < 0.4 * peak
    races = pages.by_race(pages.stored(NETWORKS)["models"], "model", "batch", "dtype")
    for (model, batch, dtype), race in races.items():
        others = [row for key in {dtype, "fp32"} for row in races[model, batch, key].values() if row["kind"] != "fused"]
        eager = max(row["images_per_s"] for row in others if row["kind"] == "eager")
        ours = race["fused"]["images_per_s"]
        assert race["fused"]["speedup"] == pytest.approx(ours / eager)
        assert race["fused"]["over_peers"] == pytest.approx(ours / max(row["images_per_s"] for row in others))


@pytest.mark.parametrize(
    ("command", "rows"),
    [
        ("benchmarks/bench_training.py --benchmark-only -k bf16", ("b64-bf16-inductor", "b2-bf16-fused")),
        (
            "benchmarks/bench_models.py --benchmark-only --dtypes fp16 --batches 1,8 --providers fused,eager",
            ("convmixer_768_32-b8-fp16-fused", "convmixer_1536_20-b1-fp16-eager"),
        ),
    ],
)
def test_documented_commands_choose_their_rows(command: str, rows: Sequence[str]) -> None:
    assert f"pytest {command}" in text_of("benchmarks/README.md")
    collect = [sys.executable, "-m", "pytest", *command.split(), "--collect-only", "-q", "-p", "no:cacheprovider"]
    found = subprocess.run(collect, capture_output=True, text=True, cwd=ROOT).stdout
    assert all(row in found for row in rows), found[-2000:]
