"""The benchmarks themselves: what is written, what is refused, and the GPU's way on a machine without one."""

import importlib.util
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parent.parent
pytestmark = pytest.mark.skipif(not (ROOT / "benchmarks").is_dir(), reason="the benchmarks are not in this checkout")


def _run(*command: str) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    return subprocess.run([sys.executable, *command], capture_output=True, text=True, cwd=ROOT, env=env, timeout=1800)


def test_gpu_check_without_a_gpu(tmp_path: Path) -> None:
    """Every part but the device: each leaves its table, and nothing of ours is wrong or missing in it."""
    from benchmarks.gpu import goals, network

    done = _run("-m", "benchmarks.gpu.check", "--device", "cpu", "--dry-run", "--results", str(tmp_path))
    assert done.returncode == 0, done.stdout[-30000:] + done.stderr[-3000:]
    steps = json.loads((tmp_path / "gpu-check-all.json").read_text())["steps"]
    drawn = importlib.util.find_spec("matplotlib") is not None
    parts = ["correct", "ops", "product", "network", "training", *["pictures"] * (3 if drawn else 0)]
    assert [s["part"] for s in steps if s["passed"]] == parts
    sections = {"network": "models", "training": "training", "ops": "gpu_ops", "product": "gpu_product"}
    rows = {part: json.loads((tmp_path / f"gpu-{part}.json").read_text())[name] for part, name in sections.items()}
    assert {r["dtype"] for r in rows["network"]} == set(network.PRECISIONS)
    assert all(r["status"] == "timed" and r["error"] <= r["allowed"] for r in [*rows["network"], *rows["training"]])
    providers = {name for _, _, _, names in network.CELLS for name in names if not name.startswith("fused triton")}
    assert {r["provider"] for r in rows["network"]} == providers
    peers = {name for name in goals.PEERS if "max-autotune" not in name and "graph" not in name}
    assert all({"fused", *peers} <= r["us"].keys() and not r["note"] for r in rows["ops"])
    assert all({"fused", "eager"} <= r["us"].keys() and not r["note"] for r in rows["product"])
    assert {r["dtype"] for r in rows["product"]} == {"fp32", "tf32", "bf16", "fp16"}
    rates = {"images_per_s", "gflops", "gb_per_s", "match", "error", "layout", "backend", "dtype", "provider"}
    assert all(rates <= row.keys() for row in [*rows["network"], *rows["training"]])
    rates -= {"images_per_s", "provider"}
    assert all(rates <= row.keys() for row in [*rows["ops"], *rows["product"]])
    for part in sections:
        assert "| " in (tmp_path / f"gpu-{part}.md").read_text()
        assert part == "product" or not drawn or list(tmp_path.glob(f"gpu-{part}_*.png"))
        assert all(row["verdict"] for row in json.loads((tmp_path / f"gpu-{part}.json").read_text())["goals"])


def test_gpu_check_survives_a_part_that_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from benchmarks.gpu import check

    ran = []

    def run(name: str, command: list[str], seconds: float, *_: object) -> check.Step:
        ran.append(name)
        return {"step": name, "passed": name != "ops", "result": 1, "seconds": 0.0}

    monkeypatch.setattr(check, "run", run)
    assert check.main(["--device", "cpu", "--dry-run", "--results", str(tmp_path)]) == 1
    assert ran[-4:] == ["ops", "product", "network", "training"]


