"""The tuner with a clock of its own: which tiles it tries, what it keeps, what it refuses."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from inception_fast.kernels.spec import ConvSpec
from inception_fast.kernels.triton import configs, stems, tune
from inception_fast.kernels.triton.configs import Config
from inception_fast.kernels.triton.convolve import Part, split_columns
from inception_fast.kernels.triton.launch import Launch

import numerics
from inception_fast.engine import gpu_tune

from .maps import DEVICE

SPEC = ConvSpec(1, 9, 9, 32, 48, 3, 3, (1, 1), (1, 1, 1, 1), dtype="float16")


def arguments() -> tuple[torch.Tensor, list[Part]]:
    x, weight = numerics.random(1, 32, 9, 9, dtype=torch.float16), numerics.random(48, 32, 3, 3, seed=1)
    return x.to(DEVICE), [Part(weight, torch.ones(48), torch.zeros(48), (1, 1), True)]


def test_the_fastest_that_is_right_wins() -> None:
    seconds = iter(range(100, 0, -1))

    def timer(call: object) -> float:
        return float(next(seconds))

    found = tune.tried(SPEC, *arguments(), "sm_90", timer, count=2)
    assert len(found) == 5 and {config.form for config in found} == {"pointer", "tma"}
    best = min(found, key=found.__getitem__)
    row = tune.row_of(SPEC, "sm_90", best, found[best])
    assert row[:5] == ("sm_90", "half", 81, 48, 288) and row.seconds == 96.0


def test_siblings_are_timed_as_they_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each group's result in a place of its own, by tiles that scatter; unlike halves only by pointers."""
    ran: list[Launch] = []
    monkeypatch.setattr(Launch, "run", lambda self, run=Launch.run: ran.append(self) or run(self))
    x, (part,) = arguments()
    siblings = split_columns(part, [(16, True), (8, False), (24, True)])
    found = tune.tried(SPEC, x, siblings, "sm_90", lambda call: 1.0, count=3)
    assert [config.form for config in found][-6:] == ["pointer"] * 3 + ["tma"] * 3
    assert len({id(launch.kernel) for launch in ran if "GROUPED" in launch.arguments}) >= 2
    assert all(launch.arguments["GROUPED"] for launch in ran)
    assert all(config.block_n <= 64 and config.block_m * config.block_n <= 128 * 128 for config in found)
    row = tune.row_of(SPEC, "sm_90", next(iter(found)), 1.0)
    assert row.oc == 48, "looked up as one wide convolution"

    wide = replace(SPEC, kh=1, padding=(0, 0, 1, 1))
    for half, forms in ((16, {"pointer"}), (24, {"pointer", "tma"})):
        taps = [Part(part.weight[:half, :, :1], None, None, (0, 1), True)]
        taps += [Part(part.weight[half:, :, :, :1], None, None, (1, 0), True)]
        assert {config.form for config in tune.tried(wide, x, taps, "sm_90", lambda call: 1.0, count=1)} == forms


def test_a_residual_is_timed_with_its_convolution(monkeypatch: pytest.MonkeyPatch) -> None:
    ran: list[Launch] = []
    monkeypatch.setattr(Launch, "run", lambda self, run=Launch.run: ran.append(self) or run(self))
    wanted = gpu_tune.Wanted(SPEC, (SPEC,), residual=True)
    old = wanted.old(DEVICE)
    assert old is not None and old.shape == (1, 9, 9, 48) and torch.equal(old, wanted.old(DEVICE))  # type: ignore
    assert tune.tried(SPEC, *arguments(), "sm_90", lambda call: 1.0, count=2, residual=old)
    assert all(launch.arguments["RESIDUAL"] and launch.arguments["residual_ptr"] is not None for launch in ran)
    assert gpu_tune.Wanted(SPEC, (SPEC,)).old(DEVICE) is None


