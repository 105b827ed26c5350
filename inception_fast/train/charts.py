"""Line charts as SVG text: no plotting library, nothing to load, sharp at any size."""

from __future__ import annotations

import html
import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, groupby

COLOURS = ("#1b6ca8", "#d9772b", "#3b8f4e", "#7d5ba6", "#b83a4b", "#6b6b6b", "#c2a11f", "#2a9d9d")
WIDTH, HEIGHT = 460, 300
LEFT, RIGHT, TOP, BOTTOM = 56, 22, 30, 42


@dataclass(frozen=True)
class Line:
    """Points (x, y) in rising x; where given, `low` and `high` bound a band of the same length."""

    label: str
    x: Sequence[float]
    y: Sequence[float]
    low: Sequence[float] = ()
    high: Sequence[float] = ()
    colour: str = COLOURS[0]


def chart(title: str, x_label: str, lines: Sequence[Line]) -> str:
    """One <svg> element. Values that are not finite and lines without points leave gaps; with nothing to draw it says
    so.
    """
    inner = WIDTH - LEFT - RIGHT, HEIGHT - TOP - BOTTOM
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" width="{WIDTH}" height="{HEIGHT}" '
        'font-family="sans-serif" font-size="11" role="img">',
        f"<title>{html.escape(title)}</title>",
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="#fff"/>',
        f'<text x="{LEFT}" y="18" font-size="13" font-weight="bold">{html.escape(title)}</text>',
        f'<text x="{LEFT + inner[0] / 2}" y="{HEIGHT - 8}" text-anchor="middle">{html.escape(x_label)}</text>',
    ]
    xs = _finite([x for line in lines for x in line.x])
    ys = _finite([y for line in lines for y in (*line.y, *line.low, *line.high)])
    if not xs or not ys:
        return "".join([*parts, f'<text x="{WIDTH / 2}" y="{HEIGHT / 2}" text-anchor="middle">no data</text></svg>'])
    x_ticks, y_ticks = ticks(min(xs), max(xs)), ticks(min(ys), max(ys))

    def place(x: float, y: float) -> str:
        across = (x - x_ticks[0]) / (x_ticks[-1] - x_ticks[0])
        up = (y - y_ticks[0]) / (y_ticks[-1] - y_ticks[0])
        return f"{LEFT + inner[0] * across:.1f},{TOP + inner[1] * (1 - up):.1f}"

    parts += _axes(x_ticks, y_ticks, place)
    for line in lines:
        parts += _drawn(line, place)
    return "".join([*parts, "</svg>"])


def _axes(x_ticks: list[float], y_ticks: list[float], place) -> list[str]:  # type: ignore[no-untyped-def]
    parts = []
    for y in y_ticks:
        at = place(x_ticks[0], y).split(",")[1]
        parts.append(f'<line x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{at}" y2="{at}" stroke="#ddd"/>')
        parts.append(f'<text x="{LEFT - 6}" y="{float(at) + 4:.1f}" text-anchor="end">{number(y)}</text>')
    for x in x_ticks:
        at = place(x, y_ticks[0]).split(",")[0]
        parts.append(f'<line x1="{at}" x2="{at}" y1="{HEIGHT - BOTTOM}" y2="{HEIGHT - BOTTOM + 4}" stroke="#888"/>')
        parts.append(f'<text x="{at}" y="{HEIGHT - BOTTOM + 16}" text-anchor="middle">{number(x)}</text>')
    return parts


def _drawn(line: Line, place) -> list[str]:  # type: ignore[no-untyped-def]
    parts = []
    if line.low and line.high:
        edge = [(x, y) for x, y in zip(line.x, line.high, strict=True) if math.isfinite(y)]
        edge += [(x, y) for x, y in reversed(list(zip(line.x, line.low, strict=True))) if math.isfinite(y)]
        points = " ".join(place(x, y) for x, y in edge)
        parts.append(f'<polygon points="{points}" fill="{line.colour}" fill-opacity="0.18"/>')
    label = html.escape(line.label)
    for finite, run in groupby(zip(line.x, line.y, strict=True), key=lambda point: math.isfinite(point[1])):
        if finite:  # a gap stays one
            points = " ".join(place(x, y) for x, y in run)
            parts.append(f'<polyline points="{points}" fill="none" stroke="{line.colour}" stroke-width="1.8">')
            parts.append(f"<title>{label}</title></polyline>")
    return parts


def ticks(low: float, high: float, most: int = 6) -> list[float]:
    """Round numbers, at most about `most`, the first at or below `low` and the last at or above `high`."""
    if high - low <= 1e-9 * max(abs(low), abs(high)):  # alike but for rounding: nothing to tell between them
        high = low + (abs(low) or 1.0)
    raw = (high - low) / (most - 1)
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(power * factor for factor in (1, 2, 5, 10) if power * factor >= raw * (1 - 1e-9))
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [step * i for i in range(first, last + 1)]


def number(value: float) -> str:
    """Short: 0.25, 1500, 2.5M."""
    for limit, letter in ((1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M")):
        if abs(value) >= limit:
            return f"{value / limit:g}{letter}"
    return f"{value:.6g}"


def smooth(values: Sequence[float], window: int) -> list[float]:
    """The mean of each value and up to `window` - 1 before it.

    Sums of what ends one block and begins the next: nothing is subtracted, so that a spike leaves no rounding behind.
    """
    result: list[float] = []
    tails = [0.0] * window  # [n]: the sum of the last n values of the block before
    for first in range(0, len(values), window):
        block = values[first : first + window]
        for n, head in enumerate(accumulate(block), 1):
            result.append((head + tails[window - n]) / min(first + n, window))
        tails = list(accumulate(reversed(block), initial=0.0))
    return result


def _finite(values: Sequence[float]) -> list[float]:
    return [value for value in values if math.isfinite(value)]
