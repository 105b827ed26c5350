"""Features on disk: parquet shards that are whole or not there, so that a killed run goes on where it stopped.

Shard k holds the images k * size to (k + 1) * size of the source, whatever the run: the columns `path` (string) and
`feature` (float32 list of fixed length), the unreadable images and their reasons in its metadata. What is missing is
what is left to do, and no row can be lost or doubled.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..measure.held import held
from ..measure.results import write_atomically, write_json
from .sources import PREFIX, SourceError, import_parquet
from .stream import Features

MANIFEST, UNREADABLE = "manifest.json", "unreadable.json"
KEY = b"inception_fast"
KINDS = {"images": int, "shard_size": int, "settings": dict}  # of a manifest


class Shards:
    """The output folder of a run of `settings` over `count` images. Use as a context: one run at a time holds it.

    Raises ValueError where the folder holds a run of other settings, or another process works in it.
    """

    def __init__(self, folder: Path, settings: dict[str, Any], count: int, size: int) -> None:
        self.folder, self.count, self.size = folder, count, size
        self.manifest: dict[str, Any] = {"images": count, "shard_size": size, "settings": settings}
        import_parquet()

    def __enter__(self) -> Shards:
        if self.folder.exists() and not self.folder.is_dir():
            raise ValueError(f"--out {self.folder} is a file; name a folder")
        self.folder.mkdir(parents=True, exist_ok=True)
        with ExitStack() as stack:
            stack.enter_context(held(self.folder))
            self._check_manifest()
            self._held = stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._held.close()

    def _check_manifest(self) -> None:
        for scratch in (*self.folder.glob(f".{PREFIX}*.parquet"), *self.folder.glob(".manifest-*.json")):
            scratch.unlink()
        path = self.folder / MANIFEST
        if path.exists():
            _same(self.folder, read_manifest(path), self.manifest)
            self.unreadable()  # a shard that is damaged is found before the others are computed
        elif any(self.folder.glob(f"{PREFIX}*.parquet")):
            raise ValueError(f"{self.folder} holds features without {MANIFEST}; name another --out")
        else:
            write_json(path, self.manifest)

    def path(self, shard: int) -> Path:
        return self.folder / f"{PREFIX}{shard:05d}.parquet"

    def indices(self, shard: int) -> range:
        """The images of a shard."""
        return range(shard * self.size, min((shard + 1) * self.size, self.count))

    def missing(self) -> list[int]:
        """The shards that are not there yet."""
        return [shard for shard in range(-(-self.count // self.size)) if not self.path(shard).exists()]

    def unreadable(self) -> list[dict[str, str]]:
        """`path` and `reason` of every image that could not be read, of the shards that are there."""
        parquet = import_parquet()
        found: list[dict[str, str]] = []
        for path in sorted(self.folder.glob(f"{PREFIX}*.parquet")):
            try:
                with _opened(path) as file:
                    found += json.loads(parquet.read_schema(file).metadata[KEY])["unreadable"]
            except (OSError, ValueError, KeyError, TypeError) as error:
                raise SourceError(
                    f"{path} is no shard of this run ({error}); remove it to have it made again"
                ) from error
        return found

    def finish(self) -> list[dict[str, str]]:
        """Lists the unreadable images in one file, and returns them."""
        found = self.unreadable()
        write_json(self.folder / UNREADABLE, found)
        return found


def read_manifest(path: Path) -> dict[str, Any]:
    """What a run wrote of itself. Raises SourceError, naming the file, for one that is damaged."""
    allowed = f"allowed: what inception-fast features wrote, an object with {', '.join(KINDS)}"
    try:
        held: Any = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise SourceError(f"{path} is damaged ({error}); {allowed}") from error
    for key, kind in KINDS.items():
        value = held.get(key) if isinstance(held, dict) else None
        if not isinstance(value, kind) or value == 0:
            raise SourceError(f"{path} has {key} {value!r}; {allowed}")
    return dict(held)


def _same(folder: Path, held: dict[str, Any], wanted: dict[str, Any]) -> None:
    flat = [{**m, **m.get("settings", {})} for m in (held, json.loads(json.dumps(wanted)))]
    for key in dict.fromkeys((*flat[1], *flat[0])):  # either may have what the other has not, as a GPU its name
        there, here = (m.get(key) for m in flat)
        if key != "settings" and there != here:
            raise ValueError(f"{folder} holds a run with {key} {there!r}, this one has {here!r}; name another --out")


class Collector:
    """Gathers the features of one shard and writes it when all its images have come, in order."""

    def __init__(self, shards: Shards, names: Sequence[str]) -> None:
        self.shards, self.names = shards, names
        self._paths: list[str] = []
        self._values: list[NDArray[np.float32]] = []
        self._bad: list[dict[str, str]] = []
        self._seen = 0

    def add_batch(self, batch: Features) -> None:
        """The next images, in order; every shard that they complete is written. Raises ValueError for a feature that is
        not finite.
        """
        found: list[tuple[int, Any]] = [*zip(batch.rows, batch.values, strict=True), *batch.bad]
        for index, value in sorted(found, key=lambda pair: pair[0]):
            self._add(index // self.shards.size, index, value)

    def _add(self, shard: int, index: int, value: NDArray[np.float32] | str) -> None:
        """One image of `shard`: its feature, or the reason that it has none."""
        if isinstance(value, str):
            self._bad.append({"path": self.names[index], "reason": value})
        elif not np.isfinite(value).all():
            raise ValueError(f"the feature of {self.names[index]} is NaN or infinite; allowed: finite numbers")
        else:
            self._paths.append(self.names[index])
            self._values.append(value)
        self._seen += 1
        if self._seen < len(self.shards.indices(shard)):
            return
        width = self.shards.manifest["settings"]["width"]
        values = np.stack(self._values) if self._values else np.zeros((0, width), np.float32)
        write_shard(self.shards.path(shard), self._paths, values, {"shard": shard, "unreadable": self._bad})
        self._paths, self._values, self._bad, self._seen = [], [], [], 0


def write_shard(path: Path, names: list[str], values: NDArray[np.float32], about: dict[str, Any]) -> None:
    """Writes one parquet file, synced and whole or not at all; the same content gives the same bytes."""
    import pyarrow

    parquet = import_parquet()
    flat = pyarrow.array(np.ascontiguousarray(values).reshape(-1))
    feature = pyarrow.FixedSizeListArray.from_arrays(flat, values.shape[1])
    table = pyarrow.table({"path": pyarrow.array(names, pyarrow.string()), "feature": feature})
    table = table.replace_schema_metadata({KEY: json.dumps(about).encode()})

    def write(scratch: Path) -> None:
        with _opened(scratch, "wb") as file:
            parquet.write_table(table, file, compression="none", use_dictionary=False)
        with open(scratch, "rb+") as file:
            os.fsync(file.fileno())

    write_atomically(path, write)


def _opened(path: Path, mode: str = "rb") -> Any:
    """The file as pyarrow takes it, whose own names of files have to be UTF-8."""
    import pyarrow

    return pyarrow.OSFile(os.fsencode(path), mode)


def is_feature_file(path: Path) -> bool:
    """Whether a parquet file has the columns `path` and `feature`."""
    try:
        with _opened(path) as file:
            return {"path", "feature"} <= set(import_parquet().read_schema(file).names)
    except (OSError, ValueError):
        return False


def find_features(text: str) -> list[Path]:
    """The feature shards that `text` names, a file or a folder of them; an empty list where it names none."""
    path = Path(text).expanduser()
    if path.is_dir():
        files = sorted(file for file in path.glob("*.parquet") if not file.name.startswith("."))
        return files if files and is_feature_file(files[0]) else []
    return [path] if path.suffix == ".parquet" and path.is_file() and is_feature_file(path) else []


def settings_of(folder: Path) -> dict[str, Any] | None:
    """The settings of the run that wrote a folder, None without a manifest; SourceError for an unfinished run."""
    path = folder / MANIFEST
    if not path.exists():
        return None
    manifest = read_manifest(path)
    shards = -(-manifest["images"] // manifest["shard_size"])
    there = len(list(folder.glob(f"{PREFIX}*.parquet")))
    if there != shards:
        raise SourceError(f"{folder} holds {there} of {shards} shards; run inception-fast features again to finish it")
    settings: dict[str, Any] = manifest["settings"]
    return settings


def count_features(paths: Sequence[Path]) -> int:
    """The rows of shards, from their metadata alone. Raises SourceError for files that do not hold any."""
    parquet = import_parquet()
    count = 0
    for path in paths:
        try:
            with _opened(path) as file:
                count += parquet.read_metadata(file).num_rows
        except (OSError, ValueError) as error:
            raise SourceError(f"{path} holds no readable features ({error})") from error
    return count


def read_features(paths: Sequence[Path]) -> Iterator[NDArray[np.float32]]:
    """The features of shards, [n, d] a row group at a time. Raises SourceError for files that do not hold any."""
    parquet = import_parquet()
    for path in paths:
        try:
            with _opened(path) as held, parquet.ParquetFile(held) as file:
                for batch in file.iter_batches(columns=["feature"]):
                    if batch.num_rows:
                        yield _matrix(batch.column(0))
        except (OSError, ValueError, KeyError) as error:
            raise SourceError(f"{path} holds no readable features ({error})") from error


def _matrix(column: Any) -> NDArray[np.float32]:
    """Lists of one length as [n, d]. Raises ValueError for others: flattened, they could pass for another width."""
    from pyarrow import compute

    if "list" not in str(column.type).partition("<")[0]:
        raise ValueError(f"feature of type {column.type}; allowed: lists of numbers")
    lengths = compute.unique(compute.list_value_length(column)).to_pylist()
    if len(lengths) > 1 or None in lengths:
        seen = ", ".join("null" if length is None else str(length) for length in lengths[:5])
        raise ValueError(f"features of lengths {seen}; allowed: one length, no null")
    return np.asarray(column.flatten(), dtype=np.float32).reshape(len(column), -1)
