"""Result files: written whole or not at all."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any


def write_atomically(path: Path, write: Callable[[Path], object]) -> None:
    """Lets `write` fill a temporary file beside `path`, then puts it in place; a failure leaves the old file alone.

    Raises OSError, naming `path`, where the system refuses: of a full disk it says no name, or the temporary one.
    """
    prefix = f".{path.stem}-"
    try:
        handle, name = tempfile.mkstemp(prefix=prefix, suffix=path.suffix, dir=path.parent)
        os.close(handle)
        scratch = Path(name)
        try:
            write(scratch)
            scratch.chmod(0o666 & ~_umask())
            os.replace(scratch, path)
        finally:
            scratch.unlink(missing_ok=True)
    except OSError as error:
        own = error.filename is None or Path(str(error.filename)).name.startswith(prefix)
        if error.errno is None or not own:
            raise
        raise OSError(error.errno, os.strerror(error.errno), str(path)) from error


def write_text(path: Path, text: str) -> None:
    """UTF-8; what is none in the name of a file is escaped, as \\udcff, which JSON reads as it was."""
    write_atomically(path, lambda scratch: scratch.write_text(text, encoding="utf-8", errors="backslashreplace"))


def write_json(path: Path, value: Any) -> None:
    """Standard JSON: NaN and infinity raise ValueError and write nothing."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


class Parts:
    """What a long run has finished, a file for each part, so that `resume` goes on where a run was cut short.

    A part counts only under the same `key`: whatever its content depends on, as JSON.
    """

    def __init__(self, folder: Path, key: Mapping[str, Any], resume: bool) -> None:
        self.folder, self.key, self.resume = folder, json.loads(json.dumps(key)), resume

    def _path(self, name: str) -> Path:
        return self.folder / f"{name}.json"

    def load(self, name: str) -> Any:
        """The value saved under `name`; None where there is no whole one, or not of this key, or none is wanted."""
        if not self.resume or not self._path(name).exists():
            return None
        try:
            held = json.loads(self._path(name).read_text(encoding="utf-8"))
            return held["value"] if held["key"] == self.key else None
        except (ValueError, KeyError, TypeError):  # damaged, as a power cut may leave it
            return None

    def save(self, name: str, value: Any) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        write_json(self._path(name), {"key": self.key, "value": value})


def conditions(origin: Mapping[str, Any]) -> dict[str, Any]:
    """Of a provenance, what measurements must share to stand in one result."""
    return {name: origin[name] for name in ("machine", "threads", "capability", "tier", "versions", "commit")}


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
