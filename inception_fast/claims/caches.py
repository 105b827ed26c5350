"""Cache misses of square, factorised and fused kernels: cachegrind on the native driver, beside a model of reuse."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from ..measure.cache import Caches, Layer, Misses, measure, modelled_misses
from ..measure.driver import build_driver
from . import nets
from .row import CONFIRMED, REFUTED, UNMEASURED, Row
from .study import Context

WIDTH = 64  # channels of the layers simulated; the simulator takes fifty times as long as the machine
SWEEP_WIDTH, SWEEP_SIDES, SWEEP_SIZE = 16, (8, 12, 18, 27, 40, 60, 96), 7
CACHES = Caches()
CHECKOUT = Path(__file__).resolve().parents[2]
Misser = Callable[[Layer], Misses]
UNIT = "times the {level} misses"
QUICK = "a quick run builds no native driver"


def cache_misses(context: Context) -> list[Row]:
    """Rows for each size of the pair and each level, and a sweep over map sizes that cross both caches."""
    found = _driver(context)
    if isinstance(found, str):
        return _rows(context, None, found)
    driver = found
    known: dict[Layer, Misses] = {}

    def misses(layer: Layer) -> Misses:
        if layer not in known:
            context.say(f"caches: simulating {layer.kind} {layer.kh}x{layer.kw} on {layer.h}x{layer.w}x{layer.c}")
            known[layer] = measure(driver, layer, CACHES)
        return known[layer]

    try:
        return [*_rows(context, misses, ""), _sweep(context, misses)]
    except RuntimeError as error:
        return _rows(context, None, " ".join(str(error).split())[:300])


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


def square(n: int) -> Layer:
    return Layer("conv", nets.GRID, nets.GRID, WIDTH, WIDTH, n, n)


def pair(n: int, kind: str = "pair") -> Layer:
    return Layer(kind, nets.GRID, nets.GRID, WIDTH, WIDTH, n, n, mid=WIDTH)


def _rows(context: Context, misses: Misser | None, reason: str) -> list[Row]:
    rows = []
    for n in nets.PAIR_SIZES:
        for level, name in (("l1", "L1"), ("last", "LL")):
            claim = f"Factorising {n}x{n} into 1x{n} and {n}x1 raises the misses in {name}."
            args = (context, f"asymmetric_{n}_{_suffix(level)}", claim, level, name)
            rows.append(_ratio(*args, square(n), pair(n), misses, reason, raises=True))
        claim = f"Factorising {n}x{n} into 1x{n} and {n}x1 raises the share of accesses that miss in L1."
        rows.append(_rate(context, n, claim, misses, reason))
        for level, name in (("l1", "L1"), ("last", "LL")):
            claim = f"Fusing the pair of 1x{n} and {n}x1 gives back misses in {name}."
            args = (context, f"fused_pair_{n}_{_suffix(level)}", claim, level, name)
            rows.append(_ratio(*args, pair(n), pair(n, "fused"), misses, reason, raises=False))
    return rows


def _suffix(level: str) -> str:
    return "l1_misses" if level == "l1" else "ll_misses"


def _ratio(
    context: Context,
    name: str,
    claim: str,
    level: str,
    title: str,
    before: Layer,
    after: Layer,
    misses: Misser | None,
    reason: str,
    *,
    raises: bool,
) -> Row:
    """`after`'s misses over `before`'s, which the claim says are above or below one."""
    command, unit = context.command("caches"), UNIT.format(level=title)
    if misses is None:
        return Row(name, claim, "this package", None, None, unit, command, UNMEASURED, reason)
    old, new = (getattr(misses(layer), level) for layer in (before, after))
    size = CACHES.l1 if level == "l1" else CACHES.last
    modelled = [modelled_misses(_as_modelled(layer), size) for layer in (before, after)]
    details = {"before": asdict(misses(before)), "after": asdict(misses(after)), "modelled": modelled}
    if old < 1 or new < 1:
        note = f"{old:.0f} before, {new:.0f} after: this level holds all of it"
        return Row(name, claim, "this package", None, None, unit, command, UNMEASURED, note, details)
    ratio = new / old
    note = f"{old:,.0f} before, {new:,.0f} after a call; the model says {modelled[0]:,.0f} and {modelled[1]:,.0f}"
    verdict = CONFIRMED if (ratio > 1) is raises and abs(ratio - 1) > 0.01 else REFUTED
    return Row(name, claim, "this package", None, ratio, unit, command, verdict, note, details)


def _rate(context: Context, n: int, claim: str, misses: Misser | None, reason: str) -> Row:
    name, unit, command = f"asymmetric_{n}_l1_rate", "times the L1 miss rate", context.command("caches")
    if misses is None:
        return Row(name, claim, "this package", None, None, unit, command, UNMEASURED, reason)
    old, new = (100 * m.l1 / m.accesses for m in map(misses, (square(n), pair(n))))
    note = f"{old:.2f} % of the accesses before, {new:.2f} % after"
    verdict = CONFIRMED if new > old else REFUTED
    return Row(name, claim, "this package", None, new / old, unit, command, verdict, note)


def _as_modelled(layer: Layer) -> Layer:
    """The model knows no fusion: its pair is the two convolutions in sequence."""
    return replace(layer, kind="pair") if layer.kind == "fused" else layer


def _sweep(context: Context, misses: Misser) -> Row:
    """Misses per call as the map grows, for the square kernel, the pair in sequence and the pair fused."""
    c, n = SWEEP_WIDTH, SWEEP_SIZE
    points: list[dict[str, Any]] = []
    for side in SWEEP_SIDES:
        for kind in ("conv", "pair", "fused"):
            layer = Layer(kind, side, side, c, c, n, n, mid=c if kind != "conv" else 0)
            got, modelled = misses(layer), _as_modelled(layer)
            points.append(
                {
                    "kind": kind,
                    "side": side,
                    "bytes": 4 * (2 * side * side * c + c * c * (n * n if kind == "conv" else 2 * n)),
                    "l1": got.l1,
                    "last": got.last,
                    "model_l1": None if kind == "fused" else modelled_misses(modelled, CACHES.l1),
                    "model_last": None if kind == "fused" else modelled_misses(modelled, CACHES.last),
                }
            )
    largest = [p for p in points if p["side"] == SWEEP_SIDES[-1]]
    by_kind = {p["kind"]: p for p in largest}
    ratio = by_kind["fused"]["l1"] / by_kind["pair"]["l1"]
    verdict = CONFIRMED if ratio < 0.99 else REFUTED
    claim = f"On a {SWEEP_SIDES[-1]}x{SWEEP_SIDES[-1]} map too, fusing 1x{n} and {n}x1 gives back misses in L1."
    note = f"{c} channels; caches of {CACHES.l1 >> 10} KiB and {CACHES.last >> 10} KiB, float32, the AVX2 kernels"
    details = {"points": points, "l1": CACHES.l1, "last": CACHES.last}
    unit, command = UNIT.format(level="L1"), context.command("caches")
    return Row("misses_over_map_size", claim, "this package", None, ratio, unit, command, verdict, note, details)
