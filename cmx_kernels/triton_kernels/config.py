"""The only tuned numbers: tiles, warps and stages by operator, GPU and size. [pred]: chosen by registers, shared memory
and occupancy as compiled (tests/triton_facts_*.txt); none was measured on a GPU.
"""

from typing import NamedTuple

import torch


class Gemm(NamedTuple):
    """A tile [rows, columns] of the result, depth of a step, columns of tiles in a group."""

    rows: int
    columns: int
    depth: int
    group: int
    warps: int
    stages: int
    most_programs: int = 2**31 - 1  # where programs take several tiles
    descriptors: bool = False

    def programs(self, rows: int, columns: int) -> int:
        return min(-(-rows // self.rows) * -(-columns // self.columns), self.most_programs)


class Bands(NamedTuple):
    """Depthwise on tensor cores: a program takes ``rows`` rows of the image planes."""

    rows: int
    warps: int
    stages: int


class Strip(NamedTuple):
    """Depthwise by multiply-adds: a program takes [channels, columns] of ``rows`` rows."""

    channels: int
    columns: int
    rows: int
    warps: int


class Pool(NamedTuple):
    """A pass over pixels: a program takes [channels, pixels] at a time."""

    channels: int
    pixels: int
    warps: int


class Walk(NamedTuple):
    """Gradient of the depthwise weight: a program takes [channels, columns], walks down ``rows`` rows of planes, and
    sums for kernel_rows x kernel_columns taps of the filter."""

    channels: int
    columns: int
    rows: int
    kernel_rows: int
    kernel_columns: int
    warps: int


def family(arch: int) -> int:
    """0 interpreted, 80 (mma; sm_120 too, with its 99 KB of shared memory), 90 (wgmma), 100 (tcgen05)."""
    return 0 if arch == 0 else 90 if 90 <= arch < 100 else 100 if 100 <= arch < 120 else 80


def pointwise(
    arch: int, dtype: torch.dtype, precision: str, rows: int, columns: int, multiprocessors: int, aligned: bool
) -> Gemm:
    """``aligned``: copies of 16 bytes can be. Two programs a multiprocessor: one stores while the other multiplies."""
    gpu = family(arch)
    if gpu == 0:
        return Gemm(32, 32, 32, 2, 1, 1, multiprocessors, descriptors=True)
    programs = 2 * multiprocessors
    if dtype == torch.float32 and precision == "ieee":  # multiply-adds
        return Gemm(64, 64, 16, 8, 4, 3, programs)
    if not aligned:
        return Gemm(64, 64, 32, 8, 8, 2, programs)
    depth = 32 if dtype == torch.float32 else 64
    if -(-rows // 128) * -(-columns // 128) < multiprocessors:
        return Gemm(64, 64, depth, 8, 4, 4, programs, gpu >= 90)
    if gpu == 80:
        return Gemm(128, 128, depth, 8, 8, 3, programs)
    if gpu == 100 or dtype == torch.float32:
        return Gemm(128, 128, depth, 8, 8, 2, programs, True)
    return Gemm(128, 128, depth, 8, 4, 2, programs, True)


def pointwise_pointers(c: Gemm) -> Gemm:
    """The same where descriptors cannot be: addresses take registers."""
    return c._replace(warps=8, stages=3) if c.rows == 128 else c


def patch_embed(arch: int, dtype: torch.dtype, precision: str) -> Gemm:
    if family(arch) == 0:
        return Gemm(64, 64, 64, 2, 1, 1)
    if dtype == torch.float32 and precision == "ieee":
        return Gemm(64, 64, 16, 8, 4, 2)
    return Gemm(64, 128, 32, 8, 4, 2)


def bands(arch: int, rows: int, columns: int) -> Bands:
    """``rows`` = images * height; ``columns`` of one tile."""
    if family(arch) == 0:
        return Bands(32, 1, 1)
    if rows <= 32:
        return Bands(32, 1, 2)
    return Bands(64, 4, 2) if rows <= 64 or columns > 32 else Bands(128, 4, 2)


def strip(arch: int, width: int, channels_last: bool, kernel_height: int) -> Strip:
    if family(arch) == 0:
        return Strip(32, 32, 3, 1)
    rows = 8 if kernel_height <= 17 else 2  # a column of the filter is in registers too
    if channels_last:
        return Strip(64, 2, rows, 4)
    columns = min(max(16, 1 << (width - 1).bit_length()), 64)
    return Strip(128 // columns, columns, rows, 4)


def walk(arch: int, width: int, channels_last: bool, kernel_height: int, kernel_width: int) -> Walk:
    """The sums of 9 x 9 taps at most, and 9 rows of X, are in registers. Larger filters go to several programs."""
    most = 9 if family(arch) else 4
    kys, kxs = (-(-size // -(-size // most)) for size in (kernel_height, kernel_width))
    if family(arch) == 0:
        return Walk(16, 16, 5, kys, kxs, 1)
    if channels_last:
        return Walk(64, 2, 32, kys, kxs, 4)
    columns = min(max(16, 1 << (width - 1).bit_length()), 64)
    return Walk(128 // columns, columns, 32, kys, kxs, 4)


def training_rows(arch: int, pixels: int, channels_last: bool) -> Pool:
    """Passes of training: 8 numbers a thread."""
    if family(arch) == 0:
        return Pool(16, 32, 1)
    if channels_last:
        return Pool(64, 16, 4)
    columns = min(max(16, 1 << (pixels - 1).bit_length()), 512)
    return Pool(1024 // columns, columns, 4)


def splits(tiles: int, groups: int, multiprocessors: int) -> int:
    """In how many parts to take the tiles of each group of channels: 16 programs a multiprocessor, where there are."""
    return max(1, min(tiles, -(-16 * multiprocessors // groups)))


def pool(arch: int, channels_last: bool) -> Pool:
    if family(arch) == 0:
        return Pool(16, 32, 1)
    return Pool(64, 32, 4) if channels_last else Pool(8, 256, 4)


HEAD_CLASSES = 128  # of a program that pools and multiplies


def head_is_one_launch(images: int, image_bytes: int, weight_bytes: int, classes: int, multiprocessors: int) -> bool:
    """[pred] One launch saves 3 us, and reads each image once for every 128 classes, with fewer programs.

    All multiprocessors together read 4.3 TB/s (an H200), one at most 100 GB/s. Of the released networks none gets one
    launch (8 blocks of classes, at batch 1 8 programs: 18 us against 4 for 768/32); 256/8 on CIFAR-10 does.
    """
    blocks = -(-classes // HEAD_CLASSES)
    waves = -(-images * blocks // multiprocessors)
    rate = min(100e9, 4.3e12 / min(images * blocks, multiprocessors))
    one = waves * (image_bytes + weight_bytes / blocks) / rate
    return bool(one < 3e-6 + (images * image_bytes + weight_bytes) / 4.3e12)


def head(arch: int) -> Gemm:
    return Gemm(16, 16, 32, 2, 1, 1) if family(arch) == 0 else Gemm(16, 32, 64, 8, 4, 3)
