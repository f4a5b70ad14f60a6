"""Writes gelu_table.h: functions of a on [0, 6] as segments around their middles, exactly 0 at the end.

Phi(-a) in degree 3, and -a Phi(-a) in degree 2 for results that are rounded to bfloat16.
"""

import math
from collections.abc import Callable
from pathlib import Path

import numpy as np

SEGMENTS = 32
END, SCALE = 6.0, 5.0  # segment = round(a * SCALE), d = a * SCALE - segment; the product of both is exact: d = 0 at END
NEAR_SCALE = 4.0  # a power of two: the segment comes from an addition


def phi(a: float) -> float:
    return 0.5 * math.erfc(a / math.sqrt(2))


def table(function: Callable[[float], float], scale: float, degree: int, unit: float) -> np.ndarray:
    """float32 [degree + 1, segments], the coefficients of d^0 .. d^degree: Chebyshev fits in float64.

    unit: of d, in segments.
    """
    z = np.cos(np.pi * (np.arange(12) + 0.5) / 12)
    columns = []
    for i in range(SEGMENTS):
        values = [function((i + v / 2) / scale) for v in z]
        fit = np.polynomial.chebyshev.cheb2poly(np.polynomial.chebyshev.chebfit(z, values, degree))
        columns.append(fit * (2.0 / unit) ** np.arange(degree + 1))
    found = np.array(columns).T.astype(np.float32)
    found[0, round(END * scale)] = 0  # Phi(-6) is 1e-9
    return found


def near() -> np.ndarray:
    """Powers of a itself: what they lose to one another is less than rounding to bfloat16 leaves.

    Around 0 the first terms of the series, so that small results are as exact as others; the last segment is 0.
    """
    found = table(lambda a: -a * phi(a), NEAR_SCALE, 2, 1 / NEAR_SCALE).astype(np.float64)
    found[:, 0] = 0, -0.5, 1 / math.sqrt(2 * math.pi)
    middle = np.arange(SEGMENTS) / NEAR_SCALE
    c0, c1, c2 = found
    found = np.array([c0 - c1 * middle + c2 * middle**2, c1 - 2 * c2 * middle, c2])
    found[:, round(END * NEAR_SCALE) :] = 0  # -6 Phi(-6) is -6e-9
    return found.astype(np.float32)


def lines(name: str, found: np.ndarray) -> str:
    rows = ",\n".join("    {" + ", ".join(f"{v:.8e}f" for v in row) + "}" for row in found)
    return f"alignas(64) static const float {name}[{len(found)}][{SEGMENTS}] = {{\n{rows}}};\n"


def header() -> str:
    return (
        "// clang-format off\n"
        "// Written by gelu_table.py: Phi(-a), segment = round(a * kGeluScale), powers of the distance to it;\n"
        "// -a Phi(-a), segment = round(a * kGeluNearScale), powers of a.\n"
        "#pragma once\n\n"
        f"constexpr float kGeluScale = {SCALE:.8e}f, kGeluEnd = {END:.8e}f, kGeluNearScale = {NEAR_SCALE:.8e}f;\n"
        + lines("kGeluTable", table(phi, SCALE, 3, 1))
        + lines("kGeluNear", near())
    )


if __name__ == "__main__":
    Path(__file__).with_name("gelu_table.h").write_text(header())
