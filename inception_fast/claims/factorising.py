"""Small kernels for large ones: two 3x3 for a 5x5, 1xn and nx1 for nxn; work counted, then time taken."""

from __future__ import annotations

from torch import Tensor, nn

from ..measure.flops import layers, totals
from . import nets
from .context import Context
from .race import Contestant, Race, RedGate, race
from .row import UNMEASURED, Row, counted, saved

PAPER = "arXiv:1512.00567"
FUSED_BATCH = 4  # a pair of one image is left as two operators
STACK_WIDTH, STACK_GRID = 64, 35  # where the networks have their 5x5 convolutions


def macs(module: nn.Module, x: Tensor) -> int:
    return totals(layers(module, x))[0]


def factorising(context: Context) -> list[Row]:
    return [*_counts(context), *_times(context)]


def _counts(context: Context) -> list[Row]:
    x = nets.images(STACK_WIDTH, STACK_GRID, STACK_GRID)
    five, three = macs(nets.square(5, STACK_WIDTH), x), macs(nets.square(3, STACK_WIDTH), x)
    stack = macs(nets.stacked(2, 3, STACK_WIDTH), x)
    twos = macs(nets.stacked(2, 2, STACK_WIDTH), x)
    rows = [
        _count(
            context, "two_3x3_for_5x5_macs", "Two 3x3 convolutions in place of a 5x5 save 28 % of its multiply-adds.",
            "section 3.1", 28, 100 * (1 - stack / five), {"before": five, "after": stack},
        ),
        _count(
            context, "5x5_over_3x3_macs", "A 5x5 convolution costs 25/9 = 2.78 times a 3x3 of the same width.",
            "section 3.1", 2.78, five / three, {"before": three, "after": five}, "times the multiply-adds",
        ),
        _count(
            context, "two_2x2_for_3x3_macs", "Two 2x2 convolutions in place of a 3x3 save only 11 %.",
            "section 3.2", 11, 100 * (1 - twos / three), {"before": three, "after": twos},
        ),
    ]  # fmt: skip
    x = nets.images(nets.WIDTH, nets.GRID, nets.GRID)
    for n in nets.PAIR_SIZES:
        square, pair = macs(nets.square(n), x), macs(nets.asymmetric(n), x)
        stated = 33 if n == 3 else round(100 * (1 - 2 / n), 1)
        claim = f"Convolutions of 1x{n} and {n}x1 in place of {n}x{n} save {stated:g} % of its multiply-adds."
        where = "section 3.2" if n == 3 else "section 3.2, by its formula 1 - 2/n"
        saving = 100 * (1 - pair / square)
        rows.append(
            _count(context, f"asymmetric_{n}_macs", claim, where, stated, saving, {"before": square, "after": pair})
        )
    return rows


def _count(
    context: Context,
    name: str,
    claim: str,
    where: str,
    stated: float,
    measured: float,
    details: dict[str, int],
    unit: str = "% of the multiply-adds",
) -> Row:
    source, command = f"{PAPER}, {where}", context.command("factorising")
    return Row(
        name, claim, source, stated, measured, unit, command, counted(measured, stated), details={"macs": details}
    )


def _times(context: Context) -> list[Row]:
    rows = []
    x = nets.images(STACK_WIDTH, STACK_GRID, STACK_GRID)
    five = Contestant(nets.settled(nets.square(5, STACK_WIDTH)))
    stack = Contestant(nets.settled(nets.stacked(2, 3, STACK_WIDTH)))
    claim = "Two 3x3 convolutions in place of a 5x5 save 28 % of the work, and so of the time."
    rows += raced(context, "factorising", "two_3x3_for_5x5_time", claim, f"{PAPER}, section 3.1", 28, x, five, stack)
    x = nets.images(nets.WIDTH, nets.GRID, nets.GRID)
    several = nets.images(nets.WIDTH, nets.GRID, nets.GRID, FUSED_BATCH)
    for n in nets.PAIR_SIZES:
        square = Contestant(nets.settled(nets.square(n)))
        pair = Contestant(nets.settled(nets.asymmetric(n)))
        stated = round(100 * (1 - 2 / n), 1)
        claim = f"Convolutions of 1x{n} and {n}x1 in place of {n}x{n} save {stated:g} % of the work, so of the time."
        rows += raced(
            context, "factorising", f"asymmetric_{n}_time", claim, f"{PAPER}, section 3.2", stated, x, square, pair
        )
        apart = Contestant(pair.module, ("form_chains",))
        claim = f"Running 1x{n} and {n}x1 as one operator saves time over two, on {FUSED_BATCH} images."
        name = f"fused_pair_{n}_time"
        rows += raced(context, "factorising", name, claim, "this package", None, several, apart, pair)
    return rows


def raced(
    context: Context,
    study: str,
    name: str,
    claim: str,
    source: str,
    stated: float | None,
    x: Tensor,
    before: Contestant,
    after: Contestant,
) -> list[Row]:
    """The row of one race: how much of `before`'s time `after` saves."""
    context.say(f"{study}: timing {name}")
    command = context.command(study)
    try:
        result: Race = race({"before": before, "after": after}, x, context.plan, context.flush)
    except RedGate as gate:
        return [Row(name, claim, source, stated, None, "% of the time", command, UNMEASURED, str(gate))]
    saving = result.saving("after", "before")
    verdict = saved(saving, stated, result.established("after", "before"))
    times = result.times()
    note = f"{times['before']['median_ms']:.3f} ms before, {times['after']['median_ms']:.3f} ms after, cold caches"
    return [Row(name, claim, source, stated, saving, "% of the time", command, verdict, note, {"times": times})]
