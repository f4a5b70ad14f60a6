"""Sentences of the pages that state figures, made anew from the stored results."""

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks import pages

ROOT = Path(__file__).resolve().parent.parent
NETWORKS, TRAINING = "epyc-zen5-2-cores", "epyc-zen5-2-cores-training"


def span(values: Sequence[float], form: str = ".2f") -> str:
    return f"{min(values):{form}} to {max(values):{form}}"


def conditions(name: str, packages: Sequence[str]) -> str:
    machine = pages.stored(name)["machine"]
    versions = ", ".join(f"{package} {machine['versions'][package]}" for package in packages)
    return f"{versions}, {machine['date'][:10]}"


def loud(rows: Sequence[Mapping[str, Any]]) -> tuple[int, int]:
    """Rows with a spread above 5 %, and those of them that are fused."""
    found = [row for row in rows if (row["spread"] or 0) > 0.05]
    return len(found), sum(row["kind"] == "fused" for row in found)


def asked_for(name: str) -> str:
    return pages.stored(name)["machine"]["command"].replace("pytest benchmarks --benchmark-only ", "")


def of_networks() -> Iterator[str]:
    """The README's about its first table."""
    machine, rows = (pages.stored(NETWORKS)[part] for part in ("machine", "models"))
    packages = ("torch", "onnxruntime", "openvino")
    yield f"{machine['cores']} cores of an {machine['cpu']} (Zen 5, AVX512-BF16), {conditions(NETWORKS, packages)}. "
    yield f'Command: `make bench ARGS="{asked_for(NETWORKS)}"`'
    races = pages.by_race(rows, "model", "batch", "dtype")
    many, fused = loud(rows)
    yield f"Spreads above 5 %: {many} rows, {fused or 'none'} of them fused."
    at_one = [races[model, 1, "fp32"] for model in ("convmixer_1024_20_ks9_p14", "convmixer_1536_20")]
    shares = [max(row["percent_of_limit"] for row in race.values() if row["kind"] == "eager") for race in at_one]
    yield f"runs at {span(shares, '.0f')} % of it (1024/20, 1536/20 at batch 1)"
    best = max(row["percent_of_limit"] for row in rows if row["kind"] == "fused" and row["dtype"] == "fp32")
    yield f"(Strassen), which is how they come to {best:.0f} %"


def of_training() -> Iterator[str]:
    command = pages.stored(TRAINING)["machine"]["command"]
    keyword = re.search(r"-k (.*) --results", command)[1]
    yield f"`{command.replace(keyword, f'{chr(34)}{keyword}{chr(34)}')}`"
    yield f"Spreads up to {100 * max(row['spread'] for row in pages.stored(TRAINING)['training']):.1f} %."


def of_the_gpu() -> Iterator[str]:
    about = pages.stored("h200-network")["machine"]
    yield f"An H200 (CUDA {about['cuda']}, cuDNN {about['cudnn']}), {conditions('h200-network', ['torch'])}, commit"
    yield f"`{about['command']}`"
    rows = {row["provider"]: row for row in pages.stored("h200-training")["training"]}
    rates = [rows[name]["images_per_s"] for name in ("fused", "eager")]
    part = rows["fused"]["memory"]["call"] / rows["eager"]["memory"]["call"]
    times = f"{rates[0] / rates[1]:.1f} times plain PyTorch's {rates[1]:.0f}"
    yield f"{rates[0]:.0f} images per second, {times}, with {part:.3f} of its memory"
    ratios = [row["speedup"] for row in pages.stored("h200-ops")["gpu_ops"]]
    yield f"{min(ratios):.2f} to {max(ratios):.1f} times as fast in all of {len(ratios)} shapes"
    found = pages.stored("h200-product")["gpu_product"]
    one, more = ([row["speedup"] for row in found if row["shape"].startswith("1x") == first] for first in (True, False))
    yield f"{span(more)} times in {len(more)} and {span(one)} in the three of batch 1"
    networks = pages.by_race(pages.stored("h200-network")["models"], "model")
    ratios = [race["fused triton"]["ms"] / race["fused"]["ms"] for race in networks.values()]
    yield f"in {span(ratios, '.1f')} times the time of the CUDA kernels"
    for name in ("network", "training", "ops", "product"):
        for row in (row for rows in pages.stored(f"h200-{name}").values() if isinstance(rows, list) for row in rows):
            assert row.get("match", True), row


