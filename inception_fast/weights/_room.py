"""Room on the disk for a file of weights, made sure of before a library starts to write it."""

from __future__ import annotations

import errno
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

OVERHEAD = 1 << 20  # of any format, and
HEADER = 4096  # of each tensor


def make_sure_of_room(target: Path, tensors: Mapping[str, Tensor]) -> None:
    """Takes the room that `tensors` need beside `target`, and gives it back.

    A full disk in the middle of a file makes HDF5 crash the process at its end and TensorFlow raise errors of its own.

    Raises OSError, naming `target` and the bytes, where the disk has not got them.
    """
    if not hasattr(os, "posix_fallocate"):  # a system that promises no room
        return
    size = OVERHEAD + sum(HEADER + tensor.numel() * tensor.element_size() for tensor in tensors.values())
    try:
        with tempfile.TemporaryFile(dir=target.parent) as file:
            os.posix_fallocate(file.fileno(), 0, size)
    except OSError as error:
        if error.errno == errno.EOPNOTSUPP:  # a file system that promises no room
            return
        raise OSError(
            error.errno, f"{os.strerror(error.errno or 0)}, {size / 1e6:.1f} MB are needed", str(target)
        ) from error
