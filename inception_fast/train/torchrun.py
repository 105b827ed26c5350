"""What torchrun's environment says of this process, and who speaks when several fail alike. Needs no torch."""

from __future__ import annotations

import os
import time
from functools import cache

PATIENCE = 10.0  # seconds that a failed process leaves the first one to say why


def place() -> tuple[int, int]:
    """(this process's rank, how many there are); (0, 1) without torchrun."""
    if "RANK" not in os.environ:
        return 0, 1
    return int(os.environ["RANK"]), int(os.environ.get("WORLD_SIZE", "1"))


@cache
def let_the_first_speak() -> None:
    """Called, once for all, by a process that has failed, before it says why.

    Most failures are the same on all processes, and are to be read once. When the first process has said it and has
    ended, torchrun ends the others, which wait for that here. Where nothing ends them, the failure is their own.
    """
    rank, _ = place()
    if rank:
        time.sleep(PATIENCE)