def of_the_tables_of_a_gpu() -> Iterator[str]:
    for name in ("ops", "product"):
        yield f"`{pages.stored(f'h200-{name}')['machine']['command']}`"


def of_layers() -> Iterator[str]:
    ops = pages.stored("epyc-zen5-2-cores-layers")["ops"]
    assert not any(op["slower"] for op in ops)
    yield f"None of the {len(ops)} layers is slower than PyTorch's in either layout by more than noise (5 %"
    large = [op["x_best"] for op in ops if op["k"] >= 7]
    yield f"those from k 7 on are {min(large):.2f} to {max(large):.1f} times as fast."
    ops = pages.stored("xeon-amx-2-cores-layers")["ops"]
    slower = [op for op in ops if op["slower"]]
    yield f"{len(ops) - len(slower)} of the same {len(ops)} are slower in neither layout"
    worst, large = [min(op["x_NCHW"], op["x_NHWC"]) for op in slower], [op["x_best"] for op in ops if op["k"] >= 7]
    yield f"the others reach {span(worst)}"
    own = [op for op in slower if op["backends"] == {"conv2d": "torch"}]
    many = sorted(op["x_NHWC"] for op in slower if (op["k"], op["batch"], op["dtype"]) == (15, 32, "fp32"))
    assert (len(many), len(own)) == (3, 1)
    found = "{:.2f}, {:.2f} and {:.2f}".format(*many)
    yield f"three are float32 under 15 x 15 taps, 32 images ({found}), one is PyTorch's own"
    assert all(op["x_NCHW"] > 0.95 for op in slower)
    yield f"from k 7 on are {min(large):.2f} to {max(large):.1f} times as fast"
    yield f"`{pages.stored('xeon-amx-2-cores-layers')['machine']['command'].replace(' -q', '')}`"


def of_trained_layers() -> Iterator[str]:
    ops = pages.stored("xeon-amx-2-cores-train-layers")["ops"]
    slower = [op for op in ops if op["slower"]]
    command = pages.stored("xeon-amx-2-cores-train-layers")["machine"]["command"]
    yield f"at batch 8 ({len(ops)}; `{command.replace(' -q', '')}`"
    assert {op["k"] for op in slower} == {3} and len(slower) == 3
    yield f"{len(ops) - len(slower)} are slower in neither layout; three of k 3 reach " + span(
        [min(op["x_NCHW"], op["x_NHWC"]) for op in slower]
    )
    larger, three = ([op["x_best"] for op in ops if (op["k"] > 3) == many] for many in (True, False))
    yield f"those from k 5 on are {min(larger):.2f} to {max(larger):.1f} times as fast as nn.Conv2d"
    yield f"those of k 3 {min(three):.2f} to {max(three):.1f}"
    ops = pages.stored("epyc-zen5-2-cores-train-layers")["ops"]
    (slower,) = (op for op in ops if op["slower"])
    assert slower["k"] == 3 and slower["x_NHWC"] > 0.95
    yield f"{len(ops) - 1} are slower in neither layout, one of k 3 reaches {slower['x_NCHW']:.2f} in NCHW"
    yield f"those from k 5 on are {span([op['x_best'] for op in ops if op['k'] > 3])} times as"
    ops = pages.stored("xeon-avx512-2-cores-train-layers")["ops"]
    slower = [op for op in ops if op["slower"]]
    assert {(op["k"], op["h"], op["w"]) for op in slower} == {(3, 7, 7)}
    yield f"{len(ops) - len(slower)} are slower in neither layout, two of k 3 on 7 x 7 reach " + " and ".join(
        f"{min(op['x_NCHW'], op['x_NHWC']):.2f}" for op in slower
    )
    larger = [op["x_best"] for op in ops if op["k"] > 3]
    yield f"those from k 5 on are {min(larger):.2f} to {max(larger):.1f} times as fast ([all it"
    rows = pages.stored("xeon-amx-2-cores-swapped")["swapped"]
    alone, steps = ([row["speedup"] for row in rows if row["kind"] == kind] for kind in ("inference", "step"))
    yield f"Inference changes by at most {100 * max(abs(x - 1) for x in alone):.0f} % either way"
    yield f"a step is {span(steps)} times as fast"
    yield conditions("xeon-amx-2-cores-swapped", ("torch", "timm"))


