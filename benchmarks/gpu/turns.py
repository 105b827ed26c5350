"""Jobs that run side by side prepare together and have the GPU one at a time to measure.

Who prepares holds a lock that others may share, who measures the same lock alone. So nobody measures until all others
have prepared or wait for their own turn too, and nobody waits while holding it. It goes with the process.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
from collections.abc import Iterator
from pathlib import Path

FILE = Path(__file__).resolve().parents[2] / "build" / "gpu" / "turn"
_open: int | None = None  # the lock's descriptor, in a process that has joined
_inside = False


def join(file: Path = FILE) -> None:
    """From now on this process prepares, but for what it does `alone`."""
    global _open
    file.parent.mkdir(parents=True, exist_ok=True)
    _open = os.open(file, os.O_RDWR | os.O_CREAT, 0o644)
    fcntl.flock(_open, fcntl.LOCK_SH)


@contextlib.contextmanager
def alone() -> Iterator[None]:
    """Inside, no other process that has joined prepares or measures; a process that has not joined is not held up. One
    inside of another is a part of it.
    """
    global _inside
    if _open is None or _inside:
        yield
        return
    fcntl.flock(_open, fcntl.LOCK_EX)  # gives the shared lock up first
    _inside = True
    try:
        yield
    finally:
        _inside = False
        fcntl.flock(_open, fcntl.LOCK_SH)
