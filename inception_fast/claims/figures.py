"""The report's pictures, each drawn from the rows alone, so that claims.json holds all that they show."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ..measure.results import write_atomically
from .nets import PAIR_SIZES, REDUCTIONS
from .row import Row

BLUE, ORANGE, GREEN, PURPLE, GREY, RED = "#1b6ca8", "#d9772b", "#3b8f4e", "#7d5ba6", "#8a8578", "#c22f2f"
Rows = Mapping[str, Row]


def draw(rows: Sequence[Row], folder: Path) -> dict[str, str]:
    """Writes a PNG for every picture that the rows suffice for; returns {file name: caption}. Needs matplotlib."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    known = {row.id: row for row in rows}
    written = {}
    for name, (picture, caption) in PICTURES.items():
        figure = picture(known)
        if figure is not None:
            canvas = FigureCanvasAgg(figure)
            write_atomically(folder / name, lambda scratch, c=canvas: c.print_png(scratch))  # type: ignore[misc]
            written[name] = caption
    return written


def _figure(width: float, height: float) -> Any:
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained", dpi=110)


def _bare(axes: Any) -> None:
    axes.spines[["top", "right"]].set_visible(False)


def _factorising(rows: Rows) -> Any:
    """Three bars for each replacement: stated, counted, timed."""
    names = ["two_3x3_for_5x5", *(f"asymmetric_{n}" for n in PAIR_SIZES)]
    texts = ["two 3x3\nfor 5x5", *(f"1x{n} and {n}x1\nfor {n}x{n}" for n in PAIR_SIZES)]
    if not all(f"{name}_{part}" in rows for name in names for part in ("macs", "time")):
        return None
    figure = _figure(9, 4)
    axes = figure.subplots()
    series = (
        ("stated", [rows[f"{n}_macs"].stated for n in names], GREY),
        ("multiply-adds, counted", [rows[f"{n}_macs"].measured for n in names], BLUE),
        ("time, measured", [rows[f"{n}_time"].measured for n in names], ORANGE),
    )
    for i, (label, values, colour) in enumerate(series):
        places = [x + 0.27 * (i - 1) for x in range(len(names))]
        hatch = {"hatch": "//", "edgecolor": "white"} if label == "stated" else {}
        axes.bar(places, [v or 0.0 for v in values], 0.25, label=label, color=colour, **hatch)
        for x, value, name in zip(places, values, names, strict=True):
            doubt = "~" if label.startswith("time") and rows[f"{name}_time"].verdict == "not established" else ""
            text = "not\nmeasured" if value is None else f"{doubt}{value:.0f} %"
            axes.annotate(
                text, (x, max(value or 0.0, 0.0)), (0, 2), textcoords="offset points", ha="center", fontsize=9
            )
    worst = min(value or 0.0 for _, values, _ in series for value in values)
    axes.set_ylim(max(min(1.2 * worst, 0.0), -60), 112)  # a bar that runs out of the picture still has its figure
    axes.set_xticks(range(len(names)), texts)
    axes.set_ylabel("saved, per cent (~: within this run's noise)")
    axes.axhline(0, color="black", linewidth=0.8)
    figure.legend(frameon=False, loc="outside upper center", ncols=3)
    _bare(axes)
    return figure