def of_swapped_networks() -> Iterator[str]:
    rows = pages.stored("xeon-amx-2-cores-swapped")["swapped"]
    (row,) = (r for r in rows if (r["model"], r["kind"], r["dtype"]) == ("convnext_tiny", "step", "bf16"))
    yield f"a bfloat16 training step of ConvNeXt-T takes [{1 / row['speedup']:.2f} of the time]"


def of_a_processor_with_tiles() -> Iterator[str]:
    rows = [row for row in pages.stored("xeon-amx-2-cores")["models"] if row["kind"] == "fused"]
    over = {dtype: span([row["over_peers"] for row in rows if row["dtype"] == dtype]) for dtype in ("fp32", "bf16")}
    yield f"fused is {over['fp32']} times the best peer in float32 and {over['bf16']} times in bfloat16"


def of_rivals() -> Iterator[str]:
    """And of the README's table on another machine."""
    yield f"two Zen 5 cores, {conditions('epyc-zen5-2-cores-rivals', ('torch', 'timm'))}; random weights."
    rows = pages.stored("epyc-zen5-2-cores-rivals")["rivals"]
    best = {(row["model"], row["dtype"]): row.get("fused", max(row["plain"].values())) for row in rows}
    for dtype in ("fp32", "bf16"):
        theirs = max(best[name, dtype] for name in ("deit_base_patch16_224", "convnext_base"))
        assert min(best[name, dtype] for name in ("convmixer_768_32", "convmixer_1024_20_ks9_p14")) > theirs
        assert best["convmixer_1536_20", dtype] < theirs
    yield "With fused kernels 768/32 and 1024/20 pass DeiT-B and ConvNeXt-B in both dtypes; 1536/20, of about three"
    before = "epyc-zen4-2-cores"
    yield f"(Zen 4, AVX512-BF16), {conditions(before, ('torch', 'onnxruntime', 'openvino'))}, an earlier commit"
    yield f'command: `make bench ARGS="{asked_for(before)}"`'
    assert {row["kind"] for row in pages.stored(before)["models"] if (row["spread"] or 0) > 0.05} == {"eager"}
    yield "Spreads above 5 %: eager only."


def of_tiles() -> Iterator[str]:
    name = "xeon-amx-2-cores"
    machine, rows = (pages.stored(name)[part] for part in ("machine", "models"))
    assert (machine["isa"], machine["cpu"].split("(")[0]) == ("amx", "Intel")
    yield f"(Emerald Rapids, AMX), {conditions(name, ('torch', 'onnxruntime', 'openvino'))}, without Inductor; "
    yield f"command: `{machine['command']}`"
    many, fused = loud(rows)
    yield f"spreads above 5 % in {many} of {len(rows)} rows, {fused} of them fused"
    disturbed = pages.stored(f"{name}-disturbed")["models"]

    def over(dtype: str, of: list[dict[str, Any]] = rows) -> str:
        return span([row["over_peers"] for row in of if row["kind"] == "fused" and row["dtype"] == dtype])

    yield f"fused is {over('bf16')} times the best of them, in float32, "
    yield f"{over('fp32')} times. The machine was shared"
    yield f"fused was {over('bf16', disturbed)} times the best peer in bfloat16 and "
    yield f"and {over('fp32', disturbed)} times in float32 ("
    for row in [*rows, *disturbed]:
        right, images = row["top1"].split("/")
        assert row["status"] == "timed" and row["error"] <= row["allowed"] and right == images, row


