"""The queue's launches of the last images, on the CPU: which images these are, and that parts make a whole."""

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

LINES = ConvSpec(128, 17, 17, 192, 192, 1, 7, padding=(0, 0, 3, 3), dtype="bfloat16")


@pytest.fixture
def tails(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    with loaded("tails") as modules:
        monkeypatch.setattr(modules["tails"].cuda, "library", stub)
        yield modules["tails"]


def test_images_of_whole_turns(tails: Any) -> None:
    """289 tiles of 128 pixels are two turns of 132 blocks, 264 tiles, and 25; of half the columns 4 turns and 50."""
    for columns in (192, 96):
        config = SimpleNamespace(rows=128, columns=columns)
        images = tails.whole_images(LINES, config, 132)
        tiles = -(-images * 289 // 128) * (192 // columns)
        assert images == 116 and tiles <= 528 // (columns // 96) < -(-(images + 1) * 289 // 128) * (192 // columns)
        assert tails.whole_images(ConvSpec(8, 17, 17, 192, 96, 1, 1), config, 132) == 0, "less than a turn"


def test_parts_make_the_whole_and_what_is_wrong_is_not_timed(tails: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A launch writes its images alone; one form is wrong in them."""
    bad: list[str] = []

    def group(name: str, library: Any, problems: Any, cut: Any, overlap: bool = False) -> Any:
        (problem,) = problems
        (target,) = problem.targets
        assert target.y.data.numel() == problem.spec.n * 289 * problem.spec.oc

        def run() -> None:
            target.y.data.fill_(2.0 if bad[:1] == [cut.config.name] else 1.0)

        return SimpleNamespace(run=run)

    def drawn(spec: ConvSpec) -> tuple[torch.Tensor, ...]:
        x = torch.zeros(spec.n, spec.c, spec.h, spec.w, dtype=torch.bfloat16)
        return x, torch.zeros(spec.oc, spec.c, spec.kh, spec.kw, dtype=torch.bfloat16), *torch.zeros(2, spec.oc)

    monkeypatch.setattr(convolve, "group", group)
    monkeypatch.setattr(tails, "draw", drawn)
    monkeypatch.setattr(tails, "SHAPES", tails.SHAPES[:1])
    monkeypatch.setattr(tails, "device_seconds", lambda calls, backlog: {name: [1e-3, 1e-3, 1e-3] for name in calls})
    rows = next(tails.tail_rows(128, "bfloat16"))
    apart = [row["config"] for row in rows if " + " in row["config"]]
    assert {row["status"] for row in rows} == {"ok"} and len(rows) - len(apart) == len(
        tails.favourites(LINES, tails.MAINS)
    )
    assert apart and len(apart) == 2 * len([name for name in apart if name.endswith(" early")])
    bad.append(apart[0].split(" + ")[1])
    rows = next(tails.tail_rows(128, "bfloat16"))
    wrong = [row["config"] for row in rows if row["status"] == "wrong"]
    assert wrong and all(bad[0] in name for name in wrong) and not any("median_ms" in row for row in rows[: len(wrong)])
