"""The drift of layer inputs: exact on distributions that are known, resumable, and without effect on the curve."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from inception_fast.cli import main
from inception_fast.train.data import load_data
from inception_fast.train.distributed import World
from inception_fast.train.drift import NAME, Probe, describe, distance, movements, read_drift
from inception_fast.train.loop import Options, train
from inception_fast.train.trainer import Trainer
from training import curve, folder_of_classes, tiny

QUIET = Options(eval_images=0, export=False, checkpoint_every=2)


def test_distance_of_known_distributions() -> None:
    """Two channels, deviation 1 in each; their means move by 3 and by 4 deviations."""
    x = torch.tensor([[[-1.0, 1.0], [9.0, 11.0]]])  # [1, 2, 2]
    before = describe(x)
    assert before == {"quantiles": [-1.0, 9.0, 11.0], "means": [0.0, 10.0], "deviation": 1.0}
    after = describe(x + torch.tensor([[3.0], [-4.0]]))
    assert distance(before, after) == pytest.approx(math.sqrt((9 + 16) / 2))
    assert distance(before, before) == 0.0
    assert distance(describe(x * 5), describe(x * 5 + 5)) == pytest.approx(1.0)  # in units of the spread
    assert distance(describe(torch.full_like(x, math.inf)), after) is None
    assert distance(describe(torch.zeros_like(x)), after) is None  # no spread to measure by
    rows = [{"step": 0, "layers": {"a": before}}, {"step": 5, "layers": {"a": after}}]
    assert movements(rows) == [{"step": 5, "layer": "a", "drift": distance(before, after)}]


def test_every_layer_is_looked_at_and_the_curve_stays(tmp_path: Path) -> None:
    train(tiny(), tmp_path / "plain", QUIET)
    summary = train(tiny(), tmp_path / "watched", replace(QUIET, drift_every=3))
    assert NAME in summary["files"]
    assert curve(tmp_path / "plain") == curve(tmp_path / "watched")
    rows = read_drift(tmp_path / "watched")
    assert [row["step"] for row in rows] == [0, 3, 6]
    assert not (tmp_path / "plain" / NAME).exists()
    layers = rows[0]["layers"]
    assert next(iter(layers)) == "stem.conv" and list(layers)[-1] == "fc" and len(layers) == 18
    # The images are the same each time: their distribution cannot move, that of a trained layer must.
    moved = {(m["step"], m["layer"]): m["drift"] for m in movements(rows)}
    assert moved[3, "stem.conv"] == 0 and moved[3, "fc"] > 0


def test_a_resumed_run_has_the_same_drift(tmp_path: Path) -> None:
    watched = replace(QUIET, drift_every=1)
    train(tiny(), tmp_path / "whole", watched)
    recipe = replace(tiny().recipe)
    train(tiny(steps=4, recipe=recipe), tmp_path / "cut", watched)
    train(tiny(recipe=recipe), tmp_path / "cut", replace(watched, resume=True))
    assert read_drift(tmp_path / "cut") == read_drift(tmp_path / "whole")


def test_several_processes_are_refused() -> None:
    data = load_data("digits")
    trainer = Trainer(tiny(), data, World())
    trainer.world = World(0, 2)
    with pytest.raises(ValueError, match="drift of 2 processes; allowed: one"):
        Probe(trainer, data)


def test_a_refusal_leaves_the_folder_free(tmp_path: Path) -> None:
    data = folder_of_classes(tmp_path / "data", count=3)
    with pytest.raises(ValueError, match="drift needs held-out images"):
        train(tiny(2, data=str(data)), tmp_path / "out", replace(QUIET, drift_every=1))
    assert not (tmp_path / "out").exists()


def test_the_experiment_reports_it(tmp_path: Path) -> None:
    flags = "--steps 20 --batch-size 8 --seeds 1 --eval-images 0 --threads 1".split()
    assert main(["compare", "--experiment", "covariate_shift", "--out", str(tmp_path), *flags]) == 0
    document = json.loads((tmp_path / "compare.json").read_text())
    assert {row["step"] for row in document["drift"]} == {10, 20}
    assert {row["model"] for row in document["drift"]} == set(document["variants"])
    assert "Drift of each layer&#x27;s input" in (tmp_path / "index.html").read_text()