def _reduction(rows: Rows) -> Any:
    """Work, time and representation of the three orders."""
    row = rows.get("reduction_parallel_macs")
    races = {kind: rows.get(f"reduction_{key}_time") for kind, key in zip(list(REDUCTIONS)[1:], _KEYS, strict=True)}
    if row is None:
        return None
    times = {kind: found.details["times"]["before"] for kind, found in races.items() if found and found.details}
    first = next((found for found in races.values() if found and found.details), None)
    if first is not None:
        times[next(iter(REDUCTIONS))] = first.details["times"]["after"]
    figure = _figure(10, 3.8)
    left, middle, right = figure.subplots(1, 3, width_ratios=(1, 1, 1.3))
    colours = dict(zip(REDUCTIONS, (GREEN, ORANGE, PURPLE), strict=True))
    names = list(REDUCTIONS)
    _bars(left, names, [row.details[n]["macs"] / 1e9 for n in names], colours, "billion multiply-adds", "{:.2f}")
    medians = [times.get(n, {}).get("median_ms") for n in names]
    _bars(middle, names, medians, colours, "milliseconds, cold caches", "{:.2f}")
    for name in names:
        levels = row.details[name]["levels"]
        values = [level["values"] / 1e3 for level in levels]
        places = [0.0, 2.0] if len(values) == 2 else [0.0, 1.0, 2.0]
        right.plot(places, values, marker="o", color=colours[name])
        spot = (1.0, values[1]) if len(values) == 3 else (1.0, sum(values) / 2)
        lift = (0, 8) if spot[1] > 200 else (0, -16)
        right.annotate(name, spot, lift, textcoords="offset points", ha="center", color=colours[name], fontsize=9)
    right.set_xticks([0, 1, 2], ["35x35x320", "between", "17x17x640"])
    right.set_ylabel("thousand values")
    right.set_ylim(0, 880)
    right.set_xlim(-0.25, 2.25)
    for axes, title in ((left, "Work"), (middle, "Time"), (right, "Representation")):
        axes.set_title(title, loc="left", fontsize=11, fontweight="bold")
        _bare(axes)
    return figure


_KEYS = ("pool_conv", "conv_pool")


def _bars(
    axes: Any, names: Sequence[str], values: Sequence[float | None], colours: Mapping[str, str], label: str, form: str
) -> None:
    known = [value or 0.0 for value in values]
    axes.bar(range(len(names)), known, color=[colours[name] for name in names])
    for x, value in enumerate(values):
        text = "not\nmeasured" if value is None else form.format(value)
        axes.annotate(text, (x, value or 0.0), (0, 2), textcoords="offset points", ha="center", fontsize=9)
    axes.set_xticks(range(len(names)), [name.replace(", ", ",\n").replace("convolution", "conv.") for name in names])
    axes.tick_params(axis="x", labelsize=8.5)
    axes.set_ylabel(label)
    axes.margins(y=0.12)


def _savings(rows: Rows) -> Any:
    """What the engine's rewrites save, with the doubtful ones pale."""
    found = [row for name, row in rows.items() if name in _ENGINE and row.measured is not None]
    if not found:
        return None
    figure = _figure(9, 0.5 * len(found) + 1.3)
    axes = figure.subplots()
    for y, row in enumerate(found):
        doubt = row.verdict == "not established"
        value = row.measured or 0.0
        axes.barh(y, value, color=GREY if doubt else GREEN if value > 0 else ORANGE)
        times = row.details["times"]
        text = f" {'~' if doubt else ''}{value:.1f} %   {times['before']['median_ms']:.2f} to "
        text += f"{times['after']['median_ms']:.2f} ms"
        axes.annotate(text, (max(value, 0.0), y), (3, 0), textcoords="offset points", va="center", fontsize=9)
    axes.set_yticks(range(len(found)), [_ENGINE[row.id] for row in found])
    axes.invert_yaxis()
    axes.axvline(0, color="black", linewidth=0.8)
    low, high = axes.get_xlim()
    axes.set_xlim(low, high + 0.45 * (high - low))
    axes.set_xlabel("time saved, per cent (grey and ~: within this run's noise)")
    _bare(axes)
    return figure


_ENGINE = {
    "merge_siblings_time": "sibling 1x1s merged",
    "commute_average_pool_time": "average pool behind its 1x1",
    **{f"fused_pair_{n}_time": f"1x{n} and {n}x1 as one operator" for n in PAIR_SIZES},
    "widening_time": "1x3 beside 3x1, for 1x3 then 3x1",
}


