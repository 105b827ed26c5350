"""What a long command shows on standard error while it works: a bar on a terminal, a line for each stage elsewhere."""

from __future__ import annotations

import sys

from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn


class Meter:
    """Progress over `parts` equal parts; within one, `stage` names the work and `done` the fraction finished."""

    def __init__(self, parts: int) -> None:
        self.finished = 0
        self.bar: Progress | None = None
        self.text = ""
        console = Console(stderr=True)
        if console.is_terminal:
            columns = (SpinnerColumn(), BarColumn(bar_width=24), TimeElapsedColumn(), TextColumn("{task.description}"))
            self.bar = Progress(*columns, console=console, transient=True)
            self.task = self.bar.add_task("", total=float(parts))

    def __enter__(self) -> Meter:
        if self.bar is not None:
            self.bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self.bar is not None:
            self.bar.stop()

    def stage(self, text: str) -> None:
        if self.bar is not None:
            self.bar.update(self.task, description=text)
        elif text != self.text:
            print(text, file=sys.stderr, flush=True)
        self.text = text

    def done(self, fraction: float) -> None:
        if self.bar is not None:
            self.bar.update(self.task, completed=self.finished + fraction)

    def next(self) -> None:
        """The current part is over."""
        self.finished += 1
        self.done(0.0)
