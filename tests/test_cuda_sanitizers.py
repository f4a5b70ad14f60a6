"""The CUDA kernels under AddressSanitizer, UBSan and ThreadSanitizer, and with planted bugs (tests/planted.py)."""

import emulated
import planted

KERNEL_FILES = {kernel: f"csrc/cuda/depthwise_fwd_{kernel}.cu" for kernel in emulated.KERNELS}
SOURCES = (*KERNEL_FILES.values(), "tests/emulator/sanitized.cpp")


@planted.clean(*SOURCES)
def test_clean(program: planted.Program) -> None:
    planted.check_clean(program)


LOADED = "    __syncthreads();\n    const int y"
SYNC_LOADED = "    }\n    __syncwarp();\n\n    float acc"
REFILL = "    __syncwarp();  // the stage is free\n"
FILTER = "  __syncthreads();\n\n  const ChannelConstants"
TAPS = "  __syncthreads();\n  uint32_t filter[G::PAIRS][2][2];"
MINE = "const float* const mine = plane +"
STORED = "if (y + i < s.h) store8("
ZEROS = "      put(tile + 4 * i, make_float4(0, 0, 0, 0));\n    __syncthreads();\n"
INSIDE = "row_inside && column >= 0 && column < s.w;"
PLANTED = {  # what: kernel, old, new, checker, what it says
    "no barrier after the load": ("ffma", LOADED, LOADED[21:], "thread", "data race"),
    "no barrier after the load, values": ("ffma", LOADED, LOADED[21:], "values", "wrong"),
    "no barrier before the next load": (
        "ffma",
        "    __syncthreads();  // the tile is free\n",
        "",
        "thread",
        "data race",
    ),
    "barrier in a branch": ("ffma", LOADED, f"    if (threadIdx.x)\n{LOADED}", "values", "__syncthreads"),
    "shared memory, a row too far": (
        "ffma",
        MINE,
        f"{MINE} plan.tile_rows * plan.pitch +",
        "address",
        "use-after-poison",
    ),
    "stores below the last row": ("ffma", STORED, STORED[17:], "address", "heap-buffer-overflow"),
    "no barrier after the zeros around a plane": ("ffma", ZEROS, ZEROS[:-21], "thread", "data race"),
    "does not wait for a plane": ("ffma", "    wait_for_copies<0>();\n", "", "values", "cp.async in flight"),
    "keeps the filters of the channels before": (
        "ffma",
        "unit = 0, ++group, new_group = true;",
        "unit = 0, ++group;",
        "values",
        "wrong",
    ),
    "loads beyond the last column": (
        "mma",
        INSIDE,
        INSIDE.replace(" && column < s.w", ""),
        "address",
        "heap-buffer-overflow",
    ),
    "no warp barrier after the wait": (
        "mma_plane",
        SYNC_LOADED,
        SYNC_LOADED.replace("__syncwarp();", ""),
        "thread",
        "data race",
    ),
    "no warp barrier before the refill": ("mma", REFILL, "", "thread", "data race"),
    "no warp barrier before the refill, values": ("mma", REFILL, "", "values", "wrong"),
    "waits for one group too few": (
        "mma_plane",
        "wait_for_copies<STAGES - 1>();",
        "wait_for_copies<STAGES>();",
        "values",
        "wrong",
    ),
    "does not wait at the end": ("mma", "  wait_for_copies<0>();\n", "", "values", "cp.async in flight"),
    "no barrier after the filter": ("mma", FILTER, FILTER[19:], "thread", "data race"),
    "no barrier after the taps": ("mma_plane", TAPS, TAPS[19:], "thread", "data race"),
    "no zeros around the plane": ("mma_plane", "  if (around < K - 1)\n", "  if (around > K)\n", "values", "wrong"),
    "channels last: no barrier after the load": (
        "mma_last",
        "__syncthreads();  // x is there",
        "",
        "thread",
        "data race",
    ),
    "channels last: no barrier before the store": (
        "mma_last",
        "__syncthreads();  // the results are there",
        "",
        "thread",
        "data race",
    ),
    "channels last: no barrier before the next load": (
        "mma_last",
        "__syncthreads();  // the planes are free",
        "",
        "thread",
        "data race",
    ),
    "channels last: loads beyond the last column": (
        "mma_last",
        " && column + 1 < s.w;",
        ";",
        "address",
        "heap-buffer-overflow",
    ),
    "channels last: stores beyond the last column": (
        "mma_last",
        "if (column + 1 < s.w) put_piece",
        "put_piece",
        "address",
        "heap-buffer-overflow",
    ),
}


BUGS = {bug: planted.Bug(KERNEL_FILES[what], what, *edit) for bug, (what, *edit) in PLANTED.items()}


@planted.bugs(BUGS, SOURCES)
def test_planted_bug_is_caught(program: planted.Program) -> None:
    planted.check_caught(program)
