"""A run's log: a JSON object a line, a line a step; TensorBoard beside it where asked for."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any

from ..measure.results import write_atomically

NAME = "log.jsonl"


def read_log(folder: Path, name: str = NAME) -> list[dict[str, Any]]:
    """The rows of a run's log; a line that a killed process left half written, or a disk damaged, is not one."""
    path = folder / name
    if not path.exists():
        return []
    rows = []
    for line in path.read_bytes().splitlines():
        try:
            row = json.loads(line)
        except ValueError:  # no JSON, or no text
            continue
        if isinstance(row, dict) and isinstance(row.get("step"), int):
            rows.append(row)
    return rows


class Log:
    """Appends to DIR/`name` from `step` on: rows of later steps, which a resumed run computes again, are dropped. Of a
    run that ends by an error before its first row no log is left, which would say that DIR holds a run.
    """

    def __init__(self, folder: Path, step: int, tensorboard: bool = False, name: str = NAME) -> None:
        path = folder / name
        lines = [json.dumps(row) + "\n" for row in read_log(folder, name) if row["step"] <= step]
        write_atomically(path, lambda scratch: scratch.write_text("".join(lines), encoding="utf-8"))
        # Without a buffer: closing the file would fail again over what a full disk left in it.
        self.file = open(path, "ab", buffering=0)
        self.board: Any = None
        if tensorboard:
            self.board = board_writer()(str(folder / "tensorboard"), purge_step=step + 1)

    def write(self, row: dict[str, Any]) -> None:
        line, before = (json.dumps(row, allow_nan=False) + "\n").encode(), self.file.tell()
        try:
            while line:
                line = line[self.file.write(line) :]
        except OSError as error:
            self.file.truncate(before)  # whole rows alone
            raise OSError(f"{self.file.name} cannot be written ({error.strerror}); make room, then resume") from error
        if self.board is not None:
            with _board_writes(self.file.name):
                for key, value in row.items():
                    if key != "step":
                        self.board.add_scalar(f"train/{key}", value, row["step"])

    def __enter__(self) -> Log:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.file.close()
        path = Path(self.file.name)
        if error is not None and not path.stat().st_size:
            path.unlink()
        if self.board is not None and error is None:
            with _board_writes(self.file.name):
                self.board.close()


@contextmanager
def _board_writes(log: str) -> Iterator[None]:
    """TensorBoard writes in a thread of its own, through whichever library is installed: its errors have many types."""
    try:
        yield
    except Exception as error:
        reason = str(error).strip().splitlines()[-1:] or [type(error).__name__]
        raise OSError(f"TensorBoard's files beside {log} cannot be written ({reason[0]})") from error


def board_writer() -> Any:
    """The class that writes TensorBoard's files; raises ValueError, with what to install, where it cannot be had."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise ValueError(f"--tensorboard needs tensorboard ({error}); pip install 'inception-fast[train]'") from error
    return SummaryWriter
