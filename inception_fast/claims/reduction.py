"""Halving the grid in three orders, and widening in place of a bottleneck: work, representation, time."""

from __future__ import annotations

from torch import nn

from ..measure.design import Design, inspect
from . import nets
from .context import Context
from .factorising import PAPER, raced
from .race import Contestant
from .row import CONFIRMED, REFUTED, Row, counted

PARALLEL, POOL_FIRST, CONV_FIRST = nets.REDUCTIONS


def reduction(context: Context) -> list[Row]:
    x = nets.images(*nets.REDUCTION)
    designs = {name: inspect(make(), x) for name, make in nets.REDUCTIONS.items()}
    where, command = f"{PAPER}, section 5", context.command("reduction")
    details = {name: _about(design) for name, design in designs.items()}

    def costs(name: str, claim: str, stated: float, dear: str, cheap: str, note: str = "") -> Row:
        measured = designs[dear].macs / designs[cheap].macs
        unit = "times the multiply-adds"
        return Row(name, claim, where, stated, measured, unit, command, counted(measured, stated), note, details)

    rows = [
        costs(
            "reduction_conv_pool_macs", "Convolution then pool costs four times as much as pool then convolution.", 4,
            CONV_FIRST, POOL_FIRST, "17x17 is a little less than a quarter of 35x35",
        ),
        costs(
            "reduction_parallel_macs", "A strided convolution beside a pool costs half of pool then convolution.", 2,
            POOL_FIRST, PARALLEL,
        ),
    ]  # fmt: skip
    for name, kind, expected in (
        ("reduction_pool_conv_bottleneck", POOL_FIRST, True),
        ("reduction_parallel_bottleneck", PARALLEL, False),
        ("reduction_conv_pool_bottleneck", CONV_FIRST, False),
    ):
        design = designs[kind]
        says = "squeezes the representation through a" if expected else "has no"
        claim = f"Halving the grid by {_phrase(kind)} {says} bottleneck."
        verdict = CONFIRMED if bool(design.bottlenecks) is expected else REFUTED
        stated = float(17 * 17 * (320 if expected else 640))
        note = "; ".join(map(str, design.bottlenecks)) or "no level is flagged"
        narrow, unit = float(design.narrowest), "values in the narrowest map"
        rows.append(Row(name, claim, where, stated, narrow, unit, command, verdict, note, details))
    ready = {kind: Contestant(nets.settled(make())) for kind, make in nets.REDUCTIONS.items()}
    for name, kind in (("reduction_pool_conv_time", POOL_FIRST), ("reduction_conv_pool_time", CONV_FIRST)):
        stated = 100 * (1 - designs[PARALLEL].macs / designs[kind].macs)
        claim = f"The parallel reduction saves time over {_phrase(kind)}, as it saves {stated:.0f} % of the work."
        rows += raced(context, "reduction", name, claim, where, round(stated, 1), x, ready[kind], ready[PARALLEL])
    return rows


def _phrase(kind: str) -> str:
    return {PARALLEL: "a strided convolution beside a pool", POOL_FIRST: "pool, then convolution"}.get(
        kind, "convolution, then pool"
    )


def _about(design: Design) -> dict[str, object]:
    levels = [{"name": level.name, "shape": level.shape, "values": level.values} for level in design.levels]
    return {"macs": design.macs, "params": design.params, "narrowest": design.narrowest, "levels": levels}


def widening(context: Context) -> list[Row]:
    """v3's 8x8 blocks expand by 1x3 beside 3x1; the alternative is the two in a row."""
    x = nets.images(384, 8, 8)
    modules: dict[str, nn.Module] = {"deep": nets.settled(nets.deep()), "wide": nets.settled(nets.wide())}
    designs = {name: inspect(module, x) for name, module in modules.items()}
    where, command = f"{PAPER}, section 6 and figure 7", context.command("widening")
    details = {name: _about(design) for name, design in designs.items()}
    smallest = {
        name: min(level.values for level in design.levels[1:]) / design.levels[-1].values
        for name, design in designs.items()
    }
    saving = 100 * (1 - designs["wide"].macs / designs["deep"].macs)
    rows = [
        Row(
            "widening_representation", "Filter banks made wider keep the representation; made deeper they narrow it.",
            where, 1.0, smallest["wide"], "narrowest map over the block's output", command,
            CONFIRMED if smallest["wide"] == 1 > smallest["deep"] else REFUTED,
            f"1x3 beside 3x1: {smallest['wide']:g}; 1x3 then 3x1: {smallest['deep']:g}", details,
        ),
        Row(
            "widening_macs", "To the same 768 channels, 1x3 beside 3x1 costs less than 1x3 then 3x1.", where, None,
            saving, "% of the multiply-adds", command, CONFIRMED if saving > 0 else REFUTED, "", details,
        ),
    ]  # fmt: skip
    claim = f"1x3 beside 3x1 takes less time than 1x3 then 3x1, as it has {saving:.0f} % less work."
    before, after = Contestant(modules["deep"]), Contestant(modules["wide"])
    return [*rows, *raced(context, "widening", "widening_time", claim, where, round(saving, 1), x, before, after)]
