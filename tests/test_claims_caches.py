"""Rows on cache misses: from counts they are what arithmetic says, and where nothing was counted they say why."""

from __future__ import annotations

import shutil

import pytest

from inception_fast.claims import caches, figures, nets
from inception_fast.claims.study import Context
from inception_fast.measure.cache import Layer, Misses


def fake(layer: Layer) -> Misses:
    """A machine on which a pair misses twice as often as a square kernel, and its fused form half as often as it."""
    l1 = {"conv": 1000.0, "pair": 2000.0, "fused": 1000.0}[layer.kind] * layer.h * layer.w
    return Misses(accesses=1e7, l1=l1, last=l1 / 100 if layer.kind != "conv" else 0.0)


@pytest.fixture
def rows(tmp_path, monkeypatch) -> dict:
    monkeypatch.setattr(caches, "_driver", lambda context: tmp_path)
    monkeypatch.setattr(caches, "measure", lambda driver, layer, sizes: fake(layer))
    return {row.id: row for row in caches.cache_misses(Context(tmp_path))}


def test_ratios_and_verdicts(rows):
    for n in nets.PAIR_SIZES:
        row = rows[f"asymmetric_{n}_l1_misses"]
        assert (row.measured, row.verdict) == (2.0, "confirmed") and "the model says" in row.note
        assert (rows[f"fused_pair_{n}_l1_misses"].measured, rows[f"fused_pair_{n}_l1_misses"].verdict) == (
            0.5,
            "confirmed",
        )
        assert rows[f"asymmetric_{n}_l1_rate"].measured == 2.0
        nothing = rows[f"asymmetric_{n}_ll_misses"]
        assert (nothing.measured, nothing.verdict) == (None, "not measured") and "this level holds all" in nothing.note
    assert rows["misses_over_map_size"].measured == 0.5


def test_the_sweep_crosses_both_caches_and_is_drawn(rows, tmp_path):
    points = rows["misses_over_map_size"].details["points"]
    sizes = [point["bytes"] for point in points]
    assert min(sizes) < caches.CACHES.last < max(sizes)
    assert min(p["side"] ** 2 * 4 * caches.SWEEP_WIDTH for p in points) < caches.CACHES.l1
    assert {point["kind"] for point in points} == {"conv", "pair", "fused"}
    pytest.importorskip("matplotlib")
    assert list(figures.draw(list(rows.values()), tmp_path)) == ["caches.png"]


@pytest.mark.parametrize("quick, reason", [(False, "valgrind is not installed"), (True, "valgrind is not installed")])
def test_without_valgrind_nothing_is_counted(tmp_path, monkeypatch, quick, reason):
    monkeypatch.setattr(shutil, "which", lambda name: None)
    rows = caches.cache_misses(Context(tmp_path, quick=quick))
    assert len(rows) == 15
    assert {(row.measured, row.verdict, row.note) for row in rows} == {(None, "not measured", reason)}


def test_a_quick_run_builds_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "which", lambda name: f"/usr/bin/{name}")
    assert {row.note for row in caches.cache_misses(Context(tmp_path, quick=True))} == {caches.QUICK}


def test_a_driver_that_does_not_build_is_a_reason(tmp_path, monkeypatch):
    def broken(checkout, folder):
        raise RuntimeError("the native driver does not build:\n  error")

    monkeypatch.setattr(shutil, "which", lambda name: f"/usr/bin/{name}")
    monkeypatch.setattr(caches, "build_driver", broken)
    assert {row.note for row in caches.cache_misses(Context(tmp_path))} == {"the native driver does not build: error"}
