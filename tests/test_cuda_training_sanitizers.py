"""The CUDA kernels of training under sanitizers, and with planted bugs, as tests/test_cuda_sanitizers.py."""

import planted
from test_cuda_sanitizers import KERNEL_FILES

FILES = {f"backward_{kernel}": f"csrc/cuda/depthwise_bwd_{kernel}.cu" for kernel in ("ffma", "mma", "mma_large")}
FILES |= {"forward": KERNEL_FILES["ffma"], "rows": "csrc/cuda/training_rows.cu"}
OTHERS = ("csrc/cuda/depthwise_fwd.cu", "csrc/cuda/training_final.cu", "tests/emulator/sanitized_training.cpp")
SOURCES = (*sorted({*KERNEL_FILES.values(), *FILES.values()}), *OTHERS)


@planted.clean(*SOURCES)
def test_clean(program: planted.Program) -> None:
    planted.check_clean(program)


LOADED = "    load_input<T>(x, at, p, plan);\n    __syncthreads();\n"
GUARD = "    if (y + i >= s.h) {"
MERGE = "    __syncthreads();\n    if (patch % (2"
RESULTS = "      __syncwarp();  // da has been read: the results take its place\n"
FREE = "    __syncwarp();  // the stage is free\n"
BROUGHT = "    __syncwarp();  // da and act(x) are there\n"
SUMMED = "  __syncthreads();  // the sums of all warps are there\n"
TURNED = "expand_filter<T, WINDOW, true>"
AROUND = "around = plan.rows - G::ROWS"
INPUT = "tile + plan.stage_bytes - 32"
OUTSIDE = "!column || !image || left <= 0 ? 0u"
LARGE_BROUGHT = "__syncthreads();  // da, act(x) and x' are there, and the filter"
LARGE_RESULTS = "__syncthreads();  // da has been read: the results take its place; then, the shares before are there"
LARGE_FREE = "__syncthreads();  // the stage is free"
PAIR, PAIR_READ = "__syncthreads();  // one pair of every warp is there", "__syncthreads();  // and has been read"
ROWS_MERGE = "    __syncthreads();\n    if (lane_u"
PLANTED = {  # what: what runs, old, new, checker, what it says
    "no barrier after the load": ("backward_ffma", LOADED, LOADED.split("\n")[0] + "\n", "thread", "data race"),
    "no barrier before the filter's sums": (
        "backward_ffma",
        "__syncthreads();  // x' is there",
        "",
        "thread",
        "data race",
    ),
    "stores below the last row": ("backward_ffma", GUARD, "    if (false) {", "address", "heap-buffer-overflow"),
    "not turned": ("backward_ffma", "load_weights<T, true>", "load_weights<T, false>", "values", "wrong"),
    "no barrier between merges": ("forward", MERGE, MERGE[21:], "thread", "data race"),
    "mma: not turned": (
        "backward_mma",
        TURNED,
        TURNED.replace("true", "false"),
        "values",
        "wrong",
    ),
    "mma: no barrier after the load": ("backward_mma", BROUGHT, "", "thread", "data race"),
    "mma: results over da that is still read": ("backward_mma", RESULTS, "", "thread", "data race"),
    "mma: next tile over results that are still read": ("backward_mma", FREE, "", "thread", "data race"),
    "mma: no barrier before the sums of warps": ("backward_mma", SUMMED, "", "thread", "data race"),
    "mma: stores below the last row": (
        "backward_mma",
        "at.y + r.row < s.h && x < s.w; };",
        "x < s.w; };",
        "address",
        "heap-buffer-overflow",
    ),
    "mma: a row of da too few": ("backward_mma", AROUND, f"{AROUND} - 2", "values", "wrong"),
    "mma: act(x) where results lie": ("backward_mma", INPUT, INPUT.replace("- 32", "- 48"), "values", "wrong"),
    "mma: x' of pixels outside of the plane": ("backward_mma", OUTSIDE, "0 ? 0u", "values", "wrong"),
    "large: not turned": ("backward_mma_large", TURNED, TURNED.replace("true", "false"), "values", "wrong"),
    "large: no barrier after the load": ("backward_mma_large", LARGE_BROUGHT, "", "thread", "data race"),
    "large: results over da that is still read": ("backward_mma_large", LARGE_RESULTS, "", "thread", "data race"),
    "large: next tile over results that are still read": ("backward_mma_large", LARGE_FREE, "", "thread", "data race"),
    "large: no barrier before a pair's sums": ("backward_mma_large", PAIR, "", "thread", "data race"),
    "large: the next pair over sums that are still read": ("backward_mma_large", PAIR_READ, "", "thread", "data race"),
    "large: one share of the filter": ("backward_mma_large", "if (turn < SHARES - 1)", "if (false)", "values", "wrong"),
    "large: x' of pixels outside of the plane": (
        "backward_mma_large",
        "inside && x + j < s.w ? affine",
        "true ? affine",
        "values",
        "wrong",
    ),
    "rows: no barrier between merges": (
        "rows",
        ROWS_MERGE,
        ROWS_MERGE[21:],
        "thread",
        "data race",
    ),
}


BUGS = {bug: planted.Bug(FILES[what], what, *edit) for bug, (what, *edit) in PLANTED.items()}


@planted.bugs(BUGS, SOURCES)
def test_planted_bug_is_caught(program: planted.Program) -> None:
    planted.check_caught(program)
