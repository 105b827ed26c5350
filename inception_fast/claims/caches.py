"""Cache misses of square, factorised and fused kernels: cachegrind on the native driver, beside a model of reuse."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from ..measure import counters
from ..measure.cache import Caches, Layer, Misses, measure, modelled_misses
from ..measure.driver import build_driver
from ..measure.machine import cores
from ..measure.results import Parts
from . import nets
from .context import Context
from .row import CONFIRMED, OPEN, REFUTED, UNMEASURED, Row

WIDTH = 96  # channels of the layers simulated, half of v3's: the simulator takes fifty times as long as the machine
IMAGES = 2  # in a call of a pair to be fused: one image alone is run as two convolutions
SWEEP_WIDTH, SWEEP_SIDES, SWEEP_SIZE = 16, (6, 9, 13, 19, 28, 42, 62, 90), 7
SWEPT = ("conv", "separate", "pair", "fused")
CACHES = Caches()  # a small machine: maps that overflow its last level are simulated in seconds
MIDDLE = replace(CACHES, last=256 << 10, last_ways=8)  # the level between, simulated as a last one
LEVELS = (("l1", "L1", CACHES), ("l2", "L2", MIDDLE), ("last", "LL", CACHES))
CHECKOUT = Path(__file__).resolve().parents[2]
UNIT = "times the {level} misses"
QUICK = "a quick run builds no native driver"
SAME = 0.01  # a relative difference in counts below which nothing was raised or given back
NOISE = 0.05  # the same for the machine's counters, which count what else runs

Question = tuple[Layer, Caches]
Misser = Callable[[Layer], Misses]


@dataclass(frozen=True)
class Source:
    """Where a count comes from: `misses` answers for a layer, or `reason` says why there is no answer."""

    misses: Misser | None
    reason: str = ""


def cache_misses(context: Context) -> list[Row]:
    """Rows for each size of the pair and each level, the machine's counters, and a sweep over map sizes."""
    driver = _driver(context)
    if isinstance(driver, str):
        return [*_rows(context, Source(None, driver)), *_counter_rows(context, Source(None, driver))]
    try:
        known = _simulated(context, driver, {*((layer, CACHES) for layer in _layers()), *_swept()})
    except RuntimeError as error:
        none = Source(None, " ".join(str(error).split())[:300])
        return [*_rows(context, none), *_counter_rows(context, none)]
    rows = _rows(context, Source(lambda layer: known[layer, CACHES]))
    return [*rows, *_counter_rows(context, _counters(context, driver)), *_sweep(context, known)]


def _driver(context: Context) -> Path | str:
    """The program to simulate, or why there is none."""
    if shutil.which("valgrind") is None:
        return "valgrind is not installed"
    if context.quick:
        return QUICK
    context.say("caches: building the native driver")
    try:
        return build_driver(CHECKOUT, CHECKOUT / "build" / "claims-driver")
    except (FileNotFoundError, RuntimeError) as error:
        return " ".join(str(error).split())[:300]


def _simulated(context: Context, driver: Path, questions: Iterable[Question]) -> dict[Question, Misses]:
    """Every answer, as many simulations at a time as there are cores, the dearest first.

    A count depends on the program alone, so that those of a run that was cut short are good for the same program.
    """
    order = sorted(questions, key=lambda q: (-_cost(q[0]), str(q)))
    kept = Parts(context.out / "parts", {"driver": _digest(driver)}, context.resume)
    held: dict[str, Any] = kept.load("simulations") or {}
    known = {question: Misses(**held[str(question)]) for question in order if str(question) in held}
    with ThreadPoolExecutor(cores()) as pool:
        jobs = {pool.submit(measure, driver, *question): question for question in order if question not in known}
        try:
            for job in as_completed(jobs):
                known[jobs[job]] = job.result()
                context.say(f"caches: {len(known)} of {len(order)} simulations")
                kept.save("simulations", {str(question): asdict(found) for question, found in known.items()})
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    return known