def _depth(rows: Rows) -> Any:
    """How much four networks hold along their depth, a panel for each, with the bottlenecks marked and named."""
    row = rows.get("bottlenecks_v3_v4")
    if row is None:
        return None
    figure = _figure(11, 6.4)
    panels = figure.subplots(2, 2, sharey=True)
    for axes, (name, levels) in zip(panels.flat, row.details["levels"].items(), strict=True):
        values = [level["values"] for level in levels]
        axes.plot(range(len(values)), values, ".-", color=BLUE, linewidth=1.4, markersize=6)
        for i, level in enumerate(levels):
            if level["name"] in row.details["flagged"][name]:
                axes.plot(i, values[i], "D", color=RED, markersize=7, zorder=3)
                axes.annotate(
                    f"bottleneck:\n{level['name']}", (i, values[i]), (4, -30), textcoords="offset points",
                    ha="right" if i < 4 else "left", color=RED, fontsize=9,
                )  # fmt: skip
        axes.set_yscale("log")
        axes.set_title(name, loc="left", fontsize=11, fontweight="bold")
        axes.grid(axis="y", color="#e5e5e5")
        axes.set_xlim(-1.5, len(values))
        axes.set_xticks(range(0, len(values), 5 if len(values) < 30 else 10))
        _bare(axes)
    for axes in panels[:, 0]:
        axes.set_ylabel("values that carry the image")
    for axes in panels[1]:
        axes.set_xlabel("points through which everything passes, in order")
    return figure


