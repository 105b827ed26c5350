"""The report as one HTML file that opens alone: pictures embedded, every claim in a table."""

from __future__ import annotations

import base64
import html
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from .row import CONFIRMED, DIFFERS, OPEN, PUBLISHED, REFUTED, UNMEASURED, VERDICTS, Row

COLOURS = {
    CONFIRMED: "#2e7d43", DIFFERS: "#a8650f", REFUTED: "#b3261e",
    OPEN: "#6b6b6b", UNMEASURED: "#6b6b6b", PUBLISHED: "#45599c",
}  # fmt: skip
STYLE = (
    "body{font:15px/1.5 sans-serif;max-width:1180px;margin:2em auto;padding:0 1em;color:#222;background:#fff}"
    "h1{margin-bottom:.2em}h2{margin-top:2em}img{max-width:100%;height:auto}figure{margin:1.5em 0}"
    "figcaption{color:#444}table{border-collapse:collapse;width:100%}"
    "td,th{padding:.4em .6em;border-bottom:1px solid #ddd;text-align:left;vertical-align:top}"
    "td.number,th.number{text-align:right;white-space:nowrap}td.verdict{white-space:nowrap;font-weight:bold}"
    ".small{color:#555;font-size:13px}code{font-size:12.5px;background:#f4f4f4;padding:.1em .3em}"
    ".wide{overflow-x:auto}.wide table{min-width:760px}code{overflow-wrap:anywhere}dt{font-weight:bold}"
)
SECTIONS = {
    "factorising": "Small kernels for large ones",
    "caches": "Cache misses",
    "reduction": "Halving the grid",
    "widening": "Wider in place of deeper",
    "engine": "The engine's rewrites",
    "networks": "Whole networks",
    "training": "Training",
    "published": "Published accuracies",
}
WORDS = {
    "multiply-add": "one multiplication and the addition to a sum; a convolution's work is counted in them",
    "1xn and nx1, an asymmetric pair": "a convolution along rows and one along columns, in place of an nxn one",
    "fused, as one operator": "the second convolution reads the first one's result before it has left the cache",
    "L1, L2, LL": "the caches nearest to a core, next, and last (LL); what a level does not hold misses in it",
    "cold caches": "everything else was pushed out of them before the timed call",
    "representational bottleneck": "a point where the image is carried by far fewer values than before and after it",
    "BN": "batch norm",
    "~": "within this run's noise",
}
PICTURE_OF = {
    "factorising": "factorising.png", "caches": "caches.png", "reduction": "reduction.png", "engine": "engine.png",
    "networks": "depth.png", "training": "training.png",
}  # fmt: skip


def page(
    sections: Mapping[str, Sequence[Row]], pictures: Mapping[str, str], folder: Path, origin: Mapping[str, Any]
) -> str:
    """The whole file. `sections` holds the rows by study, `pictures` the captions by file name in `folder`."""
    rows = [row for part in sections.values() for row in part]
    counts = {verdict: sum(row.verdict == verdict for row in rows) for verdict in VERDICTS}
    summary = ", ".join(f"{_coloured(verdict)} {count}" for verdict, count in counts.items() if count)
    legend = "".join(f"<li>{_coloured(verdict)}: {html.escape(text)}.</li>" for verdict, text in VERDICTS.items())
    parts = [_section(name, part, pictures, folder) for name, part in sections.items() if part]
    versions = ", ".join(f"{name} {version}" for name, version in origin["versions"].items())
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width"><meta name="color-scheme" content="light">'
        "<title>The claims, measured</title>"
        f"<style>{STYLE}</style></head><body><h1>What the Inception papers claim, and what was measured</h1>"
        f"<p>{len(rows)} claims: {summary}.</p><ul>{legend}</ul>{_remarks(origin)}{_words()}"
        f"{''.join(parts)}"
        f'<p class="small">{html.escape(origin["machine"])}, threads {origin["threads"]}, load {origin["load"]}, '
        f"{html.escape(origin['date'])}, commit {origin['commit']}. {html.escape(versions)}. "
        f"Made by <code>{html.escape(origin['command'])}</code>.</p></body></html>\n"
    )


def _remarks(origin: Mapping[str, Any]) -> str:
    text = (
        "Times are medians over interleaved rounds on the native kernels in float32, the caches flushed before each "
        "call, after the output of each contestant was proved against float64. A difference counts as established when "
        "a sign test over the rounds is below 2 % and the difference is larger than that between the odd and the even "
        "rounds, and than 2 %, which equal code built twice can show. Trainings are compared seed by seed: a "
        "difference is established when the signs that the seeds give it are likely by chance in less than 5 %. "
    )
    if "--quick" in origin["command"]:
        text += "This was a quick run: few rounds, and trainings of a few steps that prove nothing."
    return f"<p>{html.escape(text)}</p>"


def _words() -> str:
    entries = "".join(f"<dt>{html.escape(word)}</dt><dd>{html.escape(text)}</dd>" for word, text in WORDS.items())
    return f"<details><summary>Words used here</summary><dl>{entries}</dl></details>"


def _section(name: str, rows: Sequence[Row], pictures: Mapping[str, str], folder: Path) -> str:
    picture = PICTURE_OF.get(name, "")
    shown = _picture(folder / picture, pictures[picture]) if picture in pictures else ""
    heads = (("claim", ""), ("stated", "number"), ("measured", "number"), ("unit", ""), ("verdict", ""))
    head = "".join(f'<th class="{kind}">{text}</th>' for text, kind in heads)
    commands = sorted({row.command for row in rows})
    again = " ".join(f"<code>{html.escape(command)}</code>" for command in commands)
    body = "".join(map(_row, rows))
    return (
        f'<h2 id="{name}">{html.escape(SECTIONS.get(name, name))}</h2>{shown}'
        f'<div class="wide"><table><tr>{head}</tr>{body}</table></div>'
        f'<p class="small">Measured by: {again}</p>'
    )


def _row(row: Row) -> str:
    note = f'<div class="small">{html.escape(row.note)}</div>' if row.note else ""
    claim = f'{html.escape(row.claim)}<div class="small">{html.escape(row.source)}</div>'
    return (
        f'<tr id="{html.escape(row.id)}"><td>{claim}</td><td class="number">{number(row.stated)}</td>'
        f'<td class="number">{number(row.measured)}</td><td>{html.escape(row.unit)}{note}</td>'
        f'<td class="verdict">{_coloured(row.verdict)}</td></tr>'
    )


def _coloured(verdict: str) -> str:
    return f'<span style="color:{COLOURS[verdict]}">{verdict}</span>'


def _picture(path: Path, caption: str) -> str:
    data = base64.b64encode(path.read_bytes()).decode()
    return (
        f'<figure><img alt="{html.escape(caption)}" src="data:image/png;base64,{data}">'
        f"<figcaption>{html.escape(caption)}</figcaption></figure>"
    )


def number(value: float | None) -> str:
    """Three significant digits, whole numbers whole, thousands apart; a dash for none."""
    if value is None:
        return "-"
    if value == int(value) or abs(value) >= 999.5:
        return f"{value:,.0f}"
    return f"{value:.3g}"
