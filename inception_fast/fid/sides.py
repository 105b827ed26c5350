"""One side of a comparison: images, feature shards or an `.npz` of statistics, as a Gaussian and, if asked, as rows."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from ..features.extractors import Extractor, FidExtractor
from ..features.shards import count_features, find_features, read_features, settings_of
from ..features.sources import Source, SourceError, open_source
from ..features.stream import Clock, stream
from ..images import check_path
from .distance import frechet_distance
from .files import read_statistics
from .statistics import Gaussian, Statistics

COMPARED = ("form", "model", "weights", "preprocessing")  # settings without which features are not comparable


@dataclass
class Side:
    """rows: features [n, d] on disk, where they were asked for; images: the source, where the side is one.

    bad: the indices in `images` of the unreadable ones.
    """

    name: str
    gaussian: Gaussian
    rows: Any = None
    images: Source | None = None
    unreadable: list[dict[str, str]] = field(default_factory=list)
    bad: set[int] = field(default_factory=set)
    settings: dict[str, Any] | None = None

    def about(self) -> dict[str, Any]:
        """What a report says of it, in JSON."""
        return {"source": self.name, "images": self.gaussian.count, "unreadable": self.unreadable}


@dataclass(frozen=True)
class Opened:
    """What a side is read from. `count`: its images where they are known, the unreadable ones among them."""

    name: str
    count: int | None = None
    shards: list[Path] = field(default_factory=list)
    settings: dict[str, Any] | None = None
    source: Source | None = None
    statistics: Gaussian | None = None


@dataclass(frozen=True)
class Plan:
    """How sides are read. `extractor` is called when the first source of images comes, and may raise what it likes."""

    extractor: Callable[[], FidExtractor]
    keep_rows: bool = False
    options: dict[str, Any] = field(default_factory=dict)
    clock: Clock = field(default_factory=Clock)
    on_start: Callable[[str, int], None] = lambda name, total: None
    on_batch: Callable[[int, int], None] = lambda images, bad: None

    def open(self, text: str) -> Opened:
        """Looks at what `text` names. Raises ValueError for statistics where rows are needed, and what readers do."""
        check_path(text)
        if text.lower().endswith(".npz"):
            if self.keep_rows:
                raise ValueError(
                    f"{text} holds statistics; allowed with KID, Inception score or PRDC: images or features"
                )
            return Opened(text, statistics=read_statistics(text))
        shards = find_features(text)
        if shards:
            settings = settings_of(shards[0].parent) if Path(text).expanduser().is_dir() else None
            return Opened(text, count_features(shards), shards, settings)
        source = open_source(text)
        return Opened(text, len(source.names), source=source)

    def side(self, opened: Opened) -> Side:
        """Reads all of it. Raises ValueError for fewer than two images, and what the readers raise."""
        if opened.statistics is not None:
            return Side(opened.name, opened.statistics)
        if opened.source is None:
            side = Side(opened.name, _NOTHING, settings=opened.settings)
            return self._collect(side, read_features(opened.shards))
        extractor = self.extractor()
        self.on_start(opened.name, len(opened.source.names))
        side = Side(opened.name, _NOTHING, images=opened.source, settings=extractor.settings)
        return self._collect(side, self._extract(side, opened.source, extractor))

    def _extract(self, side: Side, source: Source, extractor: Extractor) -> Iterator[Any]:
        for batch in stream(source, extractor, clock=self.clock, **self.options):
            side.bad.update(index for index, _ in batch.bad)
            side.unreadable += [{"path": source.names[index], "reason": reason} for index, reason in batch.bad]
            self.on_batch(batch.count, len(batch.bad))
            yield batch.values

    def _collect(self, side: Side, portions: Iterator[Any]) -> Side:
        statistics, rows = Statistics(), Rows() if self.keep_rows else None
        for values in portions:
            if len(values):
                with _naming(side.name):
                    statistics.update(values)
                if rows is not None:
                    rows.add(values)
        with _naming(side.name):
            side.gaussian = statistics.gaussian()
        side.rows = None if rows is None else rows.array()
        return side


@contextmanager
def _naming(side: str) -> Iterator[None]:
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{side}: {error}") from error


_NOTHING = Gaussian(np.zeros(0), np.zeros((0, 0)))


class Rows:
    """Features in a temporary file without a name, so that those who need all of them at once need no memory."""

    def __init__(self) -> None:
        self._file = tempfile.TemporaryFile(prefix="inception-fast-")
        self._count = self._width = 0

    def add(self, values: np.ndarray) -> None:
        self._file.write(np.ascontiguousarray(values, dtype=np.float32).tobytes())
        self._count, self._width = self._count + len(values), values.shape[1]

    def array(self) -> np.ndarray:
        """[n, d] float32, read from the file as it is used."""
        self._file.flush()
        return np.memmap(self._file, np.float32, "r", shape=(self._count, self._width))


def check_comparable(a: Side, b: Side) -> list[str]:
    """Raises SourceError where the features are of different networks; returns warnings about the rest."""
    warnings = [warning for side in (a, b) if (warning := side.gaussian.rank_warning(side.name))]
    check_settings(a, b)
    if a.settings is None or b.settings is None:
        return warnings
    first, second = arithmetic(a.settings), arithmetic(b.settings)
    if first != second:
        warnings.append(f"{a.name} was computed in {first} and {b.name} in {second}")
    if a.settings.get("form") != "fid":
        warnings.append(f"the features are of {a.settings.get('model')}, not of the FID network: not a usual FID")
    return warnings


def check_settings(a: Side | Opened, b: Side | Opened) -> None:
    """Raises SourceError where both say what their features are of, and that is not the same."""
    for key in COMPARED if a.settings is not None and b.settings is not None else ():
        first, second = (side.settings.get(key) for side in (a, b) if side.settings is not None)
        if first != second:
            raise SourceError(
                f"{a.name} has features with {key} {first!r} and {b.name} with {second!r}; allowed: the same"
            )


def arithmetic(settings: Mapping[str, Any]) -> str:
    """What features were computed in, by an extractor's settings: the dtype, `+winograd` where that was asked for."""
    return f"{settings.get('dtype')}{'+winograd' if settings.get('winograd') else ''}"


