"""What a long command shows on standard error while it works: a bar on a terminal, a line for each stage elsewhere."""

from __future__ import annotations

import sys
import time

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.progress import TimeRemainingColumn as Remaining

PLAIN_SECONDS = 10.0  # between two lines where there is no terminal


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


class Counter:
    """Images done of all, images/s and the time left. Images of an earlier run count as done, not into the rate."""

    def __init__(self, text: str) -> None:
        self.text = text
        self.done = self.bad = self.before = self.total = 0
        self.started = self.said = time.monotonic()
        self.bar: Progress | None = None
        console = Console(stderr=True)
        if console.is_terminal:
            columns = (
                TextColumn("{task.description}"),
                BarColumn(bar_width=24),
                MofNCompleteColumn(),
                TextColumn("{task.fields[rate]:.1f} images/s"),
                Remaining(),
            )
            self.bar = Progress(*columns, console=console, transient=True)

    def __enter__(self) -> Counter:
        if self.bar is not None:
            self.bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self.bar is not None:
            self.bar.stop()

    def start(self, done: int, total: int) -> None:
        """`done` images of `total` are there already."""
        self.before = self.done = done
        self.total, self.bad = total, 0
        self.started = self.said = time.monotonic()
        if self.bar is not None:
            for task in self.bar.task_ids:
                self.bar.remove_task(task)
            self.task = self.bar.add_task(self.text, total=float(total), completed=done, rate=0.0)
        elif done:
            print(f"{self.text}: {done} of {total} images are there", file=sys.stderr, flush=True)

    def rate(self) -> float:
        return (self.done - self.before) / max(time.monotonic() - self.started, 1e-9)

    def add(self, images: int, bad: int) -> None:
        """`images` more are done, `bad` of them could not be read."""
        self.done += images
        self.bad += bad
        if self.bar is not None:
            self.bar.update(self.task, completed=self.done, rate=self.rate())
        elif time.monotonic() - self.said > PLAIN_SECONDS:
            self.said = time.monotonic()
            print(self.line(), file=sys.stderr, flush=True)

    def line(self) -> str:
        """What stands in the log where there is no terminal."""
        rate = self.rate()
        left = (self.total - self.done) / rate if rate else 0.0
        unreadable = f", {self.bad} unreadable" if self.bad else ""
        return f"{self.text}: {self.done}/{self.total} images, {rate:.1f} images/s, {left:.0f} s left{unreadable}"
