"""The study of cache misses: what is read from cachegrind, what is computed from it, what the model says."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from inception_fast.measure import cache
from inception_fast.measure.driver import build_driver

# The head and the end of a file that valgrind 3.19 wrote for a 1x1 convolution.
RECORDED = """desc: I1 cache:         32768 B, 64 B, 8-way associative
desc: D1 cache:         32768 B, 64 B, 8-way associative
desc: LL cache:         1048576 B, 64 B, 16-way associative
cmd: native_driver layer tier=avx2
events: Ir I1mr ILmr Dr D1mr DLmr Dw D1mw DLmw
fl=???
fn=(below main)
0 1 0 0 0 0 0 1 0 0
summary: 3000 20 10 700 60 30 300 40 20
"""
PAIR = cache.Layer("pair", 17, 17, 64, 64, 7, 7, mid=64)


def test_totals_are_read_by_the_names_of_their_events() -> None:
    found = cache.parse_cachegrind(RECORDED)
    assert (found["Ir"], found["D1mr"], found["DLmw"]) == (3000, 60, 20)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (RECORDED[: RECORDED.index("summary")], "no whole cachegrind file"),
        (RECORDED.replace("summary: 3000", "summary:"), "no whole cachegrind file"),
        ("events: Ir\nsummary: 3\n", "counted no Dr, D1mr"),
    ],
)
def test_a_file_that_does_not_hold_the_counts_is_refused(text: str, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        cache.parse_cachegrind(text)


def test_a_call_costs_what_two_more_calls_cost_halved() -> None:
    few = dict.fromkeys(cache.COUNTS, 100)
    many = few | {"Dr": 500, "Dw": 300, "D1mr": 140, "D1mw": 120, "DLmr": 104}
    assert cache.per_call(few, many, 2) == cache.Misses(300, 30, 2)
    assert cache.per_call(few, few | {"D1mr": 99}, 1).l1 == 0
    with pytest.raises(ValueError, match="0 calls"):
        cache.per_call(few, many, 0)


def test_without_valgrind_the_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "which", lambda name: None)
    with pytest.raises(FileNotFoundError, match="system's package valgrind"):
        cache.simulate(Path("driver"), PAIR, cache.Caches(), 1)


def test_a_folder_without_the_driver_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no checkout"):
        build_driver(tmp_path, tmp_path / "build")


def test_the_model_falls_with_the_cache_and_grows_with_the_work() -> None:
    sizes = [1 << exponent for exponent in range(12, 25)]
    misses = [cache.modelled_misses(PAIR, size) for size in sizes]
    assert misses == sorted(misses, reverse=True) and misses[0] > misses[-1] == 0
    wider = cache.Layer("pair", 17, 17, 128, 64, 7, 7, mid=64)
    assert cache.modelled_misses(wider, 1 << 15) > cache.modelled_misses(PAIR, 1 << 15)


def test_separate_layers_are_counted_one_by_one_and_added(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []

    def simulate(driver, layer, caches, repeats, tier):
        seen.append((layer.kind, layer.kh, layer.kw, layer.c, layer.oc, repeats))
        return dict.fromkeys(cache.COUNTS, repeats * layer.kw)

    monkeypatch.setattr(cache, "simulate", simulate)
    apart = cache.Layer("separate", 17, 17, 64, 48, 7, 7, mid=32)
    assert cache.measure(Path("driver"), apart, cache.Caches()) == cache.Misses(16, 16, 16)
    first, second = ("conv", 1, 7, 64, 32), ("conv", 7, 1, 32, 48)
    assert seen == [(*first, 1), (*first, 2), (*second, 1), (*second, 2)]


def test_the_model_knows_the_three_forms_of_a_pair() -> None:
    """By hand: four images of 8x8x16 and two kernels of 3 taps; maps of 16 KiB, an image's of 4 KiB, weights 3 KiB."""
    forms = {kind: cache.Layer(kind, 8, 8, 16, 16, 3, 3, mid=16, n=4) for kind in ("separate", "pair", "fused")}
    assert {kind: form.bytes() >> 10 for kind, form in forms.items()} == {"separate": 54, "pair": 54, "fused": 42}
    assert [cache.modelled_misses(form, 60 << 10) for form in forms.values()] == [0, 0, 0]
    # 48 KiB hold a convolution, or the fused pair; what the pair in sequence left of the map between has stayed.
    assert [cache.modelled_misses(form, 48 << 10) for form in forms.values()] == [0, 1120 - 256, 0]
    # 36 KiB: each convolution by itself still fits, the pair does not, the fused pair streams input and output.
    assert [cache.modelled_misses(form, 36 << 10) for form in forms.values()] == [0, 1120 - 256, 512]
    assert cache.modelled_misses(forms["separate"], 30 << 10) > 0
