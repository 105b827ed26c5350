"""The picture of a comparison: a panel for each number format and batch size, a group of bars for each network."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from .compare import Row
from .peers import Layers, Ours, OursWinograd
from .results import write_atomically

COLOURS = {
    Ours.name: "#1b6ca8",
    OursWinograd.name: "#6fb1dd",
    Layers().name: "#2e8b74",
    Layers(winograd=True).name: "#86c5b4",
    "eager": "#b9b4a7",
    "compile": "#8f8a7c",
    "onnxruntime": "#d99b4e",
    "openvino": "#7d5ba6",
}
OTHER = "#5f5f5f"


def plot(rows: Sequence[Row], title: str, path: Path) -> None:
    """Writes a PNG of median times with their quartiles' distance; needs matplotlib and at least one row with a time.

    Raises:
        ImportError: matplotlib is not installed.
        ValueError: no row has a time.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    timed = [row for row in rows if row.median_ms is not None]
    if not timed:
        raise ValueError("nothing was timed; a plot needs at least one time")
    panels = list(dict.fromkeys((row.batch, row.dtype) for row in timed))
    heights = [1.2 + 0.3 * sum((r.batch, r.dtype) == panel for r in timed) for panel in panels]
    figure = Figure(figsize=(9, sum(heights) + 1.3), layout="constrained")
    figure.suptitle(title, fontsize=10)
    for axes, panel in zip(
        figure.subplots(len(panels), 1, squeeze=False, height_ratios=heights)[:, 0], panels, strict=True
    ):
        _panel(axes, [row for row in timed if (row.batch, row.dtype) == panel])
        axes.set_title(f"batch {panel[0]}, {panel[1]}", loc="left", fontsize=10)
    canvas = FigureCanvasAgg(figure)
    write_atomically(path, lambda scratch: canvas.print_png(scratch))


def _panel(axes, rows: Sequence[Row]) -> None:  # type: ignore[no-untyped-def]
    models = list(dict.fromkeys(row.model for row in rows))
    position, ticks = 0.0, []
    longest = max((row.median_ms or 0.0) + (row.iqr_ms or 0.0) / 2 for row in rows)
    for model in models:
        group = [row for row in rows if row.model == model]
        for row in group:
            median, iqr = row.median_ms or 0.0, row.iqr_ms or 0.0
            axes.barh(position, median, height=0.8, color=COLOURS.get(row.runtime, OTHER))
            axes.errorbar(median, position, xerr=iqr / 2, color="black", capsize=2, linewidth=1)
            text = f"{median:.1f} ms" + _versus(row)
            axes.text(median + iqr / 2 + 0.01 * longest, position, f" {text}", va="center", fontsize=8)
            ticks.append((position, row.runtime))
            position += 1
        axes.text(
            -0.17,
            position - len(group) / 2 - 0.5,
            model,
            transform=axes.get_yaxis_transform(),
            ha="right",
            va="center",
            fontsize=9,
            fontweight="bold",
        )
        position += 0.6
    axes.set_yticks([p for p, _ in ticks], [name for _, name in ticks], fontsize=8)
    axes.invert_yaxis()
    axes.set_xlim(0, 1.25 * longest)
    axes.margins(y=0.01)
    axes.set_xlabel(
        "milliseconds a call (median, whiskers: quartiles' distance); x: time over ours, ~ within noise", fontsize=8
    )
    axes.spines[["top", "right"]].set_visible(False)


def _versus(row: Row) -> str:
    if row.ratio is None or row.runtime == Ours.name:
        return ""
    return f"   {'~' if row.established is False else ''}{row.ratio:.2f}x"
