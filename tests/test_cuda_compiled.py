"""The CUDA kernels as compiled for every arch: nothing spills, the right instructions are there, the table agrees."""

import itertools

import ahead
import cuda_facts
import pytest

from cmx_kernels import cost_model, registry

NUMBERS = 64  # of a thread of tests/emulator/activations.cu
COLUMNS = ("regs", "stack", "shared", *cuda_facts.COLUMNS, *cuda_facts.LOOP)


@ahead.once
def tools() -> None:
    try:
        cuda_facts.cuobjdump()
    except cuda_facts.Missing as why:
        pytest.skip(f"the gates need nvcc and cuobjdump: {why}")


@ahead.once
def table() -> list[str]:
    tools()
    done = ahead.run_python("tests/cuda_facts.py")
    assert done.returncode == 0, done.stdout[-6000:]
    said = done.stdout.splitlines()
    return said[max(i for i, line in enumerate(said) if line.startswith("nvcc ")) :]  # after what tools may say


pytestmark = ahead.needs(table, first=tools)


@pytest.fixture(scope="module")
def lines() -> list[str]:
    return table()


def _kernels(lines: list[str]) -> dict[tuple[str, str], dict[str, int]]:
    rows = [(line[:7].strip(), line[7:45].strip(), line[45:].split()) for line in lines[2:]]
    return {(arch, name): dict(zip(COLUMNS, map(int, numbers), strict=True)) for arch, name, numbers in rows}


