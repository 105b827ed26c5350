"""Comparisons: the same budget for all, finished runs kept, one page that opens alone."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from unittest.mock import Mock
from xml.etree import ElementTree

import pytest
import torch

from checkout import ROOT
from inception_fast.cli import main
from inception_fast.cli.train import parse_options
from inception_fast.measure.flops import layers, totals
from inception_fast.train.charts import Line, chart, number, smooth, ticks
from inception_fast.train.comparison import Variant, compare, parse_variant, run_folder
from inception_fast.train.experiments import EXPERIMENTS, get_experiment
from inception_fast.train.loop import Options
from inception_fast.train.networks import TinyInception, build
from inception_fast.train.page import spread
from inception_fast.train.recipe import get_recipe
from training import folder_of_classes, photo, tiny

PLAIN, OTHER = "tiny_inception", "tiny_inception:width=8"
ARGUMENTS = f"compare --models {PLAIN},{OTHER} --data digits --steps 3 --batch-size 8 --image-size 16 --seeds 2".split()
QUICK = Options(eval_images=0)


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    torch.set_num_threads(1)
    yield


class Links(HTMLParser):
    """Everything a page would load from elsewhere."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found += [f"{tag} {key}" for key, _ in attrs if key in ("src", "href", "srcset", "data")]


def test_compare_writes_rows_and_a_page_that_opens_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*ARGUMENTS, "--out", str(tmp_path), "--json"]) == 0
    document = json.loads((tmp_path / "compare.json").read_text())
    assert json.loads(capsys.readouterr().out) == document
    rows = document["rows"]
    expected = {(model, seed, step) for model in (PLAIN, OTHER) for seed in (0, 1) for step in (1, 2, 3)}
    assert {(row["model"], row["seed"], row["step"]) for row in rows} == expected and len(rows) == len(expected)
    assert all({"loss", "accuracy", "seconds", "flops"} <= row.keys() for row in rows)
    macs, _ = totals(layers(TinyInception(10, width=8), torch.empty(1, 3, 16, 16)))
    assert [row["flops"] for row in rows if (row["model"], row["seed"]) == (OTHER, 0)] == [
        48 * macs * i for i in (1, 2, 3)
    ]
    assert document["provenance"]["command"].startswith("inception-fast compare")
    assert [run["status"] for run in document["runs"]] == ["done"] * 4
    page = (tmp_path / "index.html").read_text()
    links = Links()
    links.feed(page)
    assert not links.found and "@import" not in page and "url(" not in page
    assert page.count("<polyline") == 12 and page.count("<polygon") == 12  # six charts, two variants, a band each
    for svg in re.findall(r"<svg.*?</svg>", page):
        ElementTree.fromstring(svg)
    assert not list(tmp_path.rglob("checkpoint-*"))


def test_every_variant_sees_the_same(tmp_path: Path) -> None:
    """Two variants that are the same network have the same curve, and two seeds have not."""
    twins = [Variant("a", PLAIN), Variant("b", PLAIN)]
    rows = compare(twins, tiny(3), 2, tmp_path, QUICK)["rows"]
    losses = {(m, s): [r["loss"] for r in rows if (r["model"], r["seed"]) == (m, s)] for m in "ab" for s in (0, 1)}
    assert losses["a", 0] == losses["b", 0] != losses["a", 1] == losses["b", 1]


def test_finished_runs_are_kept_and_a_broken_one_goes_on(tmp_path: Path) -> None:
    variants, base = [Variant("a", PLAIN), Variant("b", PLAIN, {"width": 8})], tiny(4)
    control = Options(checkpoint_every=2, eval_images=0)
    expected = compare(variants, base, 1, tmp_path / "whole", control)

    def die(row: dict[str, object], name: str) -> None:
        if name == "b seed 0" and row["step"] == 3:
            raise RuntimeError("power cut")

    with pytest.raises(RuntimeError, match="power cut"):
        compare(variants, base, 1, tmp_path / "cut", control, on_row=die)
    partial = json.loads((tmp_path / "cut" / "compare.json").read_text())
    assert {row["model"] for row in partial["rows"]} == {"a"}
    said: list[str] = []
    found = compare(variants, base, 1, tmp_path / "cut", control, say=said.append)
    assert said == ["a seed 0: already done", "b seed 0: training", "resuming after step 2"]
    assert [row["loss"] for row in found["rows"]] == [row["loss"] for row in expected["rows"]]


