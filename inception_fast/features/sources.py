"""Where images come from: a folder, a list, tar shards, or parquet files with encoded images.

A source knows the name of every image and hands out the bytes of any of them, from any process. Names are listed once,
in an order that depends on nothing but the files; the images themselves are read one at a time.
"""

from __future__ import annotations

import glob
import hashlib
import importlib
import os
import re
import tarfile
from array import array
from bisect import bisect_right
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

from ..images import SUFFIXES, check_names, check_path, files_below, is_pipe

INSTALL = "pip install 'inception-fast[features]'"
TAR = (".tar",)
COMPRESSED_TAR = (".tar.gz", ".tgz", ".tar.xz", ".tar.bz2", ".tar.zst")
PARQUET = (".parquet",)
LIST = (".txt", ".lst", ".list")
IMAGE_COLUMNS = ("image", "jpg", "jpeg", "png", "webp", "img", "bytes", "data")
LARGEST_SPARSE = 1 << 30  # bytes: a tar file of a kilobyte may claim any number of them
PREFIX = "features-"  # of the shards that features are written to
NAME_COLUMNS = ("path", "file_name", "filename", "name", "key", "__key__", "id", "url")


class SourceError(ValueError):
    """A source that holds no images, or not in a form that can be read."""


class Source(Protocol):
    """Images in a fixed order. `names` may repeat; `read` raises OSError or ValueError.

    places: where the images lie, as far as their names do not tell.
    """

    @property
    def names(self) -> Sequence[str]: ...
    @property
    def places(self) -> Sequence[str]: ...

    def read(self, index: int) -> bytes: ...


class Files:
    """Image files by their paths, as they were found or listed."""

    def __init__(self, names: list[str], root: Path | None = None) -> None:
        self.names, self.root = names, root
        self.places = [] if root is None else [str(root)]

    def read(self, index: int) -> bytes:
        name = self.names[index]
        path = Path(name) if self.root is None else self.root / name
        if is_pipe(path):
            raise OSError("it is a pipe or a device")
        return path.read_bytes()


