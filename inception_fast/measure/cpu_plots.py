"""How the cost of an image grows with the batch, the image's side and the number of threads."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .results import write_atomically

MARKERS = {"float32": "o", "bfloat16": "s"}
COLOURS = {"float32": "#d99b4e", "bfloat16": "#1b6ca8"}


def plot_growth(rows: Sequence[dict[str, Any]], title: str, path: Path) -> None:
    """Writes `growth_figure` as a PNG."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    canvas = FigureCanvasAgg(growth_figure(rows, title))
    write_atomically(path, lambda scratch: canvas.print_png(scratch))


def growth_figure(rows: Sequence[dict[str, Any]], title: str) -> Any:
    """A figure of milliseconds an image over the batch and GFLOP/s over the side, a line a format and count of threads.

    Needs matplotlib.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 4.2), layout="constrained")
    figure.suptitle(title, fontsize=10)
    panels = [
        ("batch", "ms_per_image", "images in a batch", "milliseconds an image"),
        ("side", "gflops", "side of the image, pixels", "GFLOP/s"),
    ]
    for axes, (axis, value, across, up) in zip(figure.subplots(1, 2), panels, strict=True):
        for dtype, threads in dict.fromkeys((row["dtype"], row["threads"]) for row in rows):
            line = [r for r in rows if (r["axis"], r["dtype"], r["threads"]) == (axis, dtype, threads)]
            axes.plot(
                [r["value"] for r in line],
                [r[value] for r in line],
                marker=MARKERS.get(dtype, "^"),
                markersize=4,
                color=COLOURS.get(dtype, "#5f5f5f"),
                linestyle="--" if threads == 1 else "-",
                label=f"{dtype}, {threads} thread{'s' if threads > 1 else ''}",
            )
        axes.set_ylim(bottom=0)
        axes.set_xlabel(across)
        axes.set_ylabel(up)
        axes.spines[["top", "right"]].set_visible(False)
    figure.legend(*axes.get_legend_handles_labels(), frameon=False, loc="outside lower center", ncols=4, fontsize=9)
    return figure
