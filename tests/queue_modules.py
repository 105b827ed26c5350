"""The scripts of the measuring queue, which find each other in their own folder, as modules of a test."""

from __future__ import annotations

import contextlib
import importlib
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from checkout import ROOT

FOLDER = ROOT / "benchmarks" / "gpu"


@contextlib.contextmanager
def loaded(*names: str) -> Iterator[dict[str, Any]]:
    """The named modules, and all others of the folder gone afterwards."""
    before = set(sys.modules)
    sys.path.insert(0, str(FOLDER))
    try:
        yield {name: importlib.import_module(name) for name in names}
    finally:
        sys.path.remove(str(FOLDER))
        for name in {file.stem for file in FOLDER.glob("*.py")} - before:
            sys.modules.pop(name, None)


def living(process: int) -> bool:
    """Whether it runs; one that ended and that nobody waited for does not."""
    try:
        return ") Z" not in Path(f"/proc/{process}/stat").read_text()
    except OSError:
        return False
