"""The queue's maps whose pixels begin with a line of memory, on the CPU: where they lie, and that each has a row."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from inception_fast.kernels.cuda import convolve
from inception_fast.kernels.spec import ConvSpec

from hopper_library import stub
from queue_modules import loaded


@pytest.fixture
def pitches(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    with loaded("pitches", "tails") as modules:
        monkeypatch.setattr(modules["tails"].cuda, "library", stub)
        monkeypatch.setattr(modules["tails"], "device_seconds", lambda calls, backlog: {n: [1e-3] * 3 for n in calls})
        yield modules["pitches"]


@pytest.mark.parametrize(("c", "pitch"), [(224, 256), (160, 192), (64, 64), (8, 64)])
def test_pixels_begin_with_a_line(pitches: Any, c: int, pitch: int) -> None:
    x = torch.randn(2, 3, 5, c)
    place = pitches.on_lines(x)
    assert (place.n, place.h, place.w, place.c, place.pitch) == (2, 3, 5, c, pitch)
    rows = place.data.view(-1, pitch)
    assert torch.equal(rows[:, :c].view_as(x), x) and rows[:, c:].isnan().all()


def test_every_shape_is_off_the_lines(pitches: Any) -> None:
    assert all(2 * c % 128 for _, c, *_ in pitches.SHAPES)


def test_both_pitches_of_every_cut_have_a_row(pitches: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """One is wrong where pixels are apart, and has no time."""
    bad: list[str] = []

    def group(name: str, library: Any, problems: Any, cut: Any) -> Any:
        (problem,) = problems
        (target,) = problem.targets
        found = 2.0 if [cut.config.name] == bad and problem.x.pitch != problem.spec.c else 1.0
        return SimpleNamespace(run=lambda: target.y.data.fill_(found))

    def drawn(spec: ConvSpec) -> tuple[torch.Tensor, ...]:
        x = torch.zeros(spec.n, spec.c, spec.h, spec.w, dtype=torch.bfloat16)
        return x, torch.zeros(spec.oc, spec.c, spec.kh, spec.kw, dtype=torch.bfloat16), *torch.zeros(2, spec.oc)

    monkeypatch.setattr(convolve, "group", group)
    monkeypatch.setattr(pitches, "draw", drawn)
    monkeypatch.setattr(pitches, "SHAPES", pitches.SHAPES[:1])
    rows = next(pitches.pitch_rows(2, "bfloat16"))
    names = {row["config"].split(", ")[0] for row in rows}
    assert len(rows) == 2 * len(names) > 2 and {row["status"] for row in rows} == {"ok"}
    assert {row["config"].split(", ")[1] for row in rows} == {"224 apart", "256 apart"}
    bad.append(rows[0]["config"].split(", ")[0])
    rows = next(pitches.pitch_rows(2, "bfloat16"))
    assert [row["config"] for row in rows if row["status"] == "wrong"] == [f"{bad[0]}, 256 apart"]
    assert "median_ms" not in rows[0] and len(rows) == 2 * len(names)
