"""A folder that one run at a time writes to."""

from __future__ import annotations

import os
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO

LOCK = ".lock"
_locks: weakref.WeakSet[TextIO] = weakref.WeakSet()


def _leave_locks() -> None:
    """A process that prepares images outlives a run that is killed, if for a moment, and must not hold the folder
    meanwhile.
    """
    for lock in _locks:
        lock.close()


os.register_at_fork(after_in_child=_leave_locks)


@contextmanager
def held(folder: Path) -> Iterator[None]:
    """Raises ValueError where another process holds `folder`. Where the file system knows no locks, nothing is held."""
    with open(folder / LOCK, "w") as lock:
        _locks.add(lock)
        try:
            import fcntl

            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(f"another run writes to {folder}; wait for it, or name another folder") from None
        except (ImportError, OSError):
            pass
        yield