def _digest(driver: Path) -> str:
    return hashlib.sha256(driver.read_bytes()).hexdigest() if driver.is_file() else ""


def _cost(layer: Layer) -> int:
    return layer.n * layer.h * layer.w * sum(c * oc * kh * kw for c, oc, kh, kw in layer.convs())


def square(n: int) -> Layer:
    return Layer("conv", nets.GRID, nets.GRID, WIDTH, WIDTH, n, n)


def pair(n: int, kind: str = "pair", images: int = 1) -> Layer:
    return Layer(kind, nets.GRID, nets.GRID, WIDTH, WIDTH, n, n, mid=WIDTH, n=images)


def _layers() -> list[Layer]:
    """What `_rows` asks for."""
    return [
        layer
        for n in nets.PAIR_SIZES
        for layer in (square(n), pair(n), pair(n, "pair", IMAGES), pair(n, "fused", IMAGES))
    ]


def _rows(context: Context, source: Source) -> list[Row]:
    rows = []
    for n in nets.PAIR_SIZES:
        for level, name in (("l1", "L1"), ("last", "LL")):
            claim = f"Factorising {n}x{n} into 1x{n} and {n}x1 raises the misses in {name}."
            ends = square(n), pair(n)
            rows.append(_ratio(context, f"asymmetric_{n}_{_suffix(level)}", claim, level, ends, source, raises=True))
        claim = f"Factorising {n}x{n} into 1x{n} and {n}x1 raises the share of accesses that miss in L1."
        rows.append(_rate(context, n, claim, source))
        for level, name in (("l1", "L1"), ("last", "LL")):
            claim = f"Fusing the pair of 1x{n} and {n}x1 gives back misses in {name}, on {IMAGES} images."
            ends = pair(n, "pair", IMAGES), pair(n, "fused", IMAGES)
            rows.append(_ratio(context, f"fused_pair_{n}_{_suffix(level)}", claim, level, ends, source, raises=False))
    return rows


def _counters(context: Context, driver: Path) -> Source:
    """The machine's counters, or why they cannot be read."""
    context.say("caches: reading the machine's counters")
    try:
        counters.count(["true"])  # says at once where the machine has none
        layers = [layer for n in nets.PAIR_SIZES for layer in (square(n), pair(n))]
        known = {layer: counters.measure(driver, layer) for layer in layers}
    except RuntimeError as error:
        return Source(None, str(error))
    return Source(known.__getitem__)


def _counter_rows(context: Context, source: Source) -> list[Row]:
    """The first question again, asked of the hardware."""
    rows = []
    for n in nets.PAIR_SIZES:
        claim = f"The machine's own counters too: factorising {n}x{n} into 1x{n} and {n}x1 raises the misses in L1."
        name = f"asymmetric_{n}_l1_counters"
        rows.append(
            _ratio(context, name, claim, "l1", (square(n), pair(n)), source, raises=True, noise=NOISE, modelled=False)
        )
    return rows


def _suffix(level: str) -> str:
    return "l1_misses" if level == "l1" else "ll_misses"


def _ratio(
    context: Context,
    name: str,
    claim: str,
    level: str,
    ends: tuple[Layer, Layer],
    source: Source,
    *,
    raises: bool,
    noise: float = SAME,
    modelled: bool = True,
) -> Row:
    """The misses of the second of `ends` over the first's, which the claim says are above or below one."""
    command, unit = context.command("caches"), UNIT.format(level="L1" if level == "l1" else "LL")
    if source.misses is None:
        return Row(name, claim, "this package", None, None, unit, command, UNMEASURED, source.reason)
    counts = [source.misses(layer) for layer in ends]
    old, new = (getattr(count, level) for count in counts)
    details: dict[str, Any] = {"before": asdict(counts[0]), "after": asdict(counts[1])}
    note = f"{old:,.0f} before, {new:,.0f} after a call"
    if modelled:
        size = CACHES.l1 if level == "l1" else CACHES.last
        says = [modelled_misses(layer, size) for layer in ends]
        details["modelled"] = says
        note += f"; the model says {says[0]:,.0f} and {says[1]:,.0f}"
    if max(old, new) < 1:
        note = f"{old:.0f} before, {new:.0f} after: this level holds all of it"
        return Row(name, claim, "this package", None, None, unit, command, UNMEASURED, note, details)
    ratio = max(new, 1.0) / max(old, 1.0)
    verdict = OPEN if abs(ratio - 1) <= noise else CONFIRMED if (ratio > 1) is raises else REFUTED
    return Row(name, claim, "this package", None, ratio, unit, command, verdict, note, details)


