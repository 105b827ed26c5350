"""Mean and covariance of features, streamed in float64: memory does not grow with the images."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

Doubles = NDArray[np.float64]

BLOCK = 512  # rows summed at once; fixed, so that the bits of the sums do not depend on how the rows arrive


@dataclass(frozen=True)
class Gaussian:
    """What FID keeps of a set of images: mean [d], covariance [d, d] (unbiased, n - 1), and n where it is known.

    factor: F [n, d] with F^T F = covariance, where few images make it smaller than the covariance.
    """

    mean: Doubles
    covariance: Doubles
    count: int | None = None
    factor: Doubles | None = None

    def rank_warning(self, name: str) -> str | None:
        """A line about a covariance that fewer images than features cannot fill; None where there are enough."""
        if self.count is None or self.count > len(self.mean):
            return None
        return (
            f"{name} has {self.count} images for {len(self.mean)} features: its covariance has rank "
            f"{self.count - 1} at most, and FID is biased upwards; take more than {len(self.mean)} images"
        )


class Statistics:
    """Takes features [n, d] in any portions and gives their Gaussian; the portions do not change a bit of it."""

    def __init__(self) -> None:
        self.count = 0
        self._pending: list[Doubles] = []
        self._rows = 0
        self._shift: Doubles | None = None
        self._sum: Doubles = np.zeros(0)
        self._products: Doubles = np.zeros((0, 0))

    def update(self, features: Any) -> None:
        """Adds rows [n, d], a tensor or an array. Raises ValueError for another shape and for NaN or infinity."""
        rows = as_rows(features, self.count)
        width = self._pending[0].shape[1] if self._pending else len(self._sum) or rows.shape[1]
        if rows.shape[1] != width:
            raise ValueError(f"features of width {rows.shape[1]}; allowed: {width}, as those before them")
        self.count += len(rows)
        while len(rows):
            taken = rows[: BLOCK - self._rows]
            rows = rows[len(taken) :]
            self._pending.append(taken)
            self._rows += len(taken)
            if self._rows == BLOCK:
                self._sum, self._products = self._added()
                self._pending, self._rows = [], 0

    def _added(self) -> tuple[Doubles, Doubles]:
        """The sums with what is pending. They are taken round the first row, since products of large means cancel."""
        rows = np.concatenate(self._pending)
        if self._shift is None:
            self._shift = rows[0].copy()
            self._sum = np.zeros(rows.shape[1])
            self._products = np.zeros((rows.shape[1],) * 2)
        rows = rows - self._shift
        return self._sum + rows.sum(axis=0), self._products + rows.T @ rows

    def gaussian(self) -> Gaussian:
        """Of the rows so far. Raises ValueError for fewer than two, which have no covariance."""
        if self.count < 2:
            raise ValueError(f"{self.count} image(s); allowed: two or more, one has no covariance")
        total, products = self._added() if self._pending else (self._sum, self._products)
        assert self._shift is not None
        offset = total / self.count
        covariance = (products - self.count * np.outer(offset, offset)) / (self.count - 1)
        factor = None
        if self._rows == self.count < len(offset):  # all of them are pending
            factor = (np.concatenate(self._pending) - self._shift - offset) / (self.count - 1) ** 0.5
        return Gaussian(self._shift + offset, (covariance + covariance.T) / 2, self.count, factor)


def checked_moments(owner: str, **arrays: Any) -> tuple[Doubles, Doubles]:
    """A mean [d] and a covariance [d, d], given under the names they go by, as float64 and symmetric to the bit.

    Raises ValueError, in which they are `owner`'s, for what is none up to the rounding of float32.
    """
    (name, mean), (square, covariance) = ((name, _reals(owner, name, values)) for name, values in arrays.items())
    if mean.ndim != 1 or covariance.shape != (len(mean),) * 2 or not len(mean):
        raise ValueError(f"{owner} holds {name} {mean.shape} and {square} {covariance.shape}; allowed: [d] and [d, d]")
    if not (np.isfinite(mean).all() and np.isfinite(covariance).all()):
        raise ValueError(f"{owner} holds NaN or infinity; allowed: numbers")
    scale = np.abs(covariance).max()
    if np.abs(covariance - covariance.T).max() > 1e-6 * scale:
        raise ValueError(f"{owner} holds a {square} that is not symmetric; allowed: a covariance")
    if (least := covariance.diagonal().min()) < -1e-6 * scale:
        raise ValueError(f"{owner} holds a {square} with {least:g} on its diagonal; allowed: variances, 0 or more")
    covariance = covariance / 2 + covariance.T / 2
    if scale and _is_indefinite(covariance / scale):
        least = float(torch.linalg.eigvalsh(torch.from_numpy(covariance / scale))[0]) * scale
        raise ValueError(f"{owner} holds a {square} with the eigenvalue {least:g}; allowed: 0 or more, a covariance's")
    return mean, covariance


def _is_indefinite(matrix: Doubles) -> bool:
    """Whether a symmetric matrix of entries up to 1 has eigenvalues below what rounded entries, d * eps, explain.

    By Cholesky's decomposition, which takes a tenth of the time of eigenvalues.
    """
    slack = max(1e-5, len(matrix) * float(np.finfo(np.float32).eps))
    return bool(torch.linalg.cholesky_ex(torch.from_numpy(matrix + slack * np.eye(len(matrix)))).info)


def _reals(owner: str, name: str, values: Any) -> Doubles:
    if hasattr(values, "detach"):
        values = values.detach().cpu()
        values = (values.double() if values.is_floating_point() else values).numpy()  # it has no bfloat16
    held = np.asarray(values)
    if held.dtype.kind not in "fiu":
        raise ValueError(f"{owner} holds {name} of dtype {held.dtype}; allowed: real numbers")
    reals: Doubles = held.astype(np.float64)
    return reals


def as_rows(features: Any, before: int = 0, numbers: Any = None) -> Doubles:
    """Features [n, d] as float64, copied. Raises ValueError for another rank, complex numbers, NaN and infinity.

    before: the rows that came before these, which are numbered on; numbers: of the rows, where they are chosen ones.
    """
    if hasattr(features, "detach"):
        features = features.detach().cpu()
        features = (features.double() if features.is_floating_point() else features).numpy()  # it has no bfloat16
    held = np.asarray(features)
    if held.dtype.kind == "c":
        raise ValueError(f"features of dtype {held.dtype}; allowed: real numbers")
    rows = np.array(held, dtype=np.float64)
    if rows.ndim != 2 or not rows.shape[1]:
        raise ValueError(f"features of shape {rows.shape}; allowed: [n, d]")
    broken = ~np.isfinite(rows).all(axis=1)
    if broken.any():
        row = int(broken.argmax())
        number = before + row if numbers is None else numbers[row]
        raise ValueError(f"features of row {number} are not finite; allowed: numbers")
    return rows


def check_rows(features: Any) -> None:
    """Raises TypeError for what has no rows to take by their numbers, such as a list, ValueError for another rank."""
    shape = getattr(features, "shape", None)
    if shape is None:
        raise TypeError(f"features of type {type(features).__name__}; allowed: an array or a tensor [n, d]")
    if len(shape) != 2:
        raise ValueError(f"features of shape {tuple(shape)}; allowed: [n, d]")


def check_widths(a: Any, b: Any) -> None:
    """Raises ValueError for features [n, d] of two widths."""
    first, second = (as_rows(rows[:1]).shape[1] for rows in (a, b))
    if first != second:
        raise ValueError(f"features of width {first} and of width {second}; allowed: the same")
