"""Statistics in pytorch-fid's `.npz` files: arrays `mu` [d] and `sigma` [d, d]."""

from __future__ import annotations

import os
import zipfile
from pathlib import Path
from typing import Any

import numpy as np

from ..images import is_pipe
from ..measure.results import write_atomically
from .statistics import Gaussian, checked_moments


def read_statistics(path: str | os.PathLike[str]) -> Gaussian:
    """Reads a file of pytorch-fid or of `write_statistics`. Nothing in it is unpickled.

    Raises FileNotFoundError, or ValueError for a damaged or foreign file.
    """
    path = Path(path)
    try:
        if is_pipe(path):
            raise OSError("it is a pipe or a device")
        with open(path, "rb") as file:
            if not zipfile.is_zipfile(file):  # NumPy takes any other file for a pickle
                raise ValueError("it is no zip archive, or a part of one")
        with np.load(path, allow_pickle=False) as held:
            if not {"mu", "sigma"} <= set(held.files):
                raise ValueError(f"{path} holds {held.files}; allowed: mu and sigma")
            arrays = held["mu"], held["sigma"]
            count = _count(path, held["count"]) if "count" in held.files else None
    except Exception as error:  # zipfile, zlib and NumPy meet damaged bytes, each with errors of its own
        if isinstance(error, FileNotFoundError) or str(error).startswith(str(path)):
            raise
        raise ValueError(f"{path} is no readable .npz of statistics ({error}); allowed: pytorch-fid's files") from error
    mean, covariance = checked_moments(str(path), mu=arrays[0], sigma=arrays[1])
    return Gaussian(mean, covariance, count)


def _count(path: Path, value: Any) -> int:
    if value.dtype.kind not in "iu" or value.shape or value < 2:
        raise ValueError(f"{path} holds count {value!r}; allowed: an integer, 2 or more")
    return int(value)


def write_statistics(path: str | os.PathLike[str], gaussian: Gaussian) -> None:
    """Writes `mu` and `sigma` as pytorch-fid reads them, and `count` beside them; whole or not at all."""
    path = Path(path)
    if path.suffix != ".npz":
        raise ValueError(f"{path}; allowed: a name that ends in .npz")
    arrays = {"mu": gaussian.mean, "sigma": gaussian.covariance}
    if gaussian.count is not None:
        arrays["count"] = np.array(gaussian.count)
    write_atomically(path, lambda scratch: np.savez_compressed(scratch, **arrays))  # type: ignore[arg-type]