def effect_of_arithmetic(
    a: Side, b: Side, used: Extractor, exact: Extractor, count: int, **options: Any
) -> dict[str, Any]:
    """What the arithmetic of `used` does to FID, measured: the first `count` readable images of each side in both.

    A side without images takes part with its statistics. Keys: `images`, `feature_error` (relative L2), `fid_float32`,
    `fid`, `shift` and `relative_shift`.
    """
    found: dict[str, list[Gaussian]] = {"used": [], "exact": []}
    images, squares = 0, np.zeros(2)
    for side in (a, b):
        if side.images is None:
            for held in found.values():
                held.append(side.gaussian)
            continue
        readable = (index for index in range(len(side.images.names)) if index not in side.bad)
        wanted = list(islice(readable, count))
        values = [_rows(stream(side.images, e, wanted, **options)) for e in (used, exact)]
        for held, rows in zip(found.values(), values, strict=True):
            statistics = Statistics()
            statistics.update(rows)
            held.append(statistics.gaussian())
        images += len(values[0])
        squares += ((values[0] - values[1]) ** 2).sum(), (values[1] ** 2).sum()
    fid, exact_fid = (frechet_distance(*pair) for pair in found.values())
    return {
        "images": images,
        "feature_error": float(np.sqrt(squares[0] / squares[1])),
        "fid_float32": exact_fid,
        "fid": fid,
        "shift": fid - exact_fid,
        "relative_shift": (fid - exact_fid) / exact_fid if exact_fid else None,
    }


def _rows(batches: Iterator[Any]) -> np.ndarray:
    return np.concatenate([batch.values for batch in batches]).astype(np.float64)
