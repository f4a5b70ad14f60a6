"""Instruction sets of the CPU kernels: which one is chosen, and that each is another."""

import re
from pathlib import Path

import cases
import pytest
from compare import check
from fresh import python

from cmx_kernels import ops, registry

pytestmark = pytest.mark.skipif(registry.C is None, reason=str(registry.WHY_NO_C))


LEVEL = "from cmx_kernels import registry; print(registry.isa_level())"


def test_level_chosen() -> None:
    """The last, but not Intel's bfloat16 pairs, half as fast as float32 (Cooper Lake's, model 85, are not)."""
    *others, wanted = registry.C.isa_levels()
    if wanted == "avx512bf16":
        cpu = dict(re.findall(r"^(vendor_id|model)\s*: (.*)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE))
        wanted = others[-1] if cpu["vendor_id"] == "GenuineIntel" and cpu["model"] != "85" else wanted
    assert python(LEVEL).stdout.strip() == wanted


def test_environment_chooses() -> None:
    for level in registry.C.isa_levels():
        done = python(LEVEL, CMX_ISA=level)
        assert done.stdout.strip() == level, done.stderr
    done = python(LEVEL, CMX_ISA="avx1024")
    assert f"CMX_ISA: isa level: got 'avx1024', wanted one of {', '.join(registry.C.isa_levels())}" in done.stderr


def test_instruction_sets(isa: str) -> None:
    """Set and read back; an unknown name is refused and changes nothing."""
    assert registry.isa_level() == isa
    with pytest.raises(ValueError, match=f"got 'avx1024', wanted one of {', '.join(registry.C.isa_levels())}"):
        registry.C.set_isa_level("avx1024")
    assert registry.isa_level() == isa


def test_levels_differ_and_agree() -> None:
    """Every level really runs its own code: widths differ, results agree to rounding."""
    lanes, results = set(), []
    args, expected = cases.problem("pointwise_block", (2, 64, 48, 14, 14))
    before = registry.isa_level()
    try:
        for level in registry.C.isa_levels():
            registry.C.set_isa_level(level)
            lanes.add(registry.C.lanes())
            results.append(ops.pointwise_block(*args))
            check(results[-1], expected)
    finally:
        registry.C.set_isa_level(before)
    assert len(lanes) >= len(registry.C.isa_levels()) - 2  # avx512bf16 and amx have avx512's
