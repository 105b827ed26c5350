"""All studies in turn, and the document that they make."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from ..measure.timer import Flush, Plan
from .row import Row

QUICK = Plan(seconds=0.5, least=9, most=9, warmup=1)  # nine is the fewest that can establish anything
FULL = Plan(seconds=4.0, least=21, most=101, warmup=3)


@dataclass
class Context:
    """What every study is told. `trained` maps an experiment's name to the document of a comparison that ran it.

    `resume`: what `out` holds of a study that was cut short may be taken, where it depends on nothing that changed.
    """

    out: Path
    quick: bool = False
    trained: dict[str, dict[str, Any]] = field(default_factory=dict)
    say: Callable[[str], None] = lambda text: None
    resume: bool = False

    @property
    def plan(self) -> Plan:
        return QUICK if self.quick else FULL

    @cached_property
    def flush(self) -> Flush:
        return Flush()

    def command(self, study: str) -> str:
        """What a reader types to measure a study's rows again."""
        return f"inception-fast claims --only {study}" + (" --quick" if self.quick else "")


Study = Callable[[Context], list[Row]]


def studies() -> dict[str, Study]:
    """Every study by its name, in the order of the report."""
    from .caches import cache_misses
    from .engine import engine_passes
    from .factorising import factorising
    from .networks import networks
    from .published import published
    from .reduction import reduction, widening
    from .training import training

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
