"""The picture of a design: what the network holds, owns and spends along its depth."""

from __future__ import annotations

from itertools import accumulate
from pathlib import Path
from typing import Any

from .design import Design
from .results import write_atomically

BLUE, ORANGE, GREEN, RED = "#1b6ca8", "#d9772b", "#3b8f4e", "#c22f2f"
MOST_NAMES = 36  # that can be read side by side


def plot(design: Design, title: str, path: Path) -> None:
    """Writes a PNG with three panels over the levels: values, parameters, multiply-adds. Needs matplotlib."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    levels = design.levels
    places = range(len(levels))
    figure = Figure(figsize=(max(8.0, min(0.3 * len(levels) + 3, 16.0)), 8.5), layout="constrained", dpi=110)
    figure.suptitle(title, fontsize=11)
    values, params, macs = figure.subplots(3, 1, sharex=True, height_ratios=(1.4, 1, 1))
    _values(values, design)
    _spent(params, [level.params / 1e6 for level in levels], BLUE, "million parameters")
    _spent(macs, [level.macs / 1e6 for level in levels], GREEN, "million multiply-adds")
    step = -(-len(levels) // MOST_NAMES)
    flagged = {flag.name for flag in design.bottlenecks}
    shown = [i for i in places if i % step == 0 or levels[i].name in flagged]
    macs.set_xticks(shown, [levels[i].name for i in shown], rotation=90, fontsize=8)
    macs.set_xlabel("points of depth through which everything passes")
    canvas = FigureCanvasAgg(figure)
    write_atomically(path, lambda scratch: canvas.print_png(scratch))


def _values(axes: Any, design: Design) -> None:
    levels = design.levels
    axes.plot(range(len(levels)), [level.values for level in levels], "o-", color=ORANGE, markersize=4)
    axes.set_yscale("log")
    axes.set_ylabel("values that carry the input")
    flagged = {flag.name: flag for flag in design.bottlenecks}
    for i, level in enumerate(levels):
        flag = flagged.get(level.name)
        if flag is not None and flag.values == level.values:
            axes.plot(i, level.values, "o", color=RED, markersize=9, zorder=3)
            text = f"bottleneck: {level.name}"
            axes.annotate(text, (i, level.values), (0, -36), textcoords="offset points", ha="center", color=RED)
    axes.grid(axis="y", color="#e5e5e5")
    axes.spines[["top", "right"]].set_visible(False)


def _spent(axes: Any, amounts: list[float], colour: str, label: str) -> None:
    """Bars for each level, a line for the sum so far."""
    axes.bar(range(len(amounts)), amounts, color=colour, alpha=0.75)
    axes.set_ylabel(label)
    total = axes.twinx()
    total.plot(range(len(amounts)), list(accumulate(amounts)), color="#444444", linewidth=1.2)
    total.set_ylabel("sum so far", color="#444444")
    total.set_ylim(bottom=0)
    axes.spines[["top"]].set_visible(False)
    total.spines[["top"]].set_visible(False)
