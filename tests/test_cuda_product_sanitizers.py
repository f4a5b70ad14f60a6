"""The CUDA product, pooling and epilogue under sanitizers, and with planted bugs, as tests/test_cuda_sanitizers.py."""

from pathlib import Path

import ahead
import emulated
import planted
import pytest

NAMES = ("product_mma", "product_wgmma", "pool_head", "epilogue_inplace", "recast", "unfold")
FILES = {name: f"csrc/cuda/{name}.cu" for name in NAMES}
SOURCES = (*FILES.values(), "tests/emulator/sanitized_product.cpp")


@planted.clean(*SOURCES)
def test_clean(program: planted.Program) -> None:
    planted.check_clean(program)


ARRIVED = "__syncthreads();  // the copies of all threads have arrived, and the stage before this one is free"
RING_FREE = "__syncthreads();  // the ring is free"
FREE = "if (training) __syncthreads();  // the ring has been read: y takes its place"
STAGED = "__syncthreads();  // y is in the ring"
WAIT = "wait_for_copies<G::STAGES - 2>();"
LAST_PIXEL = "pixel >= pixels ? -1 : n * p.y_stride.n"
LAST_BEGIN = "head_kernel(const __grid_constant__ PoolHeadForward p) {\n  begin_chained();\n"
PLANTED = {  # what: file, layout, old, new, checker, what it says
    "no barrier in the ring": ("product_mma", "pixels", ARRIVED, "", "thread", "data race"),
    "no barrier before the sums": ("product_mma", "channels_last", RING_FREE, "", "thread", "data race"),
    "waits for one group too few": ("product_mma", "pixels", WAIT, WAIT.replace("- 2", "- 1"), "values", "wrong"),
    "stores beyond the last pixel": (
        "product_mma",
        "pixels",
        LAST_PIXEL,
        LAST_PIXEL.replace("pixels ?", "pixels + 8 ?"),
        "address",
        "heap-buffer-overflow",
    ),
    "loads beyond k": (
        "product_mma",
        "pixels",
        "offset >= 0 && k0 + r < k_end;",
        "offset >= 0;",
        "address",
        "overflow",
    ),
    "y in a ring that is still read": ("product_mma", "pixels", FREE, "", "thread", "data race"),
    "statistics of a y that is not there": ("product_mma", "channels_last", STAGED, "", "thread", "data race"),
    "statistics of pixels beyond the last": (
        "product_mma",
        "pixels",
        "return left < 0 ? 0 : left < 8 ? left : 8;",
        "return 8;",
        "values",
        "wrong",
    ),
    "statistics of rows beyond the last": (
        "product_mma",
        "channels_last",
        "return y_table[piece * 64 + r] >= 0;",
        "return piece >= 0 && r >= 0;",
        "values",
        "wrong",
    ),
    "copies before begin_chained": (
        "product_mma",
        "pixels",
        "  begin_chained();\n",
        "",
        "values",
        "cp.async before begin_chained",
    ),
    "no begin_chained": (
        "pool_head",
        "pool",
        LAST_BEGIN,
        LAST_BEGIN.replace("  begin_chained();\n", ""),
        "values",
        "ends without begin_chained",
    ),
    "converts beyond the last number": ("recast", "recast", "k < count; k", "k <= count; k", "address", "overflow"),
    "looks at the samples of a thread alone": (
        "recast",
        "recast",
        "changed |= __shfl_xor_sync(~0u, changed, bit);",
        "__shfl_xor_sync(~0u, changed, bit);",
        "values",
        "has exited",
    ),
    "patches that are not yet there": ("unfold", "unfold", "  __syncthreads();\n", "", "thread", "data race"),
    "zeros that are read": ("unfold", "unfold", "(LAST ? e : 0) < k_end ?", "e < 2 * k_end ?", "values", "wrong"),
    "no barrier in the pool": ("pool_head", "pool", "  __syncthreads();\n", "", "thread", "data race"),
}


BUGS = {bug: planted.Bug(FILES[file], *edit) for bug, (file, *edit) in PLANTED.items()}


@planted.bugs(BUGS, SOURCES)
def test_planted_bug_is_caught(program: planted.Program) -> None:
    planted.check_caught(program)


# ---- product_wgmma: all bugs in one program, since most of the time goes into headers