def _rate(context: Context, n: int, claim: str, source: Source) -> Row:
    name, unit, command = f"asymmetric_{n}_l1_rate", "times the L1 miss rate", context.command("caches")
    if source.misses is None:
        return Row(name, claim, "this package", None, None, unit, command, UNMEASURED, source.reason)
    old, new = (100 * m.l1 / m.accesses for m in map(source.misses, (square(n), pair(n))))
    note = f"{old:.2f} % of the accesses before, {new:.2f} % after"
    verdict = OPEN if abs(new / old - 1) <= SAME else CONFIRMED if new > old else REFUTED
    return Row(name, claim, "this package", None, new / old, unit, command, verdict, note)


def swept(kind: str, side: int) -> Layer:
    """A layer of the sweep: so many images of side x side."""
    c, n = SWEEP_WIDTH, SWEEP_SIZE
    return Layer(kind, side, side, c, c, n, n, mid=0 if kind == "conv" else c, n=IMAGES)


def _swept() -> list[Question]:
    return [(swept(kind, side), sizes) for side in SWEEP_SIDES for kind in SWEPT for sizes in (CACHES, MIDDLE)]


def _sweep(context: Context, known: dict[Question, Misses]) -> list[Row]:
    """Misses a call as the maps grow: the square kernel, the pair apart, in sequence, fused; a row for each level."""
    points: list[dict[str, Any]] = []
    for side in SWEEP_SIDES:
        for kind in SWEPT:
            layer = swept(kind, side)
            point: dict[str, Any] = {"kind": kind, "side": side, "bytes": layer.bytes()}
            for level, _, sizes in LEVELS:
                point[level] = getattr(known[layer, sizes], "l1" if level == "l1" else "last")
                point[f"model_{level}"] = modelled_misses(layer, sizes.l1 if level == "l1" else sizes.last)
            points.append(point)
    details = {"points": points, "l1": CACHES.l1, "l2": MIDDLE.last, "last": CACHES.last}
    return [_most_given_back(context, points, level, title, details) for level, title, _ in LEVELS]


def _most_given_back(
    context: Context, points: list[dict[str, Any]], level: str, title: str, details: dict[str, Any]
) -> Row:
    """Where fusing helps a level most, over all map sizes that miss in it."""
    count = {(p["kind"], p["side"]): p[level] for p in points}
    ratios = {s: count["fused", s] / count["pair", s] for s in SWEEP_SIDES if count["pair", s] >= 1}
    name, unit, n = f"fusing_over_map_size_{level}", UNIT.format(level=title), SWEEP_SIZE
    claim = f"As maps grow, there are sizes at which fusing 1x{n} and {n}x1 gives back misses in {title}."
    command = context.command("caches")
    if not ratios:
        return Row(name, claim, "this package", None, None, unit, command, UNMEASURED, "no size misses", details)
    best = min(ratios, key=ratios.__getitem__)
    verdict = CONFIRMED if ratios[best] < 1 - SAME else REFUTED
    told = ", ".join(f"{side}x{side} {ratio:.2f}" for side, ratio in ratios.items())
    note = f"the best of {IMAGES} images of {SWEEP_WIDTH} channels; fused over in sequence: {told}"
    return Row(name, claim, "this package", None, ratios[best], unit, command, verdict, note, details)
