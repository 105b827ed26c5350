"""Kernel Inception distance, Bińkowski et al., arXiv:1801.01401."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from .._numbers import check_integer
from .statistics import Doubles, as_rows, check_rows, check_widths

SUBSETS, SUBSET_SIZE, SEED = 100, 1000, 2020  # torch-fidelity's


class KernelDistance(NamedTuple):
    """Mean and standard deviation over the subsets."""

    mean: float
    std: float


def kernel_inception_distance(
    a: Any, b: Any, *, subsets: int = SUBSETS, subset_size: int = SUBSET_SIZE, seed: int = SEED
) -> KernelDistance:
    """Unbiased squared MMD with the kernel (x y / d + 1)^3 on random subsets, drawn as torch-fidelity draws them.

    Args:
        a, b: features [n, d]; arrays on disk are read a subset at a time.

    Raises ValueError for fewer rows than `subset_size`, which must be at least 2, and for features of two widths.
    """
    subsets, subset_size = check_integer("subsets", subsets), check_integer("subset_size", subset_size)
    for features in (a, b):
        check_rows(features)
    check_subset_size(subset_size, min(len(a), len(b)))
    check_widths(a, b)
    if subsets < 1:
        raise ValueError(f"{subsets} KID subsets; allowed: 1 or more")
    draw = np.random.RandomState(seed)
    values = []
    for _ in range(subsets):
        drawn = [np.sort(draw.choice(len(rows), subset_size, replace=False)) for rows in (a, b)]
        x, y = (as_rows(rows[taken], numbers=taken) for rows, taken in zip((a, b), drawn, strict=True))
        values.append(_squared_mmd(x, y))
    return KernelDistance(float(np.mean(values)), float(np.std(values)))


def check_subset_size(size: int, least: int) -> None:
    """Raises ValueError for subsets that `least` images, those of the smaller side, cannot fill."""
    if not 2 <= size <= least:
        raise ValueError(f"KID subset size {size}; allowed: 2 to {least}, the smaller number of images")


def _squared_mmd(x: Doubles, y: Doubles) -> float:
    m = len(x)
    within = [(k.sum() - np.trace(k)) / (m * (m - 1)) for k in (_kernel(x, x), _kernel(y, y))]
    return float(within[0] + within[1] - 2 * _kernel(x, y).mean())


def _kernel(x: Doubles, y: Doubles) -> Doubles:
    values: Doubles = (x @ y.T / x.shape[1] + 1) ** 3
    return values
