"""Cache misses of factorised, unfused and fused kernels, simulated by valgrind's cachegrind on the native code."""

from __future__ import annotations

import shutil

from . import nets
from .row import UNMEASURED, Row
from .study import Context

PAPER = "arXiv:1512.00567, section 3.2"


def cache_misses(context: Context) -> list[Row]:
    """A row for each level of the caches and each size of the pair."""
    missing = "valgrind is not installed" if shutil.which("valgrind") is None else "this build has no driver for it"
    rows = []
    for n in nets.PAIR_SIZES:
        for level in ("L1", "LL"):
            claim = f"Factorising {n}x{n} into 1x{n} and {n}x1 raises the misses in {level}."
            name, unit = f"asymmetric_{n}_{level.lower()}_misses", f"times the {level} misses"
            rows.append(
                Row(name, claim, "this package", None, None, unit, context.command("caches"), UNMEASURED, missing)
            )
    return rows
