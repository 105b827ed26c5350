"""Which shapes run on the Hopper kernels: only those that were measured to be faster there. Shipped as data.

A row of `choices.json` is one shape on one GPU: the fastest of these kernels with its seconds, and those of the best
alternative. A shape without a row near it was not measured, and nobody is given a kernel that was not measured without
naming it. `tuned()` adds the rows that the tuner left in the user's cache, which win where they are as near.
"""

from __future__ import annotations

import contextlib
import functools
import json
import math
import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

SHIPPED = Path(__file__).with_name("choices.json")
KERNELS = ("conv", "pair", "pooled", "walk")
REACH = 1.0  # octaves; what is farther from every row counts as not measured


class Shape(NamedTuple):
    """What a row is looked up by. m = n * oh * ow, k = taps * channels; a pair's are its second convolution's, those of
    one that is pooled its own. Of walks m is the network's batch, oc the number of their jobs, k and taps 1.
    """

    kernel: str
    precision: str
    m: int
    oc: int
    k: int
    taps: int


class Row(NamedTuple):
    """The fastest `config` of the kernels here, and what it was up against: Triton's best, for a pair, or a convolution
    with its pool, two launches, for a walk the network without it.
    """

    gpu: str
    shape: Shape
    config: str
    splits: int
    seconds: float
    against: float

    def distance(self, shape: Shape) -> float:
        """In octaves; columns weigh double, since their tile wastes most when it does not fit."""
        mine = self.shape
        if (mine.kernel, mine.precision, mine.taps > 1) != (shape.kernel, shape.precision, shape.taps > 1):
            return math.inf
        near = (
            math.log2(mine.m / max(shape.m, 1)),
            2 * math.log2(mine.oc / shape.oc),
            0.5 * math.log2(mine.k / shape.k),
        )
        return math.hypot(*near)


def precision_of(dtype: str) -> str:
    """The class of a dtype: both 16-bit formats run alike."""
    if dtype not in ("float16", "bfloat16"):
        raise ValueError(f"dtype {dtype!r}; allowed: float16, bfloat16")
    return "half"


def nearest(shape: Shape, gpu: str, rows: Iterable[Row] | None = None) -> Row | None:
    """The row of the nearest shape within `REACH`, measured on this GPU where one is, else on another; None where there
    is none.

    Of rows that are as near the last wins: those tuned on this machine stand behind the shipped ones.
    """
    near = [row for row in (shipped() if rows is None else tuple(rows)) if row.distance(shape) <= REACH]
    same = [row for row in near if row.gpu == gpu] or near
    return min(reversed(same), key=lambda row: row.distance(shape), default=None)


@functools.cache
def shipped() -> tuple[Row, ...]:
    """The rows of `choices.json`."""
    return tuple(read(SHIPPED))


def read(file: Path) -> list[Row]:
    """Rows of a file. Raises ValueError naming the file for one that holds something else."""
    try:
        rows = [row_of(values) for values in json.loads(file.read_text())["rows"]]
    except (ValueError, KeyError, TypeError, IndexError) as error:
        raise ValueError(f"{file} holds no choices of kernels: {error}") from error
    return rows


def row_of(values: Sequence[Any]) -> Row:
    """A row as a file or a result has it. Raises ValueError for one that cannot be."""
    try:
        gpu, kernel, precision, m, oc, k, taps, config, splits, seconds, against = values
        named = kernel in KERNELS and all(isinstance(name, str) for name in (gpu, precision, config))
        sized = all(isinstance(size, int) and size >= 1 for size in (m, oc, k, taps, splits))
        right = named and sized and 0 < seconds < math.inf and 0 < against < math.inf
    except TypeError:
        right = False
    if not right:
        raise ValueError(f"row {values!r}; allowed: kernels {', '.join(KERNELS)}, names, sizes and times above 0")
    return Row(gpu, Shape(kernel, precision, m, oc, k, taps), config, splits, seconds, against)


def write(file: Path, rows: Sequence[Row], about: dict[str, Any]) -> None:
    """Writes beside the file and renames, a row a line."""
    lines = [json.dumps([row.gpu, *row.shape, *row[2:]]) for row in rows]
    head = json.dumps({"about": about})[:-1]
    file.parent.mkdir(parents=True, exist_ok=True)
    beside = file.with_name(f".{file.name}.{os.getpid()}")
    beside.write_text(head + ', "rows": [\n' + ",\n".join(lines) + "\n]}\n")
    beside.replace(file)


def keep(file: Path, row: Row) -> None:
    """Adds a row to a file in place of an older one for the same shape."""
    with locked(file):
        older = read(file) if file.exists() else []
        write(file, [other for other in older if other[:2] != row[:2]] + [row], {"origin": "measured on this machine"})


@contextlib.contextmanager
def locked(file: Path) -> Iterator[None]:
    """Held by one process at a time: of two that tune at once, each would write the file without the other's rows."""
    import fcntl

    file.parent.mkdir(parents=True, exist_ok=True)
    with open(file.with_name(f".{file.name}.lock"), "w") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield


def cache_file(gpu: str, version: int) -> Path:
    """Where the tuner keeps what it measured on a GPU of this name with kernels of this version."""
    name = "".join(c if c.isalnum() else "-" for c in gpu)
    return Path.home() / ".cache" / "inception_fast" / "cuda" / f"{name}-{version}.json"


def tuned(gpu: str, version: int) -> tuple[Row, ...]:
    """The shipped rows and those tuned on this machine."""
    try:
        file = cache_file(gpu, version)
        there = file.exists()
    except (OSError, RuntimeError):  # a user without a home, or with another's
        return shipped()
    return (*shipped(), *(read(file) if there else ()))
