"""What the queue measured on its way to the shipped tables: all of it, or nothing."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from queue_modules import loaded


@pytest.fixture(scope="module")
def queue() -> Iterator[dict[str, Any]]:
    with loaded("store", "catalogue", "ship") as modules:
        yield modules


@pytest.mark.parametrize("row", ('{"choice": ["g", "conv"]}', '{"choice": 1}', '{"row": ["sm_90"]}', '{"row": null}',
                                 '{"choice": ["g", "conv", "half", 1, [], 1, 1, "c", 1, 1.0, 1.0]}',
                                 '{"row": ["sm_90", "half", 64, 32, 64, ["tma", 64, 32, 64, 1, 4, 3], -1.0]}',
                                 '{"runtime": "walk", "host": 1}'))  # fmt: skip
def test_a_damaged_row_ships_nothing(
    row: str, queue: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "result.json"
    results = f'{{"tiles/a": {{"status": "ok", "rows": [{row}]}}}}'
    file.write_text(f'{{"machine": {{"name": "x", "date": "2026-11-27"}}, "results": {results}}}')
    with pytest.raises(SystemExit):
        queue["ship"].main([str(file)], tmp_path)
    assert "error: " in capsys.readouterr().err and list(tmp_path.iterdir()) == [file]


def test_a_result_is_filed_whole_or_not_at_all(
    queue: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    document, write = {"machine": {"name": "x", "date": "2026-11-27"}, "results": {}}, Path.write_text

    def full(path: Path, text: str, **options: Any) -> int:
        write(path, text[:9])
        raise OSError("No space left on device")

    with monkeypatch.context() as patch, pytest.raises(OSError, match="No space"):
        patch.setattr(Path, "write_text", full)
        queue["ship"].file_result(document, tmp_path)
    assert not list((tmp_path / "x").iterdir())
    assert queue["ship"].file_result(document, tmp_path) == tmp_path / "x" / "2026-11-27-gpu.json"
