"""The arithmetic on fewer launches of v3's stem that CONTRIBUTING cites."""

from __future__ import annotations

import pytest

from queue_modules import loaded


def test_the_stem_by_its_ceilings() -> None:
    with loaded("stem") as modules:
        stem = modules["stem"]
        conv3, pool = stem.STAGES[2:]
        flops = 128 * 2 * 147 * 147 * 32 * 64 * 9
        alone = stem.launch_seconds((conv3,), 128) - stem.LAUNCH
        assert alone == pytest.approx(max(flops / (0.75 * 790e12), 128 * 2 * 147 * 147 * (32 + 64) / 4.3e12))
        both = stem.launch_seconds((conv3, pool), 128) - stem.LAUNCH
        assert both == pytest.approx(flops * (17 / 16) ** 2 / (0.75 * 790e12)), "17 of 16 rows and columns at the edges"
        saved = {
            form: [stem.seconds("four launches", n) - stem.seconds(form, n) for n in (1, 128)] for form in stem.FORMS
        }
        told = {form: [round(1e6 * s) for s in pair] for form, pair in saved.items()}
        assert told == {
            "four launches": [0, 0], "the pool in conv3": [3, 83], "conv2 to the pool": [5, 33], "one launch": [8, 42]
        }  # fmt: skip
        assert round(1e6 * stem.seconds("four launches", 128)) == 464