def of_a_processor_without_tiles() -> Iterator[str]:
    name = "xeon-avx512-2-cores"
    machine, rows = (pages.stored(name)[part] for part in ("machine", "models"))
    assert machine["isa"] == "avx512" and all(row["error"] <= row["allowed"] for row in rows)
    over = {}
    for (_, _, dtype), race in pages.by_race(rows, "model", "batch", "dtype").items():
        best = max(row["images_per_s"] for row in race.values() if row["kind"] != "fused")
        over.setdefault(dtype, []).append(race["fused"]["images_per_s"] / best)
    yield f"fused is {span(over['bf16'])} times the best peer in bfloat16"
    yield f"in float32, where it is {span(over['fp32'])} times the best peer"
    yield f"{conditions(name, ('torch', 'onnxruntime', 'openvino'))}, without Inductor; command: `{machine['command']}`"
    many, fused = loud(rows)
    yield f"spreads above 5 % in {many} of {len(rows)} rows, {fused} of them fused"
    ops = pages.stored(f"{name}-layers")["ops"]
    (slower,) = (op for op in ops if op["slower"])
    yield f"{len(ops) - 1} are slower in neither layout, one of k {slower['k']} reaches {slower['x_NHWC']:.2f} in"
    large = [op["x_best"] for op in ops if op["k"] >= 7]
    yield f"those from k 7 on are {min(large):.2f} to {max(large):.1f} times as fast (`"
    yield f"(`{pages.stored(f'{name}-layers')['machine']['command']}`)"


def of_training_by_tiles() -> Iterator[str]:
    machine, rows = (pages.stored("xeon-amx-2-cores-training")[part] for part in ("machine", "training"))
    assert machine["isa"] == "amx" and all(row["status"] == "timed" and row["error"] <= row["allowed"] for row in rows)
    ratios = [row["speedup"] for row in rows if row["provider"] == "fused"]
    yield f"fused {span(ratios)} times the faster layout of eager (256/8, 768/32)"
    yield f"`{machine['command'].replace('bf16 and not inductor', chr(34) + 'bf16 and not inductor' + chr(34))}`"


def of_float16() -> Iterator[str]:
    machine, rows = (pages.stored("xeon-amx-2-cores-fp16")[part] for part in ("machine", "models"))
    rates = {(row["dtype"], row["provider"], row["model"]): row["images_per_s"] for row in rows}
    models = {row["model"] for row in rows}
    for other, form in ((("fp32", "fused"), ".2f"), (("fp16", "eager"), ".1f")):
        yield f"{span([rates['fp16', 'fused', name] / rates[(*other, name)] for name in models], form)} times"
    yield f"{machine['date'][:10]}; `{machine['command']}`"
    yield f"spreads up to {max(row['spread'] or 0 for row in rows):.0%}".replace("%", " %")


def of_the_example() -> Iterator[str]:
    curves, losses = (json.loads((ROOT / f"examples/cifar10_{n}.json").read_text()) for n in ("curves", "compare"))
    size = (ROOT / "cmx_kernels/data/convmixer_cifar10.safetensors").stat().st_size / 1e3
    yield f"{curves['accuracy']:.2%} of".replace("%", " %")
    yield f"{curves['bfloat16']:.2%} in bfloat16, {size:.0f} KB; {len(curves['test_accuracy'])} epochs".replace(
        "%", " %"
    )
    found = {}
    for name in ("fused", "plain bf16"):
        differences = [abs(a - b) for a, b in zip(losses[name], losses["plain"], strict=True)]
        found[name] = [
            f"{value:.1e}".replace("e-0", "e-") for value in (sum(differences) / len(differences), max(differences))
        ]
    plain = losses["plain"]
    yield f"In {len(plain)} steps (float32, loss from {plain[0]:.2f} to about {plain[-1]:.1f})"
    yield "the losses of fused differ from those of plain by {} on average and {} at most".format(*found["fused"])
    yield "in bfloat16 by {} and {} (".format(*found["plain bf16"])


SENTENCES = {
    "README.md": (of_networks, of_a_processor_with_tiles, of_training, of_swapped_networks, of_the_gpu),
    "RESULTS.md": (
        of_layers,
        of_trained_layers,
        of_rivals,
        of_tiles,
        of_a_processor_without_tiles,
        of_training_by_tiles,
        of_float16,
        of_the_tables_of_a_gpu,
    ),
    "examples/README.md": (of_the_example,),
}
