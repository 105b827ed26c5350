"""The Fréchet distance between two Gaussians, by symmetric eigenvalues.

    d = |m1 - m2|^2 + tr(S1) + tr(S2) - 2 tr((S1 S2)^(1/2))

With S = F^T F from its eigenvectors, the last trace is the sum of the singular values of F1 F2^T: no root of a matrix
that is not symmetric, no complex numbers, and zero eigenvalues, of which few images leave many, drop out before a root
magnifies their rounding. (Dowson and Landau, 1982.)
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch

from .statistics import Doubles, Gaussian, checked_moments


def frechet_distance(a: Gaussian, b: Gaussian) -> float:
    """The distance, 0 at least; seconds for 2048 features.

    Raises TypeError for what is no Gaussian, ValueError where the widths differ, for a covariance that is none, or
    where float64 cannot hold the distance.
    """
    a, b = _checked("a", a), _checked("b", b)
    if a.mean.shape != b.mean.shape:
        raise ValueError(f"statistics of {len(a.mean)} and of {len(b.mean)} features; allowed: the same number")
    try:
        with np.errstate(over="ignore", invalid="ignore"):
            distance = _distance(a, b)
    except torch.linalg.LinAlgError:  # what LAPACK makes of infinities
        distance = math.nan
    if not math.isfinite(distance):
        mean, covariance = (max(np.abs(getattr(g, part)).max() for g in (a, b)) for part in ("mean", "covariance"))
        seen = f"the distance is {distance}, means reach {mean:g} and covariances {covariance:g}"
        raise ValueError(f"{seen}; allowed: those whose squares and sums are finite")
    return max(0.0, distance)


def _checked(name: str, gaussian: Any) -> Gaussian:
    if not isinstance(gaussian, Gaussian):
        seen = f"{name} is a {type(gaussian).__name__}"
        raise TypeError(f"{seen}; allowed: a Gaussian, as Statistics.gaussian() and read_statistics() give it")
    if gaussian.factor is not None:  # which Statistics made beside the rest
        return gaussian
    mean, covariance = checked_moments(name, mean=gaussian.mean, covariance=gaussian.covariance)
    return Gaussian(mean, covariance, gaussian.count)


def _distance(a: Gaussian, b: Gaussian) -> float:
    difference = a.mean - b.mean
    cross = _factor(a) @ _factor(b).T
    root = float(torch.linalg.svdvals(torch.from_numpy(cross)).sum()) if cross.size else 0.0
    return float(difference @ difference + np.trace(a.covariance) + np.trace(b.covariance) - 2 * root)


def _factor(gaussian: Gaussian) -> Doubles:
    """F [r, d] with F^T F = covariance; what is below the rounding of its largest eigenvalue counts as zero."""
    if gaussian.factor is not None:
        return gaussian.factor
    values, vectors = (part.numpy() for part in torch.linalg.eigh(torch.from_numpy(gaussian.covariance)))
    kept = values > values[-1] * len(values) * np.finfo(np.float64).eps
    factor: Doubles = (vectors[:, kept] * np.sqrt(values[kept])).T
    return factor