def _training(rows: Rows) -> Any:
    """A panel for each comparison, a dot for each seed; a panel whose dots are close together shows their range."""
    found = {name: rows[name].details["ends"] for name in _PANELS if name in rows and rows[name].details}
    if not found:
        return None
    figure = _figure(11, 3.0 * -(-len(found) // 2))
    panels = figure.subplots(-(-len(found) // 2), 2, squeeze=False).flat
    for axes, (name, ends) in zip(panels, found.items(), strict=False):
        for y, (label, values) in enumerate(ends.items()):
            without = label.startswith(("without", "plain")) or label.endswith("without BN")
            look = {"marker": "s", "color": ORANGE} if without else {"marker": "o", "color": BLUE}
            apart = [y + 0.5 * ((i + 0.5) / len(values) - 0.5) for i in range(len(values))]
            axes.plot([100 * v for v in values], apart, linestyle="", alpha=0.75, markersize=5, **look)
        axes.set_yticks(range(len(ends)), [_VARIANTS.get(label, label) for label in ends], fontsize=9)
        axes.set_ylim(len(ends) - 0.5, -0.5)
        lowest = min(100 * value for values in ends.values() for value in values)
        axes.set_xlim(*(-3, 103) if lowest < 70 else (lowest - 0.1 * (100 - lowest) - 0.2, 100.2))
        axes.set_title(_PANELS[name], loc="left", fontsize=10.5, fontweight="bold")
        axes.set_xlabel("accuracy on held-out images, per cent; a mark for each seed", fontsize=9)
        axes.grid(axis="y", color="#eeeeee")
        _bare(axes)
    for axes in list(panels)[len(found) :]:
        axes.set_visible(False)
    return figure


_VARIANTS = {
    "parallel": "convolution beside pool",
    "pool_conv": "pool, then convolution",
    "conv_pool": "convolution, then pool",
    "smoothing 0": "no smoothing",
    "smoothing 0.1": "smoothing by 0.1",
    "residual": "residual blocks",
    "plain": "plain blocks",
}
_PANELS = {
    "batchnorm_rate": "Batch norm and the learning rate",
    "batchnorm_scale": "Batch norm and the initial weights",
    "batchnorm_sigmoid": "Batch norm and the sigmoid",
    "label_smoothing": "Label smoothing",
    "grid_reduction_accuracy": "Halving the grid",
    "residual": "Residual connections",
}


def _caches(rows: Rows) -> Any:
    """Misses a call over the size of all data, simulated and modelled, the capacities drawn in."""
    row = rows.get("fusing_over_map_size_last")
    if row is None or not row.details:
        return None
    figure = _figure(12.5, 5)
    for axes, (level, title) in zip(figure.subplots(1, 3), _LEVELS.items(), strict=True):
        for kind, (_, colour, marker) in _KINDS.items():
            points = [p for p in row.details["points"] if p["kind"] == kind]
            sizes = [p["bytes"] / 1024 for p in points]
            # Counts below one are drawn at the foot: a logarithm has no place for none.
            found, model = ([max(p[key], 0.5) for p in points] for key in (level, f"model_{level}"))
            axes.plot(sizes, found, marker=marker, markersize=6, fillstyle="none", color=colour, linewidth=1.4)
            axes.plot(sizes, model, "--", color=colour, linewidth=1)
        for name, key in (("L1", "l1"), ("L2", "l2"), ("LL", "last")):
            size = row.details[key]
            axes.axvline(size / 1024, color="#444444", linewidth=1, linestyle=":")
            text = f"{name}\n{size >> 10} KiB" if size < 1 << 20 else f"{name}\n{size >> 20} MiB"
            axes.annotate(
                text, (size / 1024, 0.99), (3, 0), xycoords=("data", "axes fraction"), textcoords="offset points",
                va="top", fontsize=9,
            )  # fmt: skip
        axes.set_xscale("log")
        axes.set_yscale("log")
        axes.set_ylim(0.35, 4e7)
        axes.set_xticks([32, 128, 512, 2048], ["32 KiB", "128 KiB", "512 KiB", "2 MiB"])
        axes.set_xticks([], minor=True)
        axes.set_yticks([10.0**power for power in range(7)])
        axes.set_title(f"Misses in {title}", loc="left", fontsize=11, fontweight="bold")
        axes.set_xlabel("maps and weights together")
        axes.grid(color="#eeeeee")
        _bare(axes)
    figure.axes[0].set_ylabel("lines of 64 bytes a call (none: at the foot)")
    handles = [_key(color=c, marker=m, fillstyle="none", label=text) for text, c, m in _KINDS.values()]
    handles += [_key(color="black", label="counted by cachegrind"), _key("--", color="black", label="modelled")]
    figure.legend(handles=handles, frameon=False, loc="outside upper center", ncols=3, fontsize=10)
    return figure


def _key(style: Any = "-", **look: Any) -> Any:
    """A sample line for a legend."""
    from matplotlib.lines import Line2D

    return Line2D([], [], linestyle=style, **look)


_LEVELS = {"l1": "L1, 8 ways", "l2": "L2, 8 ways", "last": "LL, the last level, 16 ways"}
_KINDS = {
    "conv": ("7x7", GREY, "o"),
    "separate": ("1x7 and 7x1, each called by itself", GREEN, "^"),
    "pair": ("1x7, then 7x1, in sequence", ORANGE, "s"),
    "fused": ("1x7 and 7x1 fused", BLUE, "D"),
}

PICTURES: dict[str, tuple[Callable[[Rows], Any], str]] = {
    "factorising.png": (_factorising, "What small kernels save: as stated, as counted, as timed on this machine."),
    "caches.png": (
        _caches,
        "Cache misses of a call as two images of 16 channels grow from 6x6 to 90x90: counted by cachegrind, which runs "
        "the native AVX2 code on simulated caches (solid), and computed from reuse distances, the bytes touched "
        "between two uses of the same data (dashed). Dotted lines are what each cache holds: left of a level's line "
        "its misses should be none. Fusing keeps the map between the two kernels small, so it overflows a level later; "
        "two kernels called by themselves share a level with nothing, so they overflow it last.",
    ),
    "reduction.png": (
        _reduction,
        "Halving a 35x35x320 map to 17x17x640 in three orders. Pool first is cheap and squeezes the representation; "
        "convolution first is dear; the parallel reduction is neither.",
    ),
    "engine.png": (_savings, "What running the same arithmetic in another arrangement saves."),
    "depth.png": (
        _depth,
        "How many values carry the image along four networks, from input to logits. Red diamonds: the representation "
        "shrinks to half or less and grows to twice as much again, so something was lost there. v4 replaced v3's first "
        "pool by a parallel reduction and has none.",
    ),
    "training.png": (
        _training,
        "Where the trainings ended: a small Inception network on images of digits, a mark for each seed; chance is "
        "10 %. Orange squares are without what the claim is about. The axes differ: panels of similar results show "
        "their range.",
    ),
}
