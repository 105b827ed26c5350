"""The one timer: runtimes take turns in rounds, so that a slow minute of the machine hits all of them alike."""

from __future__ import annotations

import math
import random
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields

from .._numbers import is_integer, is_number, plain

Call = Callable[[], object]
Clock = Callable[[], float]
FEWEST = 3  # rounds, below which a median means nothing
LEVEL = 0.02  # of false alarms in a family of comparisons
ROUNDS = 10_000  # at most where seconds were asked for: what takes microseconds must end, too
CALM = 0.1  # seconds, where runtimes keep threads of their own
WARM = 2.0  # seconds, where calls have several threads
FLOOR = 0.02  # two builds of the same code differ by up to 1.5 %, always the same way: memory of theirs lies elsewhere


@dataclass(frozen=True)
class Plan:
    """How long to measure: rounds until `seconds` have passed, never fewer than `least` nor more than `most` of them.

    On a machine too slow for that it stops at `patience` times `seconds`, with three rounds at least.

    Fewer than nine rounds cannot establish anything against four peers. Before its timed call each runtime runs
    untimed ones, `settle` of them and for `calm` seconds, because the runtime before it left its own data in the caches
    and its own threads spinning, ONNX Runtime's for 45 ms. A pause in their place would be timed, too: who sleeps first
    wakes to a slower processor. Before the first round the calls go on untimed for `warm` seconds: two cores of a
    virtual machine one of which was idle, as while a model is built, may have one of the host's for a second.
    """

    seconds: float = 10.0
    least: int = 9
    most: int = 50
    patience: float = 6.0
    warmup: int = 2
    settle: int = 1
    calm: float = 0.0
    warm: float = 0.0

    def __post_init__(self) -> None:
        for field in fields(self):
            value = plain(getattr(self, field.name))
            object.__setattr__(self, field.name, value)
            whole = field.type == "int"
            if not (is_integer(value) if whole else is_number(value) and not math.isnan(value)):
                raise ValueError(f"{field.name} {value!r}; allowed: {'an integer' if whole else 'a number'}")
        if not 1 <= self.least <= self.most:
            raise ValueError(f"rounds {self.least} to {self.most}; allowed: 1 <= least <= most")
        untimed = self.warmup, self.settle, self.calm, self.warm
        if min(self.seconds, self.patience) <= 0 or not all(0 <= value < math.inf for value in untimed):
            raise ValueError(f"{self}; allowed: seconds and patience > 0, warmup, settle, calm and warm >= 0, finite")

    def share(self, done: int, spent: float) -> float:
        """How much of the measuring is over after `done` rounds in `spent` seconds; from 1 on it ends."""
        on_time = min(spent / self.seconds, done / self.least)
        late = min(spent / (self.patience * self.seconds), done / FEWEST)
        return max(done / self.most, on_time, late)


class Flush:
    """Pushes everything else out of the caches by writing twice the size of the last one; a call takes some ms."""

    def __init__(self, size: int | None = None) -> None:
        from .machine import caches

        self.size = size or 2 * max([*caches().values(), 1 << 25])
        self._memory = bytearray(self.size)
        self._pattern = bytes(self.size)

    def __call__(self) -> None:
        self._memory[:] = self._pattern


@dataclass(frozen=True)
class Summary:
    """Seconds a call: the median, the distance between the quartiles, the fastest, and how many were taken."""

    median: float
    iqr: float
    best: float
    count: int


def summarise(samples: Sequence[float]) -> Summary:
    """Median and interquartile range (linear between the sorted samples); one sample has an IQR of 0."""
    if not samples:
        raise ValueError("no samples; allowed: at least one")
    ordered = sorted(samples)
    iqr = quantile(ordered, 0.75) - quantile(ordered, 0.25)
    return Summary(statistics.median(ordered), iqr, ordered[0], len(ordered))


def quantile(ordered: Sequence[float], fraction: float) -> float:
    """Linear interpolation between the two sorted samples around `fraction`."""
    position = fraction * (len(ordered) - 1)
    below = math.floor(position)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (position - below) * (ordered[above] - ordered[below])


