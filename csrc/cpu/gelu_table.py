"""Writes gelu_table.h: Phi(-a) on [0, 6] as segments of degree 3 around their middles, exactly 0 at the end."""

import math
from pathlib import Path

import numpy as np

SEGMENTS, DEGREE = 32, 3
END, SCALE = 6.0, 5.0  # segment = round(a * SCALE), d = a * SCALE - segment; the product of both is exact: d = 0 at END


def table() -> np.ndarray:
    """float32 [degree + 1, segments], the coefficients of d^0 .. d^degree: Chebyshev fits in float64."""
    z = np.cos(np.pi * (np.arange(12) + 0.5) / 12)
    columns = []
    for i in range(SEGMENTS):
        phi = [0.5 * math.erfc((i + v / 2) / SCALE / math.sqrt(2)) for v in z]
        fit = np.polynomial.chebyshev.cheb2poly(np.polynomial.chebyshev.chebfit(z, phi, DEGREE))
        columns.append(fit * 2.0 ** np.arange(DEGREE + 1))
    found = np.array(columns).T.astype(np.float32)
    found[0, round(END * SCALE)] = 0  # Phi(-6) is 1e-9
    return found


def header() -> str:
    rows = ",\n".join("    {" + ", ".join(f"{v:.8e}f" for v in row) + "}" for row in table())
    return (
        "// clang-format off\n"
        "// Written by gelu_table.py: Phi(-a), segment = round(a * kGeluScale), powers of the distance to it.\n"
        "#pragma once\n\n"
        f"constexpr float kGeluScale = {SCALE:.8e}f, kGeluEnd = {END:.8e}f;\n"
        f"alignas(64) static const float kGeluTable[{DEGREE + 1}][{SEGMENTS}] = {{\n{rows}}};\n"
    )


if __name__ == "__main__":
    Path(__file__).with_name("gelu_table.h").write_text(header())
