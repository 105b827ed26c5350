"""The pictures of README and docs/, SVGs drawn from the filed results.

Each keeps the numbers that it was drawn from, so that a test can tell whether they are still those of the files.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

from headline import newest_cases
from tables import Found, newest

from inception_fast.measure.cpu_plots import growth_figure
from inception_fast.measure.plots import COLOURS
from inception_fast.measure.results import write_atomically
from inception_fast.train.charts import smooth

EVERY, WINDOW = 10, 10  # steps between two points of a loss, steps that a point is the mean of
LINES = ("#1b6ca8", "#d9772b")


class Picture(NamedTuple):
    """numbers: of the filed results, None without such; figure: what is drawn of them."""

    numbers: Callable[[Found, Path], Any]
    figure: Callable[[Any], Any]


def speed_numbers(found: Found, results: Path) -> dict[str, dict[str, float]] | None:
    """By network and format, of one image, how many times as fast as eager PyTorch each runtime is."""
    cases, _ = newest_cases(found)
    return {
        f"{model} {dtype}": {
            name: round(rows["eager"]["median_ms"] / row["median_ms"], 3) for name, row in rows.items()
        }
        for (model, _, dtype), rows in cases.items()
        if "eager" in rows
    } or None


def speed_figure(numbers: Mapping[str, Mapping[str, float]]) -> Any:
    """A panel for each number format and a group of bars for each network."""
    from matplotlib.figure import Figure

    formats = list(dict.fromkeys(case.split()[1] for case in numbers))
    figure = Figure(figsize=(9, 2.3 * len(formats) + 0.4), layout="constrained", facecolor="white")
    handles: dict[str, Any] = {}
    for axes, dtype in zip(figure.subplots(len(formats), 1, squeeze=False)[:, 0], formats, strict=True):
        _bars(axes, {case.split()[0]: own for case, own in numbers.items() if case.split()[1] == dtype})
        axes.set_title(f"{dtype}, one image: times the speed of eager PyTorch", loc="left", fontsize=10)
        handles |= {name: handle for handle, name in zip(*axes.get_legend_handles_labels(), strict=True)}
    names = sorted(handles, key=list(COLOURS).index)
    place: dict[str, Any] = {"loc": "outside lower center", "ncols": len(names), "fontsize": 8, "frameon": False}
    figure.legend([handles[name] for name in names], names, **place)
    return figure


def _bars(axes: Any, networks: Mapping[str, Mapping[str, float]]) -> None:
    order = [name for name in COLOURS if name != "eager" and any(name in own for own in networks.values())]
    for place, own in enumerate(networks.values()):
        present = [name for name in order if name in own]
        for i, name in enumerate(present):
            x = place + 0.8 * ((i + 0.5) / len(present) - 0.5)
            bar = axes.bar(x, own[name], 0.8 / len(present), color=COLOURS[name], label=name)
            axes.bar_label(bar, fmt="%.1f", fontsize=6)
    axes.axhline(1, color=COLOURS["eager"], linewidth=1)
    axes.set_xticks(range(len(networks)), list(networks), fontsize=8)
    axes.tick_params(axis="y", labelsize=8)
    axes.spines[["top", "right"]].set_visible(False)


def growth_numbers(found: Found, results: Path) -> dict[str, Any] | None:
    """How the cost of an image grows, of the suite that was run last."""
    suites = newest(found, "cpu-suite")
    if not suites:
        return None
    _, document = max(suites, key=lambda item: item[1]["provenance"]["date"])
    short = [{key: _short(value) for key, value in row.items()} for row in document.get("growth", [])]
    return {"title": f"inception_v3, {document['provenance']['machine']}", "rows": short} if short else None


def curve_numbers(found: Found, results: Path) -> dict[str, Any] | None:
    """Losses of Inception v4 and Inception-ResNet-v2 on the same data: of the seeds the least, the middle, the most."""
    documents = [json.loads(path.read_text("utf-8")) for path in results.glob("*/*-training-residual-v4*.json")]
    if not documents:
        return None
    document = max(documents, key=lambda document: document["provenance"]["date"])
    models = dict.fromkeys(curve["model"] for curve in document["curves"])
    lines = {}
    for model in models:
        runs = [
            smooth(curve["loss"], WINDOW)[EVERY - 1 :: EVERY] for curve in document["curves"] if curve["model"] == model
        ]
        steps = list(zip(*runs, strict=True))
        lines[model] = {name: [_short(of(step)) for step in steps] for name, of in BAND.items()}
    return {"seeds": len({curve["seed"] for curve in document["curves"]}), "every": EVERY, "lines": lines}


BAND: dict[str, Callable[[Sequence[float]], float]] = {"low": min, "middle": median, "high": max}


def curve_figure(numbers: Mapping[str, Any]) -> Any:
    """A line for each network, and a band from the least to the most of its seeds."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 3), layout="constrained", facecolor="white")
    axes = figure.subplots()
    for colour, (model, line) in zip(LINES, numbers["lines"].items(), strict=True):
        steps = [numbers["every"] * (i + 1) for i in range(len(line["middle"]))]
        axes.fill_between(steps, line["low"], line["high"], color=colour, alpha=0.2, linewidth=0)
        axes.plot(steps, line["middle"], color=colour, label=model)
    axes.set_xlabel(f"steps; the middle one of {numbers['seeds']} seeds, and all of them", fontsize=8)
    axes.set_ylabel("loss", fontsize=8)
    axes.set_ylim(bottom=0)
    axes.tick_params(labelsize=8)
    axes.legend(frameon=False, fontsize=8)
    axes.spines[["top", "right"]].set_visible(False)
    return figure


def _short(value: Any) -> Any:
    return float(f"{value:.4g}") if isinstance(value, float) else value


PICTURES = {
    "docs/speed.svg": Picture(speed_numbers, speed_figure),
    "docs/growth.svg": Picture(growth_numbers, lambda numbers: growth_figure(numbers["rows"], numbers["title"])),
    "docs/curves.svg": Picture(curve_numbers, curve_figure),
}


def kept(path: Path) -> Any:
    """The numbers that a picture was drawn from; None where there is none."""
    held = re.search(r"<dc:description>(.*?)</dc:description>", path.read_text("utf-8")) if path.exists() else None
    return json.loads(held[1]) if held else None


def draw(figure: Any, numbers: Any, path: Path) -> None:
    """Writes a figure as an SVG with its numbers."""
    import matplotlib
    from matplotlib.backends.backend_svg import FigureCanvasSVG

    described = {"Date": None, "Creator": None, "Description": json.dumps(numbers)}
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": path.stem}):
        canvas = FigureCanvasSVG(figure)
        write_atomically(path, lambda scratch: canvas.print_svg(scratch, metadata=described))
