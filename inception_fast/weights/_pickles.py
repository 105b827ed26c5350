"""What the pickle in a file asks for, told from its opcodes alone: nothing is loaded."""

from __future__ import annotations

import io
import pickletools
import re
import zipfile
from collections.abc import Iterator
from pathlib import Path

PLAIN = re.compile(r"collections\.OrderedDict|torch\.\w*Storage|torch\._utils\._rebuild_(tensor_v2|parameter)")
"""What state dicts of tensors ask for."""
PROTOCOL = 2  # that torch writes and reads
PARTS = 4  # pickles in a row, which torch's old format begins with
LONGEST = 1 << 26  # bytes looked at: tensors lie behind or beside a pickle


def reason(path: Path) -> str:
    """Why the pickle of a file is not one of plain tensors, in words; "" where its opcodes do not tell."""
    data = b""
    try:
        data = _content(path)
        stream = io.BytesIO(data)
        for _ in range(PARTS):
            for name in _names(stream):
                if not PLAIN.fullmatch(name):
                    return f"it asks for {name}"
    except Exception:  # a damaged or hostile pickle can fail in any way, and is refused whichever it is
        pass
    held = data[1] if data[:1] == b"\x80" and len(data) > 1 else PROTOCOL
    return f"its pickle protocol is {held}, torch's is {PROTOCOL}" if held > PROTOCOL else ""


def _content(path: Path) -> bytes:
    try:
        with zipfile.ZipFile(path) as archive:
            member = next(name for name in archive.namelist() if name.endswith("data.pkl"))
            with archive.open(member) as file:
                return file.read(LONGEST)
    except (zipfile.BadZipFile, StopIteration):
        with open(path, "rb") as file:
            return file.read(LONGEST)


def _names(stream: io.BytesIO) -> Iterator[str]:
    """ "module.name" of everything that a pickle imports, in order."""
    texts: list[str] = []
    memo: dict[int, str | None] = {}
    top: str | None = None
    for opcode, argument, _ in pickletools.genops(stream):
        if opcode.name in ("GLOBAL", "INST"):
            yield str(argument).replace(" ", ".")
        elif opcode.name == "STACK_GLOBAL":
            yield ".".join(texts[-2:])
        elif opcode.name in ("PUT", "BINPUT", "LONG_BINPUT", "MEMOIZE"):
            memo[len(memo) if argument is None else int(argument)] = top
            continue
        if opcode.name in ("GET", "BINGET", "LONG_BINGET"):
            top = memo.get(int(argument or 0))
        else:
            top = argument if opcode.name.endswith(("UNICODE", "UNICODE8")) else None
        if top is not None:
            texts.append(top)
