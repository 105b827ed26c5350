"""A comparison as one HTML file that needs nothing else: the claim, a table of ends, curves against steps, time and
work.
"""

from __future__ import annotations

import html
import math
from collections.abc import Sequence
from typing import Any

from .charts import COLOURS, Line, chart, number, smooth

STYLE = (
    "body{font:14px/1.5 sans-serif;max-width:1440px;margin:2em auto;padding:0 1em;color:#222;background:#fff}"
    "table{border-collapse:collapse}td,th{padding:.3em .8em;border-bottom:1px solid #ddd;text-align:right}"
    "td:first-child,th:first-child{text-align:left}.key{display:inline-block;width:.8em;height:.8em;margin-right:.4em}"
    ".charts{display:flex;flex-wrap:wrap}p.small{color:#666;font-size:12px}"
)
AXES = (("step", "steps"), ("seconds", "seconds of training"), ("flops", "floating-point operations of training"))
DRIFT = (
    " Drift is the distance, between two looks at the same held-out images, of the channels' means of a layer's input, "
    "in standard deviations within a channel: the root mean square over the channels, then the mean over layers or "
    "looks and seeds."
)
POINTS = 200  # a line of more would show no more
DIVERGED = 2.0  # times the highest first loss, above which nothing is drawn: it would flatten all other lines


def page(document: dict[str, Any]) -> str:
    """The whole file."""
    about = document["about"] or {}
    title = about.get("title") or "Comparison of " + ", ".join(document["variants"])
    colours = {label: COLOURS[i % len(COLOURS)] for i, label in enumerate(document["variants"])}
    charts = [
        chart(f"{name} against {axis}", text, _lines(document, axis, key, colours))
        for name, key in (("Loss", "loss"), ("Accuracy", "accuracy"))
        for axis, text in AXES
    ]
    charts += _drift(document, colours) if document.get("drift") else []
    claim = f"<p>{html.escape(about['claim'])} ({html.escape(about['source'])})</p>" if about else ""
    settings = ", ".join(f"{key} {value}" for key, value in _shown(document["settings"]).items())
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{html.escape(title)}</title>'
        f"<style>{STYLE}</style></head><body><h1>{html.escape(title)}</h1>{claim}{_table(document, colours)}"
        f'<div class="charts">{"".join(charts)}</div>'
        f'<p class="small">Lines: means over the seeds of the batch\'s values, smoothed over a twentieth of the run; '
        "bands: lowest to highest seed. A line has a gap where a seed's loss is over twice the highest first one: it "
        "diverges. Loss is what is minimised, label smoothing and auxiliary heads in it; held-out "
        "figures are those of the averaged weights. Work counts six operations for each multiply-add of the forward "
        f"pass.{DRIFT if document.get('drift') else ''}</p>"
        f'<p class="small">Settings, but for what a variant changes: {html.escape(settings)}</p></body></html>\n'
    )


def _shown(settings: dict[str, Any]) -> dict[str, Any]:
    recipe = settings["recipe"]
    kept = {key: settings[key] for key in ("data", "steps", "batch_size", "image_size", "augment", "dtype")}
    return kept | {"recipe": recipe["name"], "optimizer": recipe["optimizer"], "learning rate": recipe["lr"]}


def _table(document: dict[str, Any], colours: dict[str, str]) -> str:
    heads = ("variant", "parameters", "multiply-adds", "seeds", "last loss", "last accuracy", "held-out accuracy")
    rows = []
    for label in document["variants"]:
        runs = [run for run in document["runs"] if run["model"] == label]
        if not runs:
            continue
        network = document["networks"][label]
        diverged = sum(run["status"] != "done" for run in runs)
        cells = (
            f'<span class="key" style="background:{colours[label]}"></span>{html.escape(label)}',
            f"{network['parameters']:,}",
            number(float(f"{network['macs_per_image']:.3g}")),
            f"{len(runs)}" + (f", {diverged} diverged" if diverged else ""),
            spread([run["loss"] for run in runs]),
            spread([run["accuracy"] for run in runs], percent=True),
            spread([run["held_out_accuracy"] for run in runs], percent=True),
            spread([1000 * run["seconds"] / run["steps"] for run in runs if run["steps"]]),
        )
        rows.append("<tr>" + "".join(f"<td>{cell}</td>" for cell in cells) + "</tr>")
    head = "".join(f"<th>{text}</th>" for text in (*heads, "ms a step"))
    return f"<table><tr>{head}</tr>{''.join(rows)}</table>"


def spread(values: Sequence[float | None], percent: bool = False) -> str:
    """Mean and half the distance between highest and lowest: "0.52 ± 0.03"; "-" without values."""
    known = [value for value in values if value is not None]
    if not known:
        return "-"
    mean, half = sum(known) / len(known), (max(known) - min(known)) / 2
    if percent:
        return f"{100 * mean:.1f} %" + (f" ± {100 * half:.1f}" if len(known) > 1 else "")
    return f"{mean:.4g}" + (f" ± {half:.2g}" if len(known) > 1 else "")


def _lines(document: dict[str, Any], axis: str, key: str, colours: dict[str, str]) -> list[Line]:
    lines = []
    window = max(document["settings"]["steps"] // 20, 1)
    firsts = [row[key] for row in document["rows"] if row["step"] == 1 and math.isfinite(row[key])]
    highest = DIVERGED * max(firsts, default=math.inf) if key == "loss" else math.inf
    for label in document["variants"]:
        curves = _curves(document["rows"], label)
        length = min((len(curve) for curve in curves), default=0)
        if not length:
            continue
        kept = range(0, length, -(-length // POINTS))
        values = [smooth([row[key] for row in curve[:length]], window) for curve in curves]
        columns = [[curve[i] for curve in values] for i in kept]
        x = [sum(curve[i][axis] for curve in curves) / len(curves) for i in kept]
        columns = [column if max(column) <= highest else [math.nan] * len(column) for column in columns]
        mean = [sum(column) / len(column) for column in columns]
        low, high = ([min(c) for c in columns], [max(c) for c in columns]) if len(curves) > 1 else ([], [])
        lines.append(Line(label, x, mean, low, high, colours[label]))
    return lines


def _drift(document: dict[str, Any], colours: dict[str, str]) -> list[str]:
    """Mean drift of the layers' inputs against steps, and each layer's over the whole run against its depth."""
    layers = list(dict.fromkeys(row["layer"] for row in document["drift"]))
    steps = sorted({row["step"] for row in document["drift"]})
    panels = []
    for title, text, key, places in (
        ("Drift of layer inputs since the look before", "steps", "step", steps),
        ("Drift of each layer's input, mean over the run", "layer, from the input up", "layer", layers),
    ):
        lines = []
        for label in document["variants"]:
            own = [row for row in document["drift"] if row["model"] == label and row["drift"] is not None]
            at = {place: [row["drift"] for row in own if row[key] == place] for place in places}
            x = [place if key == "step" else number for number, place in enumerate(places, 1) if at[place]]
            lines.append(Line(label, x, [sum(v) / len(v) for v in at.values() if v], colour=colours[label]))
        panels.append(chart(title, text, lines))
    return panels


def _curves(rows: Sequence[dict[str, Any]], label: str) -> list[list[dict[str, Any]]]:
    found: dict[int, list[dict[str, Any]]] = {}
    for row in rows:
        if row["model"] == label:
            found.setdefault(row["seed"], []).append(row)
    return list(found.values())