def test_checkpoints_of_an_ended_run_are_neither_left_nor_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nor are those of one that was killed between its summary and their removal."""
    from inception_fast.train import comparison

    with monkeypatch.context() as killed:
        killed.setattr(comparison, "write_page", Mock(side_effect=KeyboardInterrupt))
        killed.setattr(comparison.Checkpoints, "steps", lambda self: [])
        with pytest.raises(KeyboardInterrupt):
            compare([Variant("a", PLAIN)], tiny(1), 1, tmp_path, QUICK)
    for variants in (["a"], ["a", "b"]):
        compare([Variant(label, PLAIN) for label in variants], tiny(1), 1, tmp_path, QUICK)
        for label in variants:
            folder = run_folder(tmp_path, label, 0)
            files = json.loads((folder / "summary.json").read_text())["files"]
            assert files == ["log.jsonl", "curves.svg"] and not list(folder.glob("checkpoint-*"))


def test_a_damaged_summary_is_named(tmp_path: Path) -> None:
    from inception_fast.train.comparison import _finished
    from inception_fast.train.settings import Settings

    for content in ("", "[]", "{}"):
        (tmp_path / "summary.json").write_text(content)
        with pytest.raises(
            ValueError, match=r"summary\.json is damaged .*; remove its folder to have it trained again"
        ):
            _finished(tmp_path, Settings(model="inception_v1", steps=1), ("", 0))


def test_runs_of_other_settings_are_not_mixed_in(tmp_path: Path) -> None:
    compare([Variant("a", PLAIN)], tiny(2), 1, tmp_path, QUICK)
    with pytest.raises(ValueError, match="holds a run with steps 2, not 3; name another"):
        compare([Variant("a", PLAIN)], tiny(3), 1, tmp_path, QUICK)


def test_runs_of_other_data_or_judged_otherwise_are_not_mixed_in(tmp_path: Path) -> None:
    root, out = folder_of_classes(tmp_path / "data"), tmp_path / "out"
    base = tiny(1, data=str(root))
    compare([Variant("a", PLAIN)], base, 1, out, Options(eval_images=2, workers=0))
    with pytest.raises(ValueError, match="holds a run with images judged: 2, not 1; name another --out"):
        compare([Variant("a", PLAIN), Variant("b", PLAIN)], base, 1, out, Options(eval_images=1, workers=0))
    photo(root / "cat" / "new.png", 9)
    with pytest.raises(ValueError, match=r"holds a run with other data, of fingerprint \w+, not \w+; name another"):
        compare([Variant("a", PLAIN), Variant("b", PLAIN)], base, 1, out, Options(eval_images=2, workers=0))
    assert [path.name for path in (out / "runs").iterdir()] == ["a-seed0"]


def test_every_variant_is_looked_at_before_one_is_trained(tmp_path: Path) -> None:
    for wrong, words in (({"depth": 0}, "depth 0; allowed"), ({"image_size": 8}, "8x8; allowed: 16x16")):
        fields = {"settings": wrong} if "image_size" in wrong else {"options": wrong}
        with pytest.raises(ValueError, match=words):
            compare([Variant("a", PLAIN), Variant("b", PLAIN, **fields)], tiny(2), 1, tmp_path / "out", QUICK)
    assert not (tmp_path / "out").exists()


def test_labels_have_folders_of_their_own(tmp_path: Path) -> None:
    names = {run_folder(tmp_path, label, 0).name for label in ("ä=1", "ö=1", "with BN, rate 0.1")}
    assert names == {"ä=1-seed0", "ö=1-seed0", "with_BN_rate_0.1-seed0"}
    with pytest.raises(ValueError, match="variants a/b, a:b with folders a_b-seed0, a_b-seed0; allowed: one for each"):
        compare([Variant("a/b", PLAIN), Variant("a:b", PLAIN)], tiny(1), 1, tmp_path, QUICK)


def test_a_variant_that_diverges_is_a_result(tmp_path: Path) -> None:
    wild = Variant("wild", PLAIN, {"norm": False}, recipe={"lr": 1e8})
    base = tiny(12, get_recipe("modern", clip=0.0, warmup=0.0))
    document = compare([wild, Variant("calm", PLAIN)], base, 1, tmp_path, Options(eval_images=10))
    ends = {run["model"]: run for run in document["runs"]}
    assert ends["wild"]["status"].startswith("diverged") and ends["calm"]["status"] == "done"
    assert "1 diverged" in (tmp_path / "index.html").read_text()
    said: list[str] = []
    compare([wild, Variant("calm", PLAIN)], base, 1, tmp_path, Options(eval_images=10), say=said.append)
    assert said == ["wild seed 0: already done", "calm seed 0: already done"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ("--models , --out OUT", "--models is empty"),
        ("--models tiny_inception:width --out OUT", "allowed: MODEL or MODEL:KEY=VALUE"),
        ("--models tiny_inception,tiny_inception --out OUT", "allowed: at least one, each once"),
        ("--models inception_v9 --out OUT", "inception_v9"),
        ("--experiment cold_fusion --out OUT", "experiment 'cold_fusion'; allowed: batchnorm_rate"),
        ("--experiment residual", "--out DIR is needed"),
        ("--experiment batchnorm_rate --lr 0.3 --out OUT", "--lr with --experiment batchnorm_rate, whose variants set"),
        ("--experiment batchnorm_scale --init-scale 2 --out OUT", "allowed: without --init-scale"),
        ("--models tiny_inception --data /nowhere --out OUT", "no such folder"),
        ("--models tiny_inception,nope --out OUT", "inception_v4, tiny_inception"),
        ("--models inception_v1:num_classes=0 --out OUT", "option num_classes=0; allowed: none, the data decides"),
        ("--models tiny_inception --device tpu --out OUT", "device 'tpu'; allowed: cpu, cuda"),
        ("--out OUT", "one of the arguments --models --experiment is required"),
    ],
)
def test_requests_that_cannot_be_served(
    tmp_path: Path, arguments: str, words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    given = ["compare", *arguments.replace("OUT", str(tmp_path / "out")).split()]
    assert main(given) == 2
    captured = capsys.readouterr()
    assert words in captured.err and "Traceback" not in captured.err and not captured.out


def test_variant_text() -> None:
    variant = parse_variant("inception_v2:stem=plain:drop_rate=0.5:classic=true")
    assert variant.model == "inception_v2"
    assert variant.options == {"stem": "plain", "drop_rate": 0.5, "classic": True}
    given = ["classic=False", "conv_block=None", "drop_rate=1e-1", "widths=Falsely"]
    assert parse_variant(":".join(["inception_v1", *given])).options == parse_options(given)
    assert parse_options(given) == {"classic": False, "conv_block": None, "drop_rate": 0.1, "widths": "Falsely"}


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_experiments_are_what_they_say(name: str) -> None:
    """Every variant has a network that can be made and settings of its own; none equals another."""
    experiment = get_experiment(name)
    seen = []
    for variant in experiment.variants:
        settings = variant.apply(experiment.settings(), 0)
        if variant.model == PLAIN:
            build(settings.model, 10, settings.options, None, False)
        seen.append(settings)
    assert all(a != b for i, a in enumerate(seen) for b in seen[:i])
    assert experiment.settings(steps=7).steps == 7 and experiment.claim and "arXiv" in experiment.source


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_every_experiment_runs(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """All variants to their end, with few steps on few images."""
    large = get_experiment(name).variants[0].model != PLAIN
    flags = [
        "--steps",
        "1" if large else "10",
        "--batch-size",
        "2" if large else "8",
        "--seeds",
        "1",
        "--eval-images",
        "0",
    ]
    assert main(["compare", "--experiment", name, "--out", str(tmp_path), *flags]) == 0
    output = capsys.readouterr()
    document = json.loads((tmp_path / "compare.json").read_text())
    assert [run["model"] for run in document["runs"]] == [v.label for v in get_experiment(name).variants], output.err
    assert ("drift" in document) == bool(get_experiment(name).drift_every)
    assert all(run["status"].startswith(("done", "diverged")) for run in document["runs"])


RESULTS = sorted((ROOT / "benchmarks" / "results").glob("*/*-training-*.json"))


@pytest.mark.parametrize("path", RESULTS, ids=lambda path: path.stem)
def test_experiments_take_the_minutes_they_state(path: Path) -> None:
    """By the committed results: those were of one thread, and more seeds."""
    document = json.loads(path.read_text())
    experiment = get_experiment(document["about"]["name"])
    runs = document["runs"]
    assert document["settings"]["steps"] == experiment.steps and len(runs) >= len(experiment.variants)
    own = len(experiment.variants) * experiment.seeds
    seconds = own * sum(run["seconds"] for run in runs) / len(runs)
    assert experiment.minutes - 1.5 < seconds / 60 <= experiment.minutes


def test_a_ready_experiment_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = "--steps 3 --batch-size 8 --seeds 1 --eval-images 10 --lr 0.05".split()
    assert main(["compare", "--experiment", "grid_reduction", "--out", str(tmp_path), *flags]) == 0
    assert "conv_pool" in capsys.readouterr().out
    document = json.loads((tmp_path / "compare.json").read_text())
    macs = {name: network["macs_per_image"] for name, network in document["networks"].items()}
    assert macs["parallel"] < macs["pool_conv"] < macs["conv_pool"]
    assert document["settings"]["recipe"]["lr"] == 0.05 and document["about"]["name"] == "grid_reduction"
    assert "halve the grid" in (tmp_path / "index.html").read_text()
    assert main(["compare", "--experiment", "list", "--json"]) == 0
    listed = {row["name"]: row["minutes"] for row in json.loads(capsys.readouterr().out)}
    assert listed == {name: experiment.minutes for name, experiment in EXPERIMENTS.items()}
    assert main(["compare", "--experiment", "list"]) == 0
    assert "residual_v4        9 min  Inception-ResNet-v2 trains faster" in capsys.readouterr().out


def test_a_change_to_adamw_brings_its_values(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A rate meant for SGD would make AdamW lose. What is given beside it counts."""
    variants = [{"optimizer": "adamw"}, {"optimizer": "adamw", "lr": 0.5}, {"optimizer": "sgd"}]
    recipes = [Variant("a", PLAIN, recipe=fields).apply(tiny(), 0).recipe for fields in variants]
    assert [(r.lr, r.weight_decay) for r in recipes] == [(1e-3, 0.05), (0.5, 0.05), (0.045, 4e-5)]
    adamw = tiny(recipe=get_recipe("paper", optimizer="adamw", lr=0.2))
    assert Variant("a", PLAIN, recipe={"optimizer": "adamw"}).apply(adamw, 0).recipe == adamw.recipe
    flags = "--optimizer adamw --steps 1 --batch-size 2 --seeds 1 --eval-images 0 --json".split()
    assert main(["compare", "--experiment", "residual", "--out", str(tmp_path), *flags]) == 0
    assert json.loads(capsys.readouterr().out)["settings"]["recipe"]["lr"] == 1e-3


