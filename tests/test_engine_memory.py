"""Places in the arena: nothing that lives is overwritten, memory is reused, and by the threads that had it."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from inception_fast.kernels.plan import ALIGNMENT

import engine_nets
from engine_nets import images
from inception_fast.engine.memory import SLACK, Lifetime, aligned, place, place_by_halves
from inception_fast.engine.segment import views

LIVES = st.lists(
    st.tuples(st.integers(0, 5000), st.integers(0, 30), st.integers(0, 8)).map(
        lambda t: Lifetime(t[0], t[1], t[1] + t[2])
    ),
    max_size=40,
)


def changing(lives: Sequence[Lifetime], positions: Sequence[int]) -> int:
    """Lines of the cache that are written in another half of a buffer than last time, in the second of two calls."""
    half = np.full(max(at + aligned(a.bytes) for a, at in zip(lives, positions, strict=True)) // ALIGNMENT, -1)
    found = 0
    for call in range(2):
        for i in sorted(range(len(lives)), key=lambda i: (lives[i].first, -lives[i].bytes)):
            lines = half[positions[i] // ALIGNMENT :][: aligned(lives[i].bytes) // ALIGNMENT]
            for number, part in enumerate(np.split(lines, [len(lines) // 2])):
                found += call * int((part != number).sum())
                part[:] = number
    return found


@pytest.mark.parametrize("how", [place, place_by_halves, partial(place_by_halves, slack=1)])
@settings(max_examples=150, deadline=None)
@given(lives=LIVES)
def test_living_buffers_never_overlap(how: object, lives: list[Lifetime]) -> None:
    positions, total = how(lives)  # type: ignore[operator]
    for i, (a, at) in enumerate(zip(lives, positions, strict=True)):
        assert at % ALIGNMENT == 0 and at >= 0 and at + a.bytes <= total
        for b, bt in list(zip(lives, positions, strict=True))[:i]:
            assert not a.meets(b) or at + a.bytes <= bt or bt + b.bytes <= at


@settings(max_examples=100, deadline=None)
@given(LIVES)
def test_memory_is_reused(lives: list[Lifetime]) -> None:
    """Never more than twice what is alive at the worst step, far below the sum for long chains."""
    alive = [sum(aligned(a.bytes) for a in lives if a.first <= t <= a.last) for t in range(40)]
    assert max(alive, default=0) <= place(lives)[1] <= 2 * max(alive, default=0)
    assert place_by_halves(lives)[1] <= SLACK * place(lives)[1] and place_by_halves(lives, 1)[1] <= place(lives)[1]


def test_a_chain_needs_two_buffers() -> None:
    assert place([Lifetime(640, i, i + 1) for i in range(20)])[1] == 2 * 640


def test_a_small_buffer_takes_the_middle_of_a_large_one() -> None:
    """A map, its pool and what reads that: at the large map's beginning all of the last would be the first thread's."""
    lives = [Lifetime(64 * 1000, 0, 1), Lifetime(64 * 200, 1, 2), Lifetime(64 * 400, 2, 3)]
    before, after = place(lives), place_by_halves(lives)
    assert changing(lives, before[0]) >= 200
    assert changing(lives, after[0]) == 0 and after[1] <= SLACK * before[1]


@pytest.mark.parametrize("name", ["inception_v1", "inception_resnet_v1"])
def test_the_maps_of_a_network_stay_with_the_threads_that_had_them(name: str) -> None:
    executable, _ = engine_nets.optimised(name)._session.executable([images(name)])
    (item,) = executable.program.items
    touched: dict[int, list[int]] = {}
    for i, step in enumerate(item.plan.steps):
        for view in views(step):
            touched.setdefault(view.buffer, []).append(i)
    buffers = [(b, touched[i]) for i, b in enumerate(item.plan.buffers) if b.kind == "arena" and i in touched]
    lives = [Lifetime(b.bytes, min(steps), max(steps)) for b, steps in buffers]
    lines = sum(aligned(life.bytes) for life in lives) // ALIGNMENT
    assert changing(lives, [b.position for b, _ in buffers]) < 0.08 * lines
    assert changing(lives, place_by_halves(lives, 1)[0]) < 0.16 * lines
    assert changing(lives, place(lives)[0]) > 0.25 * lines
