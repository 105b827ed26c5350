"""The comparison as a table: colours and boxes on a terminal, plain text elsewhere."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from ..measure.peers import Ours

if TYPE_CHECKING:
    from ..measure.compare import Row

PLAIN_WIDTH = 120
NUMBERS = (("median ms", 9), ("IQR ms", 8), ("x ours", 7), ("rel error", 9))


def show(rows: Sequence[Row], origin: dict[str, Any]) -> None:
    """Prints a table for each case, and what they were measured on, to standard output."""
    console = Console() if sys.stdout.isatty() else Console(width=PLAIN_WIDTH)
    for case in dict.fromkeys((row.model, row.batch, row.dtype) for row in rows):
        model, batch, dtype = case
        console.print(f"[bold]{escape(model)}[/], batch {batch}, {dtype}", highlight=False)
        console.print(_table([row for row in rows if (row.model, row.batch, row.dtype) == case], console.is_terminal))
    versions = ", ".join(f"{name} {version}" for name, version in origin["versions"].items())
    for line in (
        f"{origin['machine']}, threads {origin['threads']}, load {origin['load']}, commit {origin['commit']}",
        f"{versions}, Python {origin['python']}",
        "x ours: a runtime's time over ours; ~: not beyond the noise of this run. rel error: against float64.",
    ):
        console.print(line, highlight=False, soft_wrap=True)


def _table(rows: Sequence[Row], fancy: bool) -> Table:
    table = Table(box=box.SIMPLE_HEAD if fancy else box.ASCII2, pad_edge=False)
    table.add_column("runtime", no_wrap=True, min_width=len(Ours.name))
    for heading, width in NUMBERS:
        table.add_column(heading, no_wrap=True, justify="right", min_width=width)
    table.add_column("note", overflow="fold", min_width=len("channels_last"))
    for row in rows:
        table.add_row(*_cells(row), style=_style(row))
    return table


def _cells(row: Row) -> list[str]:
    def number(value: float | None, form: str) -> str:
        return "-" if value is None else format(value, form)

    doubt = "~" if row.established is False else ""
    ratio = "-" if row.ratio is None else f"{doubt}{row.ratio:.2f}"
    remark = row.note
    if row.status == "unavailable" and row.runtime == Ours.name:
        remark = f"not supported by this build or machine: {row.note}"
    elif row.status != "ok":
        remark = f"{row.status}: {row.note}"
    times = [number(row.median_ms, ".2f"), number(row.iqr_ms, ".2f"), ratio, number(row.rel_error, ".1e")]
    return [row.runtime, *times, escape(remark)]


def _style(row: Row) -> str:
    if row.status == "wrong":
        return "red"
    if row.status != "ok":
        return "dim"
    return "bold" if row.runtime == Ours.name else ""
