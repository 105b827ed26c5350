"""Data looked through before training starts, so that no broken image ends it later."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

from PIL import Image

from ..images import to_rgb
from ..measure.results import write_json
from .labelled import DataError

Say = Callable[[str], None]


def judge(problems: Sequence[str], bad: str) -> None:
    """Raises DataError with the first problems and their number where `bad` is "refuse"."""
    if problems and bad == "refuse":
        shown = "; ".join(problems[:3]) + (f"; and {len(problems) - 3} more" if len(problems) > 3 else "")
        raise DataError(f"{len(problems)} faults in the data: {shown} (--bad-data skip leaves them out)")


def broken_images(
    names: Sequence[str], look: Callable[[int], object], content: object, cache: Path | None, say: Say
) -> dict[str, str]:
    """What is wrong with which image: `look` decodes the one of a number, and raises DataError where it cannot.

    A cache written for the same `content`, whatever the images depend on, saves looking at them all again.
    """
    digest = hashlib.sha256(repr(content).encode()).hexdigest()
    if cache is not None and cache.exists():
        known = _known(cache)
        if known.get("files") == digest:
            broken: dict[str, str] = known["broken"]
            return broken
    say(f"looking at {len(names)} images")

    def fault(index: int) -> str | None:
        try:
            look(index)
        except DataError as error:
            return str(error)
        return None

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        verdicts = zip(names, pool.map(fault, range(len(names))), strict=True)
        found = {name: verdict for name, verdict in verdicts if verdict}
    if cache is not None:
        cache.parent.mkdir(parents=True, exist_ok=True)
        write_json(cache, {"files": digest, "broken": found})
    return found


def _known(cache: Path) -> dict[str, Any]:
    """What a cache holds; nothing where it is damaged, as a power cut may leave it."""
    try:
        held = json.loads(cache.read_text(encoding="utf-8"))
    except ValueError:
        return {}
    return held if isinstance(held, dict) and isinstance(held.get("broken"), dict) else {}


class Rows:
    """Pictures in the rows of one or two parts of another library's data set, one after the other; `cell` takes that of
    a row.
    """

    natural = True

    def __init__(
        self, name: str, classes: Sequence[str], parts: Sequence[Any], labels: list[int], cell: Callable[[Any], Any]
    ) -> None:
        self.name, self.classes, self.labels = name, tuple(classes), labels
        self.parts, self.cell = list(parts), cell

    def image(self, index: int) -> Image.Image:
        at = index
        for part in self.parts:
            if at < len(part):
                return picture(self.name, index, partial(self._at, part, at))
            at -= len(part)
        raise DataError(f"image {index} beyond the end of {self.name}")

    def _at(self, part: Any, row: int) -> Any:
        return self.cell(part[row])


def picture(name: str, index: int, read: Callable[[], Any]) -> Image.Image:
    """What `read` gives of another library's data set, as a file of it would be read; DataError, naming the image, for
    all that goes wrong.
    """
    try:
        found = read()
        if not isinstance(found, Image.Image):
            raise DataError(f"image {index} of {name} is a {type(found).__name__}; allowed: a picture")
        return to_rgb(found, f"image {index} of {name}")
    except DataError:
        raise
    except Exception as error:  # each format, and each library, has its own ways to fail
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise DataError(f"image {index} of {name} is damaged ({reason})") from error


def label(name: str, index: int, value: Any) -> int:
    """An integer label; DataError, naming the image, for anything else."""
    try:
        found = int(value)
    except (TypeError, ValueError):
        found = None  # type: ignore[assignment]
    if found is None or found != value:
        raise DataError(f"image {index} of {name} has the label {value!r}; allowed: one integer, a classification")
    return found


def table_faults(
    source: Any, counts: Sequence[int], content: object, cache: Path | None, say: Say
) -> tuple[set[int], list[str]]:
    """(images to leave out, all problems in words) of a source whose first `counts[0]` images are to train on."""
    names, labels, classes = [str(i) for i in range(sum(counts))], source.labels, source.classes
    wrong = [i for i, value in enumerate(labels) if not 0 <= value < len(classes)]
    problems = [f"image {i} of {source.name} has label {labels[i]}; allowed: 0 to {len(classes) - 1}" for i in wrong]
    broken = broken_images(names, source.image, (source.name, labels, content), cache, say)
    problems += broken.values()
    left_out = {*wrong, *map(int, broken)}
    there = {labels[i] for i in range(counts[0]) if i not in left_out}
    missing = [value for value in range(len(classes)) if value not in there]
    problems += [f"class {classes[value]!r} of {source.name} has no image to train on" for value in missing]
    if len(classes) - len(missing) < 2:
        raise DataError(
            f"data {source.name} holds images of {len(classes) - len(missing)} class to train on; allowed: two or more"
        )
    return left_out, problems