def test_gpu_check_goes_on_in_a_new_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A broken CUDA context ends a process, not its part; what was measured is not measured again."""
    import argparse

    from benchmarks.gpu import check, device, store

    code = f"import sys; sys.exit({store.BROKEN} if '--resume' not in sys.argv else 0)"
    assert check.run("broken", [sys.executable, "-c", code], 1200)["passed"]
    options = argparse.Namespace(results=tmp_path, name="x", resume=True, dry_run=True, device="cpu", seconds=60)
    options.without = options.only = []
    there = device.Device(options)
    first = store.Store(there, options)
    first.add("gpu_ops", {"shape": "1", "k": 3, "note": ""})
    monkeypatch.setattr(device.Device, "broken", True)
    monkeypatch.setattr(os, "_exit", sys.exit)
    with pytest.raises(SystemExit, match=str(store.BROKEN)):
        first.failed("gpu_ops", {"shape": "2", "k": 3, "note": ""}, RuntimeError("illegal address"))
    again = store.Store(device.Device(options), options)
    assert [again.has("gpu_ops", {"shape": s, "k": k}) for s, k in (("1", 3), ("2", 3), ("1", 5))] == [
        True,
        True,
        False,
    ]
    assert again.rows("gpu_ops")[1]["note"] == "RuntimeError: illegal address"


def test_gpu_tests_are_apart_and_must_run(tmp_path: Path) -> None:
    """Each in a process of its own; a test that was skipped has not passed."""
    from benchmarks.gpu import check

    names = [name for file in check.TESTS for name, _, _ in check.tests(f"tests/test_{file}.py", [])]
    assert len(set(names)) == len(names) > 30 and "cuda_device, shapes" in names
    shared = [name for file in check.SHARED for name, _, _ in check.tests(f"tests/test_{file}.py", [], "backend")]
    assert "ops, shapes" in shared and "ops, defaults" not in shared
    log = [sys.executable, "-c", "import sys; print(sys.argv[1])"]
    jobs = [("ran, a", [*log, "3 passed, 1 skipped"], 1200.0), ("not, b", [*log, "4 skipped"], 1200.0)]
    steps = [check.unless_skipped(step, tmp_path) for step in check.together(jobs, time.monotonic() + 1200, tmp_path)]
    assert [step["passed"] for step in steps] == [True, None]


def test_gpu_timings_keep_cudnn() -> None:
    import torch

    from benchmarks.gpu import device

    before = torch.backends.cudnn.enabled, torch.backends.cudnn.allow_tf32
    for tf32 in (False, True):
        with device.flags(tf32=tf32, benchmark=True):
            cudnn = torch.backends.cudnn
            assert (cudnn.enabled, cudnn.benchmark, cudnn.allow_tf32) == (before[0], True, tf32)
    assert (torch.backends.cudnn.enabled, torch.backends.cudnn.allow_tf32) == before


def test_gpu_check_ends_a_part_in_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """With room for a machine that stops for minutes."""
    from benchmarks.gpu import check

    sleeps = [sys.executable, "-c", "import time; time.sleep(3600)"]
    assert check.run("late", sleeps, 3600, time.monotonic())["passed"] is None
    monkeypatch.setattr(check, "_SHORTEST", -600)
    cut = check.run("cut", sleeps, 3600, time.monotonic() + 1)
    assert cut["passed"] is False and "not finished" in cut["result"] and cut["seconds"] < 3000


def test_counts_of_the_networks() -> None:
    """Parameters and multiply-adds against those of the modules."""
    import torch

    from benchmarks.networks import SPECS, plain

    for spec in (SPECS["tiny"], SPECS["convmixer_256_8_ks5_p2"]):
        model = plain(spec)
        assert spec.parameters == sum(p.numel() for p in model.parameters())
        outputs: list[int] = []
        flop: list[int] = []

        def count(
            conv: torch.nn.Conv2d, _: object, y: torch.Tensor, outputs: list = outputs, flop: list = flop
        ) -> None:
            outputs.append(y.numel())
            flop.append(2 * y.numel() * conv.weight[0].numel())

        for module in model.modules():
            if isinstance(module, torch.nn.Conv2d):
                module.register_forward_hook(count)
        model(torch.zeros(1, 3, spec.image_size, spec.image_size))
        assert spec.activations == sum(outputs)
        assert spec.flop == sum(flop) + 2 * spec.dim * spec.classes


def test_pictures_of_what_was_measured_and_no_others(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="the plots are an extra: pip install '.[plots]'")
    from benchmarks.plots import draw

    (stored,) = (ROOT / "benchmarks" / "results").glob("epyc-zen5-2-cores.json")
    networks, operators = tmp_path / "networks.json", tmp_path / "operators.json"
    result = json.loads(stored.read_text())
    networks.write_text(json.dumps({part: result[part] for part in ("machine", "models")}))
    found = {"fp32": 200.0, "copy": 20.0}
    op = {"op": "depthwise_block", "dtype": "fp32", "x_best": 2.0, "flop": 1e9, "bytes": 1e6, "gflops": 100.0}
    result["machine"].pop("ceilings", None)
    machine = {**result["machine"], "ceilings": found}
    operators.write_text(json.dumps({"machine": machine, "ops": [{**op, "k": k} for k in (3, 7, 31)]}))
    drawn = {path.stem for path in draw([networks])}
    assert drawn == {f"networks_{name}" for name in ("throughput", "latency", "errors")}
    drawn = {path.stem for path in draw([operators, networks])}
    assert drawn == {f"operators_{name}" for name in ("throughput", "latency", "errors", "speedup", "roofline")}
    operators.write_text(operators.read_text().replace("AMD", "Another"))
    with pytest.raises(ValueError, match="different machines"):
        draw([operators, networks])


def test_named_networks_are_all_that_is_trained() -> None:
    named = ("--models", "convmixer_768_32")
    found = _run("-m", "pytest", "benchmarks/bench_training.py", "--collect-only", "-q", *named).stdout
    assert "convmixer_768_32" in found and "convmixer_256_8" not in found


def test_peak_of_arithmetic() -> None:
    from cmx_kernels import registry

    if registry.C is None:
        pytest.skip(str(registry.WHY_NO_C))
    assert all(registry.C.peak(dtype, 1e-3) > 0 for dtype in ("float32", "float16", "bfloat16"))
    with pytest.raises(ValueError, match=r"dtype: got 'bf16', wanted float32, float16 or bfloat16"):
        registry.C.peak("bf16")


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="this system does not tell a process its peak")
def test_memory_is_that_of_a_steady_call(tmp_path: Path) -> None:
    """A fused call adds two live activations at most, and no weights: those were packed in the call before."""
    import torch

    from benchmarks.lanes import Lane
    from benchmarks.networks import SPECS, plain
    from cmx_kernels import registry

    if registry.C is None:
        pytest.skip(str(registry.WHY_NO_C))
    spec, batch = SPECS["convmixer_256_8_ks5_p2"], 2
    weights = tmp_path / "weights.pt"
    torch.save(plain(spec).state_dict(), weights)
    photos = torch.randn(batch, 3, spec.image_size, spec.image_size)
    lane = Lane("fused", "fp32", 2)
    lane.ask("build", spec.name, weights, photos)
    lane.ask("choose", photos)
    packed = lane.ask("check", photos, batch)["memory"]["packed"]
    lane.ask("turn", 0.1)
    call = lane.ask("memory_of_call")["call"]
    lane.stop()
    live = 4 * batch * spec.pixels * spec.dim / 2**20
    rest = 1.0  # MiB: logits, and what the allocators round up to
    assert packed > 2 * live + rest and call <= 2 * live + rest, (call, live, packed)


def _check_fields(found: dict[str, list[dict[str, Any]]]) -> None:
    wanted = {"images_per_s", "gflops", "percent_of_limit", "memory", "dtype", "layout", "provider"}
    wanted |= {"backends", "versions", "commit", "match", "error", "gb_per_s"}
    for section, records in found.items():
        for row in records:
            assert wanted <= row.keys(), (section, wanted - row.keys())
            assert row["match"] is True and row["error"] <= row["allowed"] and row["percent_of_limit"] > 0
            assert row["backends"] and "torch" in row["versions"]
            if row["provider"] == "fused":
                assert "cpu" in row["backends"].values(), row["backends"]
            assert "process" in row["memory"] or row["dtype"] == "fp16", "plain float16 has one call only"


@pytest.mark.slow
def test_networks_of_others_are_recorded() -> None:
    file = ROOT / "benchmarks" / "results" / "latest-swapped.json"
    command = ["-m", "pytest", "benchmarks/bench_swapped.py", "--benchmark-only", "-k", "test_convnext-step-fp32"]
    done = _run(*command, "--results", "latest-swapped", "-p", "no:cacheprovider")
    assert done.returncode == 0, done.stdout[-30000:] + done.stderr[-3000:]
    (row,) = json.loads(file.read_text())["swapped"]
    _check_fields({"swapped": [row]})
    assert row["swapped"] == row["depthwise"] == 9


@pytest.mark.slow
def test_every_record_has_the_fields() -> None:
    """Of each file of rows, on something tiny."""
    results = ROOT / "benchmarks" / "results"
    shapes = ("c1024-16x16 and (depthwise_block-k9 or patch or pool)", "c96-7x7 and (pointwise or depthwise_layer-k3-)")
    shapes = (*shapes, "depthwise_block_train-k5")
    rows = f"fp16 or fp32 and (tiny and not inductor or n1 and ({' or '.join(shapes)}))"
    files = [f"benchmarks/bench_{name}.py" for name in ("ops", "models", "training", "rivals", "breakdown")]
    command = ["-m", "pytest", *files, "--benchmark-only", "-k", rows, "--models", "tiny", "--batches", "1"]
    command += ["--dtypes", "fp32,fp16", "--providers", "eager,fused", "--results", "latest-fields"]
    done = _run(*command, "-p", "no:cacheprovider")
    assert done.returncode == 0, done.stdout[-30000:] + done.stderr[-3000:]
    found = json.loads((results / "latest-fields.json").read_text())
    found.pop("machine")
    counts = {section: len(records) for section, records in found.items()}
    assert counts == {"ops": 6, "models": 4, "training": 3, "rivals": 1, "breakdown": 2}
    assert {row["op"] for row in found["ops"]} == {
        *("depthwise_block", "depthwise_layer", "pointwise_block", "patch_embed", "pool_head"),
        "depthwise_block_train",
    }
    _check_fields(found)
    assert {row["provider"] for row in found["models"] if row["dtype"] == "fp16"} == {"eager", "fused"}


def test_a_run_is_stored_and_compared(tmp_path: Path) -> None:
    """JSON, table and timm's columns; --benchmark-compare-fail passes against itself and fails against a faster run."""
    results = ROOT / "benchmarks" / "results"
    saved_at = results / f"latest-{tmp_path.name}"  # pytest-benchmark wants a folder below the one it runs in
    store = ["--benchmark-storage", f"file://{saved_at.relative_to(ROOT)}"]
    command = ["-m", "pytest", "benchmarks", "--benchmark-only", "--models", "tiny", "--batches", "1"]
    command += ["-p", "no:cacheprovider", "--providers", "fused", "--results", "latest-test", *store]
    done = _run(*command, "--benchmark-save", "first")
    assert done.returncode == 0, done.stdout[-30000:] + done.stderr[-3000:]
    rows = json.loads((results / "latest-test.json").read_text())["models"]
    assert [row["dtype"] for row in rows] == ["fp32", "bf16"] and all(row["match"] for row in rows)
    wanted = {"images_per_s", "gflops", "gb_per_s", "memory", "layout", "backend", "versions", "commit", "error"}
    assert all(wanted <= row.keys() for row in rows)
    table = (results / "latest-test-timm" / "benchmark-infer-fp32-fused.csv").read_text().splitlines()
    assert table[0].split(",")[:3] == ["model", "infer_img_size", "infer_samples_per_sec"] and len(table) == 2
    saved = max(saved_at.rglob("*first.json"))
    content = json.loads(saved.read_text())
    for found in content["benchmarks"]:
        assert found["extra_info"]["match"] is True
        found["stats"]["median"] /= 1e6
    saved.write_text(json.dumps(content))
    done = _run(*command, "--benchmark-compare", "--benchmark-compare-fail", "median:100%")
    shutil.rmtree(saved_at)
    assert done.returncode != 0 and "Performance has regressed" in done.stdout + done.stderr
