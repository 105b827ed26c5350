"""Precision, recall, density and coverage from nearest neighbours, Naeem et al., arXiv:2002.09797."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from .._numbers import check_integer
from .statistics import Doubles, as_rows, check_widths

NEIGHBOURS, BLOCK = 5, 2048


class Neighbours(NamedTuple):
    """Shares of images, except density, which can exceed 1."""

    precision: float
    recall: float
    density: float
    coverage: float


def precision_recall_density_coverage(
    generated: Any, real: Any, *, neighbours: int = NEIGHBOURS, block: int = BLOCK
) -> Neighbours:
    """How generated and real features [n, d] lie in each other's balls of `neighbours` nearest neighbours.

    Distances are made in blocks of `block` rows, so memory is `block` squared; arrays on disk are read in blocks. One
    that equals a ball's radius up to rounding lies outside.

    Raises ValueError where a set has no more than `neighbours` rows, or the two are not as wide.
    """
    neighbours, block = check_integer("neighbours", neighbours), check_integer("block", block)
    check_neighbours(neighbours, min(len(generated), len(real)))
    check_widths(generated, real)
    if block < 1:
        raise ValueError(f"blocks of {block} rows; allowed: 1 or more")
    centre = _centre(real)
    real_radius = _radii(real, centre, neighbours, block)
    generated_radius = _radii(generated, centre, neighbours, block)
    inside, density = np.zeros(len(generated), bool), 0
    recalled, covered = np.zeros(len(real), bool), np.zeros(len(real), bool)
    for i, x in _blocks(generated, centre, block):
        for j, y in _blocks(real, centre, block):
            distance, rounding = _distances(x, y)
            distance += 2 * rounding  # the radius is rounded as well
            balls = distance < real_radius[j]
            density += int(balls.sum())
            inside[i] |= balls.any(axis=1)
            covered[j] |= balls.any(axis=0)
            recalled[j] |= (distance < generated_radius[i, None]).any(axis=0)
    return Neighbours(
        float(inside.mean()),
        float(recalled.mean()),
        density / (neighbours * len(generated)),
        float(covered.mean()),
    )


def check_neighbours(neighbours: int, least: int) -> None:
    """Raises ValueError for more neighbours than an image has among the `least` of the smaller set."""
    if not 1 <= neighbours < least:
        raise ValueError(f"{neighbours} neighbours; allowed: 1 to {least - 1}, fewer than the images of each set")


def _centre(rows: Any) -> Doubles:
    """The median [d] of some 2048 rows: one that lies far out moves a mean, and costs all others their digits."""
    step = -(-len(rows) // BLOCK)
    centre: Doubles = np.median(as_rows(rows[::step], numbers=range(0, len(rows), step)), axis=0)
    return centre


def _blocks(rows: Any, centre: Doubles, block: int) -> Iterator[tuple[slice, Doubles]]:
    """Portions of the rows round `centre`: squares of what all features share would cost digits of their distances."""
    for start in range(0, len(rows), block):
        place = slice(start, min(start + block, len(rows)))
        yield place, as_rows(rows[place], start) - centre


def _distances(x: Doubles, y: Doubles) -> tuple[Doubles, Doubles]:
    """Squared Euclidean distances [n, m], and how far each may be from the true one; below that it is 0.

    A product of matrices rounds otherwise in blocks of another size. Where features repeat, equal distances must stay
    equal in all of them.
    """
    sizes = (x * x).sum(axis=1)[:, None] + (y * y).sum(axis=1)
    rounding = (x.shape[1] + 4) * np.finfo(np.float64).eps * sizes
    squares = sizes - 2 * (x @ y.T)
    return np.where(squares > rounding, squares, 0), rounding


def _radii(rows: Any, centre: Doubles, neighbours: int, block: int) -> NDArray[np.float64]:
    """Squared distance of every row to its k-th neighbour, itself not counted."""
    radii = np.empty(len(rows))
    for i, x in _blocks(rows, centre, block):
        nearest = np.full((len(x), 0), np.inf)
        for _, y in _blocks(rows, centre, block):
            nearest = np.concatenate([nearest, _distances(x, y)[0]], axis=1)
            if nearest.shape[1] > neighbours + 1:
                nearest = np.partition(nearest, neighbours, axis=1)[:, : neighbours + 1]
        radii[i] = nearest.max(axis=1)
    return radii
