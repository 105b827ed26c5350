"""Which forms of the Hopper kernels came out right on the device, the walk being one, and the library without the
others.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

from inception_fast.kernels.cuda import convolve, pair, pooled
from journal import form_of

from inception_fast.engine import gpu_walk

WALK = "walk"


def right_forms(rows: Sequence[dict[str, Any]]) -> set[str]:
    """Forms, as the first parameters of tests, of which some tests passed and all others were skipped: for shapes that
    the form has no room for.
    """
    passed = {form_of(row["test"]) for row in rows if row["status"] == "ok"}
    return passed - {form_of(row["test"]) for row in rows if row["status"] not in ("ok", "skipped")}


@contextlib.contextmanager
def only(forms: set[str] | None) -> Iterator[None]:
    """Inside, the kernels have no configuration of another form, and plans no walk where that is another; None changes
    nothing.
    """
    every, pairs, maxima = convolve.able, pair.able, pooled.able
    if forms is not None:
        convolve.able = lambda *given: tuple(config for config in every(*given) if config.form in forms)
        pair.able = lambda *given: tuple(config for config in pairs(*given) if config.form in forms)
        pooled.able = lambda *given: tuple(config for config in maxima(*given) if config.form in forms)
    walking = contextlib.nullcontext() if forms is None or WALK in forms else gpu_walk.disabled()
    try:
        with walking:
            yield
    finally:
        convolve.able, pair.able, pooled.able = every, pairs, maxima