FULL = "mbarrier_wait(shared.full + at.stage, at.parity);"
EMPTY = "mbarrier_wait(shared.empty + at.stage, at.parity ^ 1);"
LAST_RELEASE = "  if (lane < plan.cluster) mbarrier_arrive_in(shared.empty + before, lane);\n"
TURN = "  if (!is_last) barrier_arrive(kTurn + (turn + 1) % Plan::kGroups, 2 * GROUP);\n"
BYTES = "mbarrier_expect(full, Plan::kStageBytes);"
A_RING = "a_ring = operand(ring, 16, EIGHT_ROWS)"
MULTICAST = "full, all);"
START = "cluster_sync();\n  begin_chained();"
END = "cluster_sync();  // the other block still writes here"
LEADING = "B_LEADING = LAST ? 16 : PANEL_BYTES"
OUT = "      if (thread == 0) wait_for_stores_read();\n      barrier_sync"
THERE = "barrier_sync(kStaged + group, GROUP);  // this one is there"
SHOW = "      show_to_copies();\n"
WGMMA = {  # what: old, new, what it says
    "no wait for the tile": (FULL, "", "more arrivals than it counts"),
    "the wrong phase": (EMPTY, EMPTY.replace(" ^ 1", ""), "deadlock"),
    "no wait for an empty stage": (EMPTY, "", "more arrivals than it counts"),
    "a stage released too early": ("wait_for_products<1>();", "", "wrong"),
    "a stage never released": (LAST_RELEASE, "", "deadlock"),
    "a stage not released in the other block": (
        "\n" + LAST_RELEASE,
        "\n"
        + LAST_RELEASE.replace("lane < plan.cluster", "lane == 0").replace(", lane)", ", blockIdx.x % plan.cluster)"),
        "deadlock",
    ),
    "half of the weight not shared": (MULTICAST, MULTICAST.replace("all", "1u << rank"), "deadlock"),
    "the other block not awaited": (START, START.replace("cluster_sync", "__syncthreads"), "was not initialised"),
    "a block that leaves too early": (END, "", "deadlock"),
    "a turn not given": (TURN, "", "deadlock"),
    "too few bytes announced": (BYTES, BYTES.replace("Bytes", "Bytes / 2"), "wrong"),
    "the wrong offset from 8 rows to the next": (A_RING, A_RING.replace("ROWS", "ROWS / 2"), "wrong"),
    "the wrong offset from panel to panel": (LEADING, LEADING.replace("PANEL_BYTES", "EIGHT_ROWS"), "wrong"),
    "no fence": ("    fence_products();\n", "", "without a wgmma.fence"),
    "sums read while they are computed": ("wait_for_products<0>();", "", "wgmma in flight"),
    "a tile overwritten while it is stored": (OUT, "      barrier_sync", "wrong"),
    "a tile stored before it is there": (THERE, "", "without fence.proxy.async"),
    "statistics of panels beyond the last image": ("image_of(panel) < s.n && pixel", "pixel", "wrong"),
    "statistics of pixels beyond the plane": ("s.n && pixel_of(panel) + chunk * 8 < plane ?", "s.n ?", "wrong"),
    "no fence between the proxies": (SHOW, "", "without fence.proxy.async"),
    "the fence between the proxies behind the barrier": (
        f"{SHOW}      {THERE}\n",
        f"      {THERE}\n{SHOW}",
        "without fence.proxy.async",
    ),
    "copies before begin_chained": ("  begin_chained();\n", "", "a load by TMA before begin_chained"),
}


@ahead.once
def bugs_of_wgmma() -> Path:
    """A program with a copy of the kernel for every bug; the environment variable BUG picks one."""
    text = (emulated.ROOT / FILES["product_wgmma"]).read_text()
    headers, _, kernel = text.partition("namespace cmx {\n")
    kernel = emulated.without_fp16(kernel).replace("launch_kernel<T, true>", "launch_kernel<T, false>")
    parts, calls = [headers, "#include <cstdlib>\n"], []
    for i, (bug, (old, new, _)) in enumerate(WGMMA.items()):
        assert kernel.count(old) == 1, f"{bug}: {kernel.count(old)} places for it, wanted one"
        parts.append(f"namespace cmx::bug{i} {{\n{kernel.replace(old, new)}")
        calls.append(f"case {i}: return bug{i}::product_fwd_wgmma(p, plan, stream);")
    parts.append(
        "cudaError_t cmx::product_fwd_wgmma(const ProductForward& p, const WgmmaPlan& plan, cudaStream_t stream) {\n"
        f'switch (std::atoi(std::getenv("BUG"))) {{ {" ".join(calls)} }}\nreturn cudaErrorInvalidValue;\n}}\n'
    )
    others = (path for path in SOURCES if path != FILES["product_wgmma"])
    return emulated.build("program", emulated.written("\n".join(parts), ".cu"), *others)


@emulated.needs(bugs_of_wgmma)
@pytest.mark.parametrize("bug", WGMMA)
def test_planted_bug_in_wgmma_is_caught(bug: str) -> None:
    environment = {**planted.ENVIRONMENT, "BUG": str([*WGMMA].index(bug))}
    done = ahead.run(bugs_of_wgmma(), "wgmma", env=environment)
    assert done.returncode != 0, "nothing was noticed"
    assert WGMMA[bug][2] in done.stdout, done.stdout[:4000]
