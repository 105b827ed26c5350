"""safetensors files of any name: the library itself reads only those whose path is UTF-8."""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from safetensors import safe_open


@contextlib.contextmanager
def opened(path: str | os.PathLike[str]) -> Iterator[Any]:
    """`safe_open` for torch; raises what it raises. A link stands for a name that is not UTF-8."""
    with contextlib.ExitStack() as stack:
        try:
            os.fspath(path).encode()
        except UnicodeEncodeError:
            link = Path(stack.enter_context(tempfile.TemporaryDirectory()), "file")
            link.symlink_to(Path(path).absolute())
            path = link
        yield stack.enter_context(safe_open(path, framework="pt"))
