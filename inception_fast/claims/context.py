"""What every study is told."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from ..measure.timer import Flush, Plan

QUICK = Plan(seconds=0.5, least=9, most=9, warmup=1)  # nine is the fewest that can establish anything
FULL = Plan(seconds=4.0, least=21, most=101, warmup=3)


@dataclass
class Context:
    """`trained` maps an experiment's name to the document of a comparison that ran it.

    `resume`: what `out` holds of a study that was cut short may be taken, where it depends on nothing that changed.
    `conditions`: what measurements must share to stand in one report.
    """

    out: Path
    quick: bool = False
    trained: dict[str, dict[str, Any]] = field(default_factory=dict)
    say: Callable[[str], None] = lambda text: None
    resume: bool = False
    conditions: dict[str, Any] = field(default_factory=dict)

    @property
    def plan(self) -> Plan:
        return QUICK if self.quick else FULL

    @cached_property
    def flush(self) -> Flush:
        return Flush()

    def command(self, study: str) -> str:
        """What a reader types to measure a study's rows again."""
        return f"inception-fast claims --only {study}" + (" --quick" if self.quick else "")
