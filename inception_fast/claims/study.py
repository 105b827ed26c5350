"""All studies in turn, and the document that they make."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from .caches import cache_misses
from .context import Context
from .engine import engine_passes
from .factorising import factorising
from .networks import networks
from .published import published
from .reduction import reduction, widening
from .row import Row
from .training import training

Study = Callable[[Context], list[Row]]


def studies() -> dict[str, Study]:
    """Every study by its name, in the order of the report."""
    return {
        "factorising": factorising,
        "caches": cache_misses,
        "reduction": reduction,
        "widening": widening,
        "engine": engine_passes,
        "networks": networks,
        "training": training,
        "published": published,
    }


def run(context: Context, names: Sequence[str]) -> list[Row]:
    """The rows of the named studies. ValueError for a study that does not exist or ids that are not unique."""
    known = studies()
    for name in names:
        if name not in known:
            raise ValueError(f"study {name!r}; allowed: {', '.join(known)}")
    rows: list[Row] = []
    for name in names:
        rows += known[name](context)
    ids = [row.id for row in rows]
    if len(set(ids)) < len(ids):
        raise ValueError(f"rows {sorted(i for i in set(ids) if ids.count(i) > 1)} occur twice; allowed: each id once")
    return rows