class TarShards:
    """Members of tar files, found once by their headers and read by their place: workers share nothing.

    A link is the image it leads to; where that is none of its tar file, `read` says so. Of a sparse file the tar holds
    what lies between its holes.
    """

    def __init__(self, paths: Sequence[Path]) -> None:
        self.paths = [str(path) for path in paths]
        self.names: list[str] = []
        self.places: list[str] = []
        self._file, self._offset, self._size = array("q"), array("q"), array("q")
        self._links: dict[int, str] = {}  # what they lead to
        self._pieces: dict[int, list[tuple[int, int]]] = {}  # of sparse files: where each lies in the image, its bytes
        for number, path in enumerate(self.paths):
            self._index(number, path)

    def _index(self, number: int, path: str) -> None:
        first, end = len(self.names), 0
        try:
            with tarfile.open(path, "r:") as archive:
                while (member := archive.next()) is not None:
                    pieces: Any = member.sparse
                    end = member.offset_data + (member.size if pieces is None else sum(n for _, n in pieces))
                    link = member.islnk() or member.issym()
                    if (member.isreg() or link) and member.name.lower().endswith(SUFFIXES):
                        if link:
                            beside = os.path.dirname(member.name) if member.issym() else ""
                            self._links[len(self.names)] = os.path.normpath(os.path.join(beside, member.linkname))
                        if pieces is not None:
                            self._pieces[len(self.names)] = pieces
                        self._add(f"{path}/{member.name}", number, member.offset_data, member.size)
                    archive.members = []  # type: ignore[attr-defined]  # tarfile would keep every header
        except (tarfile.TarError, EOFError) as error:
            if not end:
                raise SourceError(f"{path} is no readable tar file ({error}); allowed: an uncompressed .tar") from error
        if self._links:
            self._follow(range(first, len(self.names)), len(path) + 1)
        # tarfile takes half a header for the end; and where data is missing, the last image is the one that lacks it.
        with open(path, "rb") as file:
            file.seek(-(-end // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE)
            if any(file.read(tarfile.BLOCKSIZE)):
                self._add(f"{path}/(what follows byte {end})", number, end, 1 << 62)

    def _follow(self, members: range, start: int) -> None:
        """Gives the links among these members the places of their images; names in the tar begin at `start`."""
        links = {i: self._links[i] for i in members if i in self._links}
        places: dict[str, int] = {}
        for index in (*links, *(i for i in members if i not in links)):  # an image goes before a link of its name
            places[os.path.normpath(self.names[index][start:])] = index
        for index, target in links.items():
            found, passed = places.get(target), set[int]()
            while found in links and found not in passed:
                passed.add(found)
                found = places.get(links[found])
            if found is not None and found not in links:
                self._offset[index], self._size[index] = self._offset[found], self._size[found]
                if found in self._pieces:
                    self._pieces[index] = self._pieces[found]
                del self._links[index]

    def _add(self, name: str, file: int, offset: int, size: int) -> None:
        self.names.append(name)
        self._file.append(file)
        self._offset.append(offset)
        self._size.append(size)

    def read(self, index: int) -> bytes:
        if index in self._links:
            raise OSError(f"it is a link to {self._links[index]}, no image of the tar file")
        with open(self.paths[self._file[index]], "rb") as file:
            there = os.fstat(file.fileno()).st_size - self._offset[index]
            pieces = self._pieces.get(index)
            if there < (self._size[index] if pieces is None else sum(n for _, n in pieces)):
                raise OSError("the tar file was cut short here")
            if pieces is None:
                return os.pread(file.fileno(), self._size[index], self._offset[index])
            return self._unfolded(file.fileno(), index, pieces)

    def _unfolded(self, file: int, index: int, pieces: list[tuple[int, int]]) -> bytes:
        """A sparse file with its holes."""
        size, offset = self._size[index], self._offset[index]
        if size > LARGEST_SPARSE:
            raise OSError(f"it is a sparse file of {size} bytes; allowed: {LARGEST_SPARSE} or less")
        data = bytearray(size)
        for start, count in pieces:
            data[start : start + count] = os.pread(file, count, offset)
            offset += count
        return bytes(data)


class ParquetImages:
    """Encoded images in a column of parquet files: binary, or a struct with `bytes` as Hugging Face has it."""

    def __init__(self, paths: Sequence[Path]) -> None:
        self.paths = [str(path) for path in paths]
        self.names: list[str] = []
        self.places: list[str] = []
        self._columns: list[str] = []
        self._starts, self._places = array("q"), array("q")  # first image, file and group of every row group
        self._kept: tuple[int, Any] | None = None
        for number, path in enumerate(self.paths):
            self._index(number, path)

    def _index(self, number: int, path: str) -> None:
        parquet = import_parquet()
        try:
            with parquet.ParquetFile(path) as file:
                column, name = image_column(path, file.schema_arrow)
                self._columns.append(column)
                self.places += [] if name is None else [path]
                first = len(self.names)
                for group in range(file.num_row_groups):
                    self._starts.append(len(self.names))
                    self._places.extend((number, group))
                    held: list[Any] = [None] * file.metadata.row_group(group).num_rows
                    if name is not None:
                        held = file.read_row_group(group, columns=[name]).column(0).to_pylist()
                    for value in held:
                        text = value.get("path") if isinstance(value, dict) else value
                        self.names.append(f"{path}#{len(self.names) - first}" if text is None else str(text))
        except (OSError, ValueError, NotImplementedError) as error:
            if isinstance(error, SourceError):
                raise
            raise SourceError(f"{path} is no readable parquet file ({error})") from error

    def read(self, index: int) -> bytes:
        group = bisect_right(self._starts, index) - 1
        if self._kept is None or self._kept[0] != group:
            number, place = self._places[2 * group], self._places[2 * group + 1]
            with import_parquet().ParquetFile(self.paths[number]) as file:
                self._kept = group, file.read_row_group(place, columns=[self._columns[number]]).column(0)
        column, row = self._kept[1], index - self._starts[group]
        if row >= len(column):
            raise ValueError("the file lacks this row, which it had")
        value = column[row].as_py()
        data = value.get("bytes") if isinstance(value, dict) else value
        if data is None:
            raise ValueError("the row holds no image")
        return bytes(data)

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_kept": None}


def import_parquet() -> Any:
    """pyarrow.parquet. Raises SourceError naming the extra to install."""
    try:
        return importlib.import_module("pyarrow.parquet")
    except ImportError as error:
        raise SourceError(f"parquet files need pyarrow ({error}); {INSTALL}") from error


def image_column(path: str, schema: Any) -> tuple[str, str | None]:
    """(column of encoded images, column of their names or None): `image.path` for the path inside a struct."""
    kinds = {field.name: field.type for field in schema}
    structs = [name for name, kind in kinds.items() if _is_binary(_fields(kind).get("bytes"))]
    binaries = [name for name, kind in kinds.items() if _is_binary(kind)]
    candidates = structs + binaries
    if not candidates:
        columns = ", ".join(f"{name}: {kind}" for name, kind in kinds.items())
        raise SourceError(f"{path} has the columns {columns}; allowed: one of images, binary or a struct with bytes")
    chosen = next((name for name in IMAGE_COLUMNS if name in candidates), candidates[0])
    name = next((name for name in NAME_COLUMNS if name in kinds and "string" in str(kinds[name])), None)
    if name is None and chosen in structs and "path" in _fields(kinds[chosen]):
        name = f"{chosen}.path"
    return chosen, name


def _is_binary(kind: Any) -> bool:
    """Whether a value is a row of bytes: no list of them, and no number of them."""
    return re.match(r"(dictionary<values=)?(large_|fixed_size_)?binary", str(kind)) is not None


def _fields(kind: Any) -> dict[str, Any]:
    """The types in a struct by their names; of another type, none."""
    fields = (kind.field(i) for i in range(kind.num_fields if str(kind).startswith("struct<") else 0))
    return {field.name: field.type for field in fields}


def open_source(text: str, out: str | Path | None = None) -> Source:
    """The images of a folder (looked through to the bottom), of a list, or of .tar or .parquet files. What an earlier
    run wrote to `out`, which may lie in the folder, is none of them.

    Several files are named by a folder that holds them, by a pattern (`train-*.tar`) or by a range
    (`train-{000..012}.tar`). A list is a text file with the path of an image on every line, relative to its own folder.

    Raises SourceError where there is nothing to read, OSError where it may not be read, ImageError for an empty name
    and one that is not UTF-8.
    """
    check_path(text)
    source = _opened(text, None if out is None else Path(out).resolve())
    check_names(source.names)
    return source


def _opened(text: str, out: Path | None) -> Source:
    paths: list[Path] = []
    there = Path(text).expanduser().exists()  # a name may hold what looks like a range
    for pattern in [text] if there else expand_ranges(text) or [text]:
        found = _matching(pattern)
        if not found:
            allowed = "allowed: a folder of images, a list, .tar or .parquet"
            raise SourceError(f"{pattern}: no such file or folder; {allowed}")
        paths += found
    if len(paths) == 1 and paths[0].is_dir():
        return _folder(paths[0], out)
    if len(paths) == 1 and paths[0].suffix.lower() in LIST:
        return _list(paths[0])
    return _shards(text, paths)


def digest_of(source: Source) -> str:
    """Changes when an image is added, taken away or moved to another place."""
    digest = hashlib.sha256()
    for name in source.names:
        digest.update(name.encode() + b"\0")
    for place in source.places:
        digest.update(os.fsencode(place) + b"\1")
    return digest.hexdigest()[:32]


def expand_ranges(text: str) -> list[str]:
    """`a-{00..02}.tar` -> `a-00.tar`, `a-01.tar`, `a-02.tar`, as webdataset and shells do; other text is left alone."""
    found = re.search(r"\{(\d+)\.\.(\d+)\}", text)
    if found is None:
        return [text]
    first, last = found[1], found[2]
    numbers = [str(i).zfill(len(first)) for i in range(int(first), int(last) + 1)]
    return [full for n in numbers for full in expand_ranges(text[: found.start()] + n + text[found.end() :])]


def _matching(pattern: str) -> list[Path]:
    path = Path(pattern).expanduser()
    if path.exists():
        return [path]
    return sorted(Path(name) for name in glob.glob(str(path)))


def _folder(root: Path, out: Path | None) -> Source:
    found: dict[str, list[Path]] = {"image": [], "tar": [], "parquet": []}
    for path in files_below(root):
        kind = _kind(path.name)
        if kind == "parquet" and path.name.startswith(PREFIX) and path.parent.resolve() == out:
            continue
        if kind is not None and not path.name.startswith("."):
            found[kind].append(path)
    kinds = [kind for kind, paths in found.items() if paths]
    if len(kinds) > 1:
        counts = ", ".join(f"{len(found[kind])} {kind} files" for kind in kinds)
        raise SourceError(f"{root} holds {counts}; allowed: one kind, name the other by a pattern")
    if not kinds:
        raise SourceError(f"{root} holds no image; looked for {' '.join(SUFFIXES + TAR + PARQUET)}")
    paths = sorted(found[kinds[0]], key=lambda path: path.as_posix())
    return Files([str(path) for path in paths]) if kinds[0] == "image" else _shards(str(root), paths)


def _kind(name: str) -> str | None:
    lower = name.lower()
    kinds = {"image": SUFFIXES, "tar": TAR, "parquet": PARQUET}
    return next((kind for kind, suffixes in kinds.items() if lower.endswith(suffixes)), None)


def _list(path: Path) -> Source:
    try:
        # Windows puts a mark before the first path. splitlines would cut names at U+2028 and its like, too.
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except UnicodeDecodeError as error:
        raise SourceError(f"{path} is not a list of paths ({error}); allowed: UTF-8, a path on every line") from error
    names = [name for line in lines if (name := line.strip(" \t"))]
    if not names:
        raise SourceError(f"{path} lists no image; allowed: a path on every line")
    return Files(names, path.parent)


def _shards(text: str, paths: list[Path]) -> Source:
    kinds = {_kind(path.name) for path in paths}
    compressed = [path for path in paths if path.name.lower().endswith(COMPRESSED_TAR)]
    if compressed:
        raise SourceError(f"{compressed[0]} is a compressed tar file; allowed: .tar, its images are compressed already")
    if len(kinds) > 1 or None in kinds or any(path.is_dir() for path in paths):
        seen = next((path for path in paths if _kind(path.name) is None or path.is_dir()), paths[0])
        raise SourceError(
            f"{seen}; allowed: a folder, a list ({' '.join(LIST)}), images, .tar or .parquet, of one kind"
        )
    kind = kinds.pop()
    if kind == "image":
        return Files([str(path) for path in paths])
    source: Source = TarShards(paths) if kind == "tar" else ParquetImages(paths)
    if not source.names:
        raise SourceError(f"{text} holds no image; looked for {' '.join(SUFFIXES)} in {len(paths)} files")
    return source
