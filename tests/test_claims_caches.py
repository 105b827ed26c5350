"""Rows on cache misses: from counts they are what arithmetic says, and where nothing was counted they say why."""

from __future__ import annotations

import json
import shutil

import pytest

from inception_fast.claims import caches, figures, nets
from inception_fast.claims.context import Context
from inception_fast.measure import counters
from inception_fast.measure.cache import Layer, Misses


def fake(layer: Layer) -> Misses:
    """A machine on which a pair misses twice as often as a square kernel, and its fused form half as often as it."""
    l1 = {"conv": 1000.0, "separate": 2000.0, "pair": 2000.0, "fused": 1000.0}[layer.kind] * layer.n * layer.h * layer.w
    return Misses(accesses=1e7, l1=l1, last=l1 / 100 if layer.kind != "conv" else 0.0)


@pytest.fixture
def rows(tmp_path, monkeypatch) -> dict:
    monkeypatch.setattr(caches, "_driver", lambda context: tmp_path)
    monkeypatch.setattr(caches, "measure", lambda driver, layer, sizes: fake(layer))
    monkeypatch.setattr(counters, "count", lambda command: {})
    monkeypatch.setattr(counters, "measure", lambda driver, layer: fake(layer))
    return {row.id: row for row in caches.cache_misses(Context(tmp_path))}


def test_ratios_and_verdicts(rows):
    for n in nets.PAIR_SIZES:
        row = rows[f"asymmetric_{n}_l1_misses"]
        assert (row.measured, row.verdict) == (2.0, "confirmed") and "the model says" in row.note
        fused = rows[f"fused_pair_{n}_l1_misses"]
        assert (fused.measured, fused.verdict) == (0.5, "confirmed")
        assert rows[f"asymmetric_{n}_l1_rate"].measured == 2.0
        grown = rows[f"asymmetric_{n}_ll_misses"]  # none before: a ratio to one miss, not to nothing
        assert (grown.measured, grown.verdict) == (17 * 17 * 20.0, "confirmed")
        counted = rows[f"asymmetric_{n}_l1_counters"]
        assert (counted.measured, counted.verdict) == (2.0, "confirmed") and "model" not in counted.note
    for level in ("l1", "l2", "last"):
        assert (rows[f"fusing_over_map_size_{level}"].measured, rows[f"fusing_over_map_size_{level}"].verdict) == (
            0.5,
            "confirmed",
        )


def verdict_of(tmp_path, monkeypatch, counts: dict[str, float], **fields) -> object:
    """The verdict on the misses in L1 of 3x3 where each kind of layer misses as often as given."""
    monkeypatch.setattr(caches, "_driver", lambda context: tmp_path)
    monkeypatch.setattr(caches, "measure", lambda driver, layer, sizes: Misses(1e6, counts[layer.kind], 0.0))
    found = {row.id: row for row in caches.cache_misses(Context(tmp_path))}
    assert found["asymmetric_3_ll_misses"].verdict == "not measured"
    assert "this level holds all" in found["asymmetric_3_ll_misses"].note
    return found["asymmetric_3_l1_misses"].verdict, found["fused_pair_3_l1_misses"].verdict


@pytest.mark.parametrize(
    "square, pair, fused, verdicts",
    [
        (1000, 1200, 900, ("confirmed", "confirmed")),
        (1000, 800, 900, ("refuted", "refuted")),
        (1000, 1005, 1010, ("not established", "not established")),
    ],
)
def test_a_difference_of_a_hundredth_is_none(tmp_path, monkeypatch, square, pair, fused, verdicts):
    counts = {"conv": square, "separate": pair, "pair": pair, "fused": fused}
    assert verdict_of(tmp_path, monkeypatch, counts) == verdicts


def test_the_sweep_crosses_every_level_and_is_drawn(rows, tmp_path):
    row = rows["fusing_over_map_size_last"]
    points = row.details["points"]
    for level in ("l1", "l2", "last"):
        for kind in caches.SWEPT:
            sizes = [point["bytes"] for point in points if point["kind"] == kind]
            assert len(sizes) == len(caches.SWEEP_SIDES) and max(sizes) > row.details[level]
        assert min(p["bytes"] for p in points) < row.details[level]
        assert {p[f"model_{level}"] > 0 for p in points} == {True, False}
    pytest.importorskip("matplotlib")
    assert list(figures.draw(list(rows.values()), tmp_path)) == ["caches.png"]


