"""A row of the report, and the rules by which a measured figure gets its verdict."""

from __future__ import annotations

import random
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from itertools import chain, product
from operator import mul
from typing import Any

CONFIRMED, DIFFERS, REFUTED = "confirmed", "differs", "refuted"
OPEN, UNMEASURED, PUBLISHED = "not established", "not measured", "published"
VERDICTS = {
    CONFIRMED: "measured to be as stated: a count to within a tenth, a share of time saved to within ten percentage "
    "points, what a training gains to within a factor of two, a bound where it holds",
    DIFFERS: "the direction is as stated, the figure is not",
    REFUTED: "measured to be otherwise",
    OPEN: "the difference is within this run's noise, or too few runs were made",
    UNMEASURED: "this machine or this run could not; the note says why",
    PUBLISHED: "listed as its authors published it, not measured here",
}
SEEDS_LEVEL = 0.05  # the chance of a finding where two ways to train are alike
EXACT_SEEDS = 16  # up to which all ways to set their signs are tried
DRAWS = 10_000  # of signs for more seeds
NEAR = 0.1  # distance from the stated figure up to which it counts as that figure: see VERDICTS


@dataclass(frozen=True)
class Row:
    """One claim. `stated` is None where the source names no figure, `measured` where nothing was measured.

    `details` hold what the plots draw: times, counts, curves.
    """

    id: str
    claim: str
    source: str
    stated: float | None
    measured: float | None
    unit: str
    command: str
    verdict: str
    note: str = ""
    details: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.verdict not in VERDICTS:
            raise ValueError(f"verdict {self.verdict!r}; allowed: {', '.join(VERDICTS)}")

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


def counted(measured: float, stated: float | None) -> str:
    """The verdict on something counted, not timed; without a stated figure the count itself is the finding."""
    if stated is None or abs(measured - stated) <= NEAR * abs(stated):
        return CONFIRMED
    return DIFFERS if measured * stated > 0 else REFUTED


def below(measured: float, bound: float) -> str:
    """The verdict on "fewer than `bound`"."""
    return CONFIRMED if measured < bound else REFUTED


def saved(measured: float, stated: float | None, established: bool) -> str:
    """The verdict on a share of time saved, in per cent; what is not established is neither confirmed nor refuted."""
    if not established:
        return OPEN
    if measured <= 0:
        return REFUTED
    return CONFIRMED if stated is None or abs(measured - stated) <= NEAR * 100 else DIFFERS


def higher(a: Sequence[float], b: Sequence[float]) -> str:
    """The verdict on "a is higher than b", value i of both from seed i: an exact sign-flip test of the differences.

    Were the two alike, each seed's difference could as well have had the other sign. The share of all ways to set the
    signs whose sum is as far from zero as the one found is the chance of that; below SEEDS_LEVEL it is a finding, for
    which six seeds are the fewest. Of more than EXACT_SEEDS differences, DRAWS ways are drawn, the same in every run.
    """
    differences = [x - y for x, y in zip(a, b, strict=True) if x != y]
    found = abs(sum(differences)) * (1 - 1e-12)
    far = [abs(sum(map(mul, signs, differences))) >= found for signs in _flips(len(differences))]
    chance = sum(far) / len(far)
    if chance >= SEEDS_LEVEL:
        return OPEN
    return CONFIRMED if sum(differences) > 0 else REFUTED


def _flips(count: int) -> Iterable[Sequence[int]]:
    """Ways to set `count` signs, the one found among them."""
    if count <= EXACT_SEEDS:
        return product((1, -1), repeat=count)
    rng = random.Random(0)
    return chain([(1,) * count], (rng.choices((1, -1), k=count) for _ in range(DRAWS)))