def test_chart_survives_odd_values() -> None:
    gaps = Line("a < b", [0, 1, 2], [1.0, float("nan"), 3.0])
    svg = chart("t & t", "x", [gaps, Line("none", [], [])])
    ElementTree.fromstring(svg)
    assert "nan" not in svg and svg.count("<polyline") == 2
    ElementTree.fromstring(chart("t", "x", []))
    assert "no data" in chart("t", "x", [])
    ElementTree.fromstring(chart("t", "x", [Line("flat", [1], [2.0])]))
    ElementTree.fromstring(chart("t", "x", [Line("flat but for rounding", [1, 2], [0.957, math.nextafter(0.957, 0)])]))


def test_a_gap_in_a_line_stays_one() -> None:
    nan = float("nan")
    found = re.findall(r'<polyline points="(.*?)"', chart("t", "x", [Line("a", range(5), [1.0, 2.0, nan, 3.0, 4.0])]))
    assert [len(points.split()) for points in found] == [2, 2]


@pytest.mark.parametrize(("low", "high"), [(0, 1), (0.1, 0.93), (-3, 7), (5, 5), (0, 0), (1e9, 7e12), (0.01, 0.011)])
def test_ticks_enclose(low: float, high: float) -> None:
    found = ticks(low, high)
    assert found[0] <= low + 1e-9 and found[-1] >= high - 1e-9 and 2 <= len(found) <= 8


def test_small_parts() -> None:
    assert smooth([1, 2, 3, 4], 2) == [1, 1.5, 2.5, 3.5] and smooth([], 3) == []
    assert smooth([1, 1e18, 1, 2, 3, 4, 5], 3)[-3:] == [2, 3, 4]
    assert smooth([3, 1, 2], 9) == [3, 2, 2]
    assert [number(v) for v in (0.25, 1500, 2_500_000, 3e12)] == ["0.25", "1500", "2.5M", "3T"]
    assert spread([1.0, 2.0]) == "1.5 ± 0.5" and spread([0.5], percent=True) == "50.0 %" and spread([None]) == "-"