def test_simulations_of_the_same_program_are_made_once(tmp_path, monkeypatch):
    """With --resume a run asks for what the one before has not left; another program or no --resume, for all."""
    driver, asked = tmp_path / "driver", []

    def measure(driver, layer, sizes):
        asked.append((layer, sizes))
        return fake(layer)

    def run(resume: bool) -> int:
        asked.clear()
        caches.cache_misses(Context(tmp_path, resume=resume))
        return len(set(asked))

    driver.write_bytes(b"one")
    monkeypatch.setattr(caches, "_driver", lambda context: driver)
    monkeypatch.setattr(caches, "measure", measure)
    assert (run(True), run(True), run(False)) == (76, 0, 76)
    kept = tmp_path / "parts" / "simulations.json"
    document = json.loads(kept.read_text())
    for name in list(document["value"])[20:]:
        del document["value"][name]
    kept.write_text(json.dumps(document))
    assert (run(True), run(True)) == (56, 0)
    driver.write_bytes(b"two")
    assert run(True) == 76


def test_counters_are_read_or_their_absence_is_told():
    text = "100,,L1-dcache-loads:u,1,100.00,,\n7,,L1-dcache-load-misses:u,1,100.00,,\n3,,LLC-load-misses,1,50.00,,\n"
    assert list(counters.parse_perf(text).values()) == [100, 7, 3]
    for line, said in (
        ("<not supported>,,LLC-load-misses,0,100.00,,", "perf says <not supported> of LLC-load-misses"),
        ("No permission to enable LLC-load-misses event.", "perf counted no LLC-load-misses: 100,,L1"),
    ):
        with pytest.raises(RuntimeError, match=said):
            counters.parse_perf(text.replace("3,,LLC-load-misses,1,50.00,,", line))


def test_counters_are_the_difference_of_two_runs(monkeypatch, tmp_path):
    def count(command):
        repeats = int(next(word for word in command if word.startswith("repeats="))[8:])
        return {event: 5000 + repeats * per_call for event, per_call in zip(counters.EVENTS, (90, 8, 0), strict=True)}

    monkeypatch.setattr(counters, "count", count)
    assert counters.measure(tmp_path, caches.square(3)) == Misses(90, 8, 0)


def test_a_machine_without_perf_says_so(tmp_path, monkeypatch):
    monkeypatch.setattr(caches, "_driver", lambda context: tmp_path)
    monkeypatch.setattr(caches, "measure", lambda driver, layer, sizes: fake(layer))
    monkeypatch.setattr(shutil, "which", lambda name: None)
    found = {row.id: row for row in caches.cache_misses(Context(tmp_path))}
    assert found["asymmetric_5_l1_misses"].verdict == "confirmed"
    row = found["asymmetric_5_l1_counters"]
    assert (row.measured, row.verdict) == (None, "not measured")
    assert row.note == "perf is not installed; install the system's package linux-perf or linux-tools"


@pytest.mark.parametrize("quick, reason", [(False, "valgrind is not installed"), (True, "valgrind is not installed")])
def test_without_valgrind_nothing_is_counted(tmp_path, monkeypatch, quick, reason):
    monkeypatch.setattr(shutil, "which", lambda name: None)
    rows = caches.cache_misses(Context(tmp_path, quick=quick))
    assert len(rows) == 18
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


def test_a_failed_simulation_is_a_reason_and_leaves_nothing_running(tmp_path, monkeypatch):
    def broken(driver, layer, sizes):
        raise RuntimeError("cachegrind on layer:\n  killed")

    monkeypatch.setattr(caches, "_driver", lambda context: tmp_path)
    monkeypatch.setattr(caches, "measure", broken)
    assert {row.note for row in caches.cache_misses(Context(tmp_path))} == {"cachegrind on layer: killed"}