def interleave(
    calls: Mapping[str, Call],
    plan: Plan,
    *,
    clock: Clock = time.perf_counter,
    on_round: Callable[[float], None] | None = None,
    before: Call | None = None,
) -> dict[str, list[float]]:
    """Times every call once a round; sample i of every name is of round i.

    The order is shuffled anew every second round and turned round in the next: whatever place in a round does to a
    time, it does to all alike, and a steady drift cancels.
    `on_round` hears after each round which share of the plan is done. `before` runs ahead of every timed call, outside
    its window: a `Flush` makes each call find cold caches.
    """
    if not calls:
        return {}
    samples: dict[str, list[float]] = {name: [] for name in calls}
    order = list(calls)
    shuffle = random.Random(0).shuffle
    end = clock() + plan.warm if plan.warm else 0.0
    for call in calls.values():
        for _ in range(plan.warmup):
            call()
    while plan.warm and clock() < end:
        for call in calls.values():
            call()
    start = clock()
    for done in range(1, plan.most + 1):
        if done % 2:
            shuffle(order)
        else:
            order.reverse()
        for name in order:
            samples[name].append(_time(calls[name], plan, clock, before))
        share = plan.share(done, clock() - start)
        if on_round is not None:
            on_round(min(1.0, share))
        if share >= 1:
            break
    return samples


def _time(call: Call, plan: Plan, clock: Clock, before: Call | None = None) -> float:
    end = clock() + plan.calm if plan.calm else 0.0
    for _ in range(plan.settle):
        call()
    while plan.calm and clock() < end:
        call()
    if before is not None:
        before()
    start = clock()
    call()
    return clock() - start


def noise_floor(samples: Sequence[float]) -> float:
    """Relative difference of the medians of the odd and the even rounds of one runtime: what equal code shows here."""
    if len(samples) < 2:
        return math.inf
    even, odd = statistics.median(samples[::2]), statistics.median(samples[1::2])
    return abs(even - odd) / min(even, odd)


def sign_test(a: Sequence[float], b: Sequence[float]) -> float:
    """Two-sided p-value that neither of two runtimes, timed in the same rounds, is the faster (ties are dropped)."""
    if len(a) != len(b):
        raise ValueError(f"{len(a)} and {len(b)} samples; allowed: the same rounds of both")
    wins = sum(x < y for x, y in zip(a, b, strict=True))
    losses = sum(x > y for x, y in zip(a, b, strict=True))
    n = wins + losses
    tail = sum(math.comb(n, k) for k in range(min(wins, losses) + 1)) / 2**n
    return min(1.0, 2 * tail)


@dataclass(frozen=True)
class Contrast:
    """One runtime against the base: its median over the base's, the chance of that between equals, what noise does.

    `established` says that the order of the two is beyond chance, in the family it was tested in, and beyond noise.
    """

    ratio: float
    p_value: float
    noise: float
    established: bool


def contrasts(samples: Mapping[str, Sequence[float]], base: str) -> dict[str, Contrast]:
    """Every other runtime against `base`: a sign test over the rounds, Holm's correction, the noise of the two.

    The noise is the larger one's `noise_floor`, and never below FLOOR.
    """
    mine = samples[base]
    rivals = [name for name in samples if name != base]
    p_values = [sign_test(mine, samples[name]) for name in rivals]
    found = {}
    for name, p_value, beyond in zip(rivals, p_values, holm(p_values), strict=True):
        ratio = statistics.median(samples[name]) / statistics.median(mine)
        noise = max(FLOOR, noise_floor(mine), noise_floor(samples[name]))
        found[name] = Contrast(ratio, p_value, noise, beyond and abs(ratio - 1) > noise)
    return found


def holm(p_values: Sequence[float], level: float = LEVEL) -> list[bool]:
    """Which of several p-values are established at `level` for the family as a whole (Holm's step-down)."""
    established = [False] * len(p_values)
    for step, index in enumerate(sorted(range(len(p_values)), key=p_values.__getitem__)):
        if p_values[index] > level / (len(p_values) - step):
            break
        established[index] = True
    return established