def test_inner_loop_of_ffma(lines: list[str]) -> None:
    """A filter row of the float32 pipes: what it multiplies, its operands' loads, and five instructions."""
    for (arch, name), facts in _kernels(lines).items():
        width = int(name[-2]) if name.startswith("depthwise_fwd_ffma") else 0
        if not width:
            continue
        skip = -(width // 2) % 4
        loads = -(-(skip + width + 7) // 4) + 4 * -(-(skip + width) // 4)
        assert facts["loopFMA"] == 32 * width, f"{arch} {name}: {facts}"
        assert facts["loop"] - facts["loopFMA"] - loads <= 6, f"{arch} {name}: {facts}"


def test_no_local_memory(lines: list[str]) -> None:
    for where, facts in _kernels(lines).items():
        assert (facts["stack"], facts["local"]) == (0, 0), f"{where} spills: {facts}"


def test_registers_allow_the_planned_blocks(lines: list[str]) -> None:
    """Of 65536 registers: depthwise 4 blocks of 128 threads, 3 with the sums of more than 17 columns; product 2 or 3,
    wgmma 1 of 384; rows of training 3 to 7 of 128; the rest 4 of 256."""
    for (arch, name), facts in _kernels(lines).items():
        if name.startswith("activation"):
            continue
        threads, blocks = (128, 4) if name.startswith("depthwise") else (256, 4)
        if name.startswith("depthwise_bwd_mma_large"):
            blocks -= name[-2] in "45"
        if "wgmma" in name:
            threads, blocks = 384, 1
        elif name.startswith("product"):
            threads, blocks = 128, (2, 3, 3)[int(name.rstrip(">")[-1])]
        elif name.startswith("training_rows"):
            along_channels, whole = (int(name[i]) for i in (-5, -2))
            threads, blocks = 128, (4 if along_channels else 7) - (not whole)
        allowed = min(255, 65536 // (threads * blocks) // 8 * 8)
        assert facts["regs"] <= allowed, f"{arch} {name}: {facts}"


def test_no_atomics(lines: list[str]) -> None:
    """Sums are taken in a fixed order."""
    for where, facts in _kernels(lines).items():
        assert facts["atomic"] == 0, f"{where}: {facts}"


def test_instructions(lines: list[str]) -> None:
    for (arch, name), facts in _kernels(lines).items():
        if name.startswith(("pool", "head", "epilogue")):
            assert facts["HMMA"] == 0
            wide = "planes" in name or name.endswith("4>")
            assert facts["load16"] > 0 or not wide, f"{arch} {name} has no 16-byte load"
        elif name.startswith(("training", "batchnorm", "recast", "fold", "widen", "activation")):
            assert facts["HMMA"] == 0
        elif name.startswith("unfold"):
            assert facts["HMMA"] == 0
            assert facts["copy16"] > 0 and facts["store16"] > 0, f"{arch} {name} copies or stores less than 16 bytes"
        elif "wgmma" in name:  # two products for 16 of a step; 3 tiles in, 2 or 4 out
            wanted = {"HMMA": 0, "LDSM": 0, "HGMMA": 8, "TMA": 7 if name.endswith("1>") else 5, "proxy": 2}
            wanted["membar"] = 3  # where clusters meet, and not in a step
            if arch != "sm_90a":
                wanted = {**dict.fromkeys(wanted, 0), "code": 16}  # empty
            assert wanted.items() <= facts.items(), f"{arch} {name}: {facts}"
        elif "mma" in name:
            for instruction in ("HMMA", "LDSM", "store16"):
                assert facts[instruction] > 0, f"{arch} {name} has no {instruction}"
            if "bwd" in name:
                assert facts["load16"] > 0, f"{arch} {name} has no 16-byte load"
                continue
            if "last" in name:  # transposed on its way
                assert facts["load16"] > 0, f"{arch} {name} has no 16-byte load"
                continue
            # an even window starts in the middle of 16 bytes: 8 at a time
            even = "plane" not in name and name.rstrip(">").endswith(("2", "4"))
            assert facts["copy16"] > 0 or even, f"{arch} {name} has no 16-byte cp.async"
        else:
            assert facts["store16"] > 0, f"{arch} {name} has no 16-byte store"
            assert facts["load16"] > 0 or (name.startswith("depthwise_bwd_ffma<") and "float" not in name), (
                f"{arch} {name} has no 16-byte load"
            )
            assert facts["copy16"] > 0 or not name.startswith("depthwise_fwd_ffma<float"), (
                f"{arch} {name} has no 16-byte cp.async"
            )
            assert facts["HMMA"] == 0


@pytest.mark.skipif(registry.C is None, reason=str(registry.WHY_NO_C))
def test_activations(lines: list[str]) -> None:
    """In as many instructions as the cost model says; GELU in at most 15."""
    kernels = _kernels(lines)
    for arch, (i, act) in itertools.product(cuda_facts.ARCHS, enumerate(cost_model.ACTS)):
        for dtype, name, slope in (("float32", "float", 0), ("bfloat16", "bf16", 0), ("float32", "float", 1)):
            whole, rest = (kernels[arch, f"activation<{name}, {n}, {slope}>"]["code"] for n in (i, 0))
            wanted = cost_model.activation_instructions(act, dtype, bool(slope))
            assert round((whole - rest) / NUMBERS) == wanted, f"{arch} {act} {dtype}, {slope=}: {whole}, {rest} without"
            assert slope or wanted <= 15


def test_chained_kernels(lines: list[str]) -> None:
    """launch() may start a kernel early: one without begin_chained would read what is not yet written."""
    chained = ("depthwise", "product", "pool", "head", "unfold")
    for (arch, name), facts in _kernels(lines).items():
        assert facts["chain"] == (2 if arch == "sm_90a" and name.startswith(chained) else 0), f"{arch} {name}: {facts}"
        assert facts["early"] == 0, f"{arch} {name} touches memory before begin_chained: {facts}"


def test_every_instantiation_is_there(lines: list[str]) -> None:
    kernels = _kernels(lines)
    names = {name for _, name in kernels}
    depthwise = 2 * 3 * 5 + 3 * (2 * 2 * 4) + 2 * 2 * 2 * 2 + 2 * 2
    product, other = 2 * (2 * 3 + 1) + 2 * 2, 3 * 3 + 2 * 2 + 3 * 4 * 4 + 2 + 2 + 3 + 2 + 3
    activations = len(cost_model.ACTS) * 3
    assert len(names) == depthwise + product + other + activations
    assert set(kernels) == {(arch, name) for arch in cuda_facts.ARCHS for name in names}


def test_table(lines: list[str]) -> None:
    """Exact for the nvcc that made the table; another release may schedule otherwise, and has the rules above only."""
    wanted = cuda_facts.TABLE.read_text().splitlines()
    if lines[0] != wanted[0]:
        pytest.skip(f"tests/cuda_facts.txt is of {wanted[0]}, and this is {lines[0]}")
    changed = [f"- {a}\n+ {b}" for a, b in zip(wanted, lines, strict=False) if a != b]
    assert lines == wanted, "\n".join(["meant? python tests/cuda_facts.py > tests/cuda_facts.txt", wanted[1], *changed])
