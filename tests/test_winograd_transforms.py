"""Toom and Cook's transforms in rational numbers: the identity behind the kernel, and how much rounding it costs."""

from __future__ import annotations

import math
import re
from fractions import Fraction

import pytest
from inception_fast.kernels.cpu.winograd import TILES

import numerics
from checkout import ROOT

Matrix = list[list[Fraction]]
HEADER = (ROOT / "kernels" / "cpu" / "winograd_axis.h").read_text()
AXES = sorted(
    {axis for kernel, tiles in TILES.items() for tile in tiles for axis in zip(tile, kernel, strict=True)} - {(1, 1)}
)


def points(pairs: int) -> list[Fraction]:
    """Those of the kernels, from their source: 0, then each pair's."""
    (row,) = re.findall(rf"Points<{pairs}> {{\s+static constexpr double a\[{pairs}\] = {{([^}}]+)}};", HEADER)
    found = [Fraction(number.strip()) for number in row.split(",")]
    assert len(found) == pairs
    return [Fraction(0), *(sign * a for a in found for sign in (1, -1))]


def product(roots: list[Fraction]) -> list[Fraction]:
    """prod(t - root) by powers of t."""
    found = [Fraction(1)]
    for root in roots:
        found = [a - root * b for a, b in zip([Fraction(0), *found], [*found, Fraction(0)], strict=True)]
    return found


def transforms(outputs: int, taps: int) -> tuple[Matrix, Matrix, Matrix]:
    """A', G and B' as the header's comment defines them."""
    n = outputs + taps - 1
    at = points(n // 2 - 1)
    rows = [product([q for q in at if q != p]) for p in at]
    slopes = [math.prod((p - q for q in at if q != p), start=Fraction(1)) for p in at]
    b = [[*row, Fraction(0)] for row in rows] + [product(at)]
    g = [[p**k / slope for k in range(taps)] for p, slope in zip(at, slopes, strict=True)]
    a = [[p**i for p in at] + [Fraction(i == outputs - 1)] for i in range(outputs)]
    return a, [*g, [Fraction(k == taps - 1) for k in range(taps)]], b


@pytest.mark.parametrize(("outputs", "taps"), AXES)
def test_the_transforms_are_a_correlation(outputs: int, taps: int) -> None:
    """A'[(G w) . (B' x)] at output i is the sum of w[k] x[i + k]: exactly, coefficient by coefficient."""
    a, g, b = transforms(outputs, taps)
    n = outputs + taps - 1
    assert len(a) == outputs and len(g) == len(b) == n
    for i in range(outputs):
        for k in range(taps):
            for x in range(n):
                assert sum(a[i][p] * g[p][k] * b[p][x] for p in range(n)) == (x == i + k)


@pytest.mark.parametrize(("outputs", "taps"), AXES)
def test_maps_meet_exact_coefficients(outputs: int, taps: int) -> None:
    """A' and B' are float32 numbers: only the weights' transform is rounded, once."""
    a, _, b = transforms(outputs, taps)
    for value in (value for matrix in (a, b) for row in matrix for value in row):
        numerator, denominator = abs(value.numerator), value.denominator
        assert denominator & (denominator - 1) == 0 and numerator < 2**24


@pytest.mark.parametrize(("outputs", "taps"), AXES)
def test_growth_of_the_rounding_error(outputs: int, taps: int) -> None:
    a, g, b = transforms(outputs, taps)
    norms = [float(sum(v * v for v in u) * sum(v * v for v in w)) for u, w in zip(g, b, strict=True)]
    squares = [sum(float(c * c) * norm for c, norm in zip(row, norms, strict=True)) / taps for row in a]
    found = math.sqrt(sum(squares) / outputs), math.sqrt(max(squares))
    stated = numerics.WINOGRAD_GROWTH[outputs, taps]
    assert all(x <= y <= 1.01 * x for x, y in zip(found, stated, strict=True)), found


def test_the_kernels_tiles_are_the_rules() -> None:
    source = (ROOT / "kernels" / "cpu" / "winograd_pack.cpp").read_text()
    listed = re.search(r"> tiles{(.*?)};", source, re.DOTALL)
    assert listed is not None
    found = [tuple(map(int, row.split(","))) for row in re.findall(r"{(\d+, \d+, \d+, \d+)}", listed[1])]
    assert sorted(found) == sorted((*kernel, *tile) for kernel, tiles in TILES.items() for tile in tiles)