def test_stems_have_tiles_of_their_own() -> None:
    spec = ConvSpec(2, 19, 19, 3, 24, 3, 3, (2, 2), dtype="float16")
    x, weight = numerics.random(2, 3, 19, 19).to(DEVICE), numerics.random(24, 3, 3, 3, seed=1)
    found = tune.tried(spec, x, [Part(weight, None, None, (0, 0), True)], "sm_90", lambda call: 1.0, stem=True)
    assert next(iter(found)) == replace(stems.STEM, block_n=32) and len(found) == 6
    assert {(one.block_m, one.warps) for one in found} == {(m, w) for m in (64, 128, 256) for w in (4, 8)}
    exact = tune.stem_proposals(replace(spec, dtype="float32"))
    assert {one.block_m for one in exact} == {32} and len(exact) == 2, "larger tiles would round to TF32"

    row = tune.row_of(spec, "sm_90", list(found)[-1], 1e-6)
    rows = [*configs.shipped(), row]
    shape = ("sm_90", "half", 162, 24, 27)
    assert configs.choose_stem(*shape, rows) == row.config != configs.choose(*shape, rows)
    assert configs.choose_stem(*shape, configs.shipped()) is None, "no model predicts them"
    assert configs.choose_stem("sm_90", "half", 162 * 8, 24, 27, rows) is None, "too far"


def test_what_fails_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    run = Launch.run

    def failing(self: Launch) -> None:
        if self.arguments.get("BLOCK_K") == 64:
            raise RuntimeError("out of resources")
        run(self)

    monkeypatch.setattr(Launch, "run", failing)
    both = [Config(block_k=64), Config(block_k=32)]
    monkeypatch.setattr(tune, "proposals", lambda *rest: both)
    assert list(tune.tried(SPEC, *arguments(), "sm_80", lambda call: 1.0)) == [both[1]]
    monkeypatch.setattr(tune, "proposals", lambda *rest: both[:1])
    with pytest.raises(RuntimeError, match="runs: pointer 128x64x64 w4 s3: out of resources"):
        tune.tried(SPEC, *arguments(), "sm_80", lambda call: 1.0)


BIG = ConvSpec(128, 17, 17, 160, 192, 1, 7, (1, 1), (0, 0, 3, 3), dtype="bfloat16")


def test_what_ships_comes_first() -> None:
    """So that a race never ends with a slower tile than the one that runs without it."""
    for spec in (SPEC, BIG):
        m, k = spec.n * spec.oh * spec.ow, spec.c * spec.kh * spec.kw
        assert tune.proposals(spec, "sm_90")[0] == configs.choose("sm_90", "half", m, spec.oc, k, c=spec.c)


def test_wide_tiles_are_tried_where_they_fit() -> None:
    """Maps of several rows a box turned, others as they are; steps and columns that waste little; none of one wave."""
    wide = tune._wide(BIG, ())
    assert {config.form for config in wide} == {"turned"} and {config.block_k for config in wide} == {32}
    assert {config.block_n for config in wide} == {64, 128, 192} and {config.block_m for config in wide} == {
        64,
        128,
        256,
    }
    pointwise = tune._wide(replace(BIG, c=768, kw=1, padding=(0, 0, 0, 0)), ())
    assert {config.form for config in pointwise} == {"tma"} and {config.block_k for config in pointwise} == {64}
    assert {config.form for config in tune._wide(replace(BIG, stride=(2, 2)), ())} == {"pointer"}
    assert tune._wide(replace(BIG, n=1), ()) == [], "too few programs"
    assert not set(wide) & set(tune.proposals(replace(BIG, dtype="float32"), "sm_90"))


def test_ampere_has_no_tma() -> None:
    assert {config.form for config in tune.proposals(SPEC, "sm_80")} == {"pointer"}


def test_what_was_tuned_replaces_what_was_there(tmp_path: Path) -> None:
    file = tmp_path / "gpu.json"
    first, second = (tune.row_of(SPEC, "sm_90", Config(block_k=k), k * 1e-6) for k in (32, 64))
    other = tune.row_of(replace(SPEC, n=2), "sm_90", Config(), 1e-6)
    for row in (first, other, second):
        gpu_tune.keep(file, row)
    assert configs.read(file) == [other, second]
