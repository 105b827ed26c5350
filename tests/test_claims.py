"""The report of claims: what is counted is exact, what is timed is gated, what was not measured says so."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch
from PIL import Image

from inception_fast.claims import figures, nets, training
from inception_fast.claims.context import Context
from inception_fast.claims.factorising import macs, raced
from inception_fast.claims.page import number, page
from inception_fast.claims.race import Contestant, Race, RedGate, without
from inception_fast.claims.row import VERDICTS, Row, below, counted, higher, saved
from inception_fast.claims.study import run, studies
from inception_fast.cli import main
from inception_fast.engine import passes
from inception_fast.measure.timer import Flush, Plan, interleave

CONTRACT = {"id", "claim", "source", "stated", "measured", "unit", "command", "verdict"}


class Resources(HTMLParser):
    """What a page would load from elsewhere, and the pictures inside it."""

    def __init__(self) -> None:
        super().__init__()
        self.outside: list[str] = []
        self.inside = 0

    def handle_starttag(self, tag, attrs):
        for key, value in attrs:
            if key in ("src", "href", "srcset", "data"):
                if str(value).startswith("data:image/png;base64,"):
                    self.inside += 1
                else:
                    self.outside.append(f"{tag} {value}")


@pytest.fixture(scope="module")
def report(tmp_path_factory) -> Path:
    """A quick report by the command line, once for all tests here."""
    pytest.importorskip("matplotlib")
    folder = tmp_path_factory.mktemp("claims")
    assert main(["claims", "--quick", "--threads", "1", "--out", str(folder)]) == 0
    return folder


@pytest.fixture(scope="module")
def rows(report) -> dict:
    return {row["id"]: row for row in json.loads((report / "claims.json").read_text())["rows"]}


def test_the_rows_are_as_promised(report, rows):
    document = json.loads((report / "claims.json").read_text())
    assert document["quick"] and {"machine", "commit", "date", "command", "caches"} <= document["provenance"].keys()
    assert len(rows) == len(document["rows"]) > 50
    for row in rows.values():
        assert row.keys() >= CONTRACT and row["verdict"] in VERDICTS
        assert row["command"].startswith("inception-fast ")
        assert (row["measured"] is None) <= (row["verdict"] in ("not measured", "published", "not established"))
        assert row["measured"] is not None or row["verdict"] == "published" or row["note"], "the reason is missing"


@pytest.mark.parametrize(
    "name, figure",
    [("two_3x3_for_5x5", 28), ("asymmetric_3", 100 / 3), ("asymmetric_5", 60), ("asymmetric_7", 500 / 7)],
)
def test_counts_are_exact(rows, name, figure):
    assert rows[f"{name}_macs"]["measured"] == pytest.approx(figure, rel=1e-12)
    assert rows[f"{name}_macs"]["verdict"] == "confirmed"
    assert rows[f"{name}_time"]["details"]["times"]["after"]["rounds"] >= 3


def test_findings_that_no_machine_changes(rows):
    assert rows["reduction_conv_pool_macs"]["measured"] == pytest.approx(35**2 / 17**2)
    assert rows["reduction_parallel_macs"]["measured"] == 2
    assert rows["reduction_pool_conv_bottleneck"]["measured"] == 17 * 17 * 320
    assert rows["reduction_parallel_bottleneck"]["measured"] == 17 * 17 * 640
    assert rows["merge_siblings_bits"]["measured"] == 0
    assert rows["convolutions_inception_v3"]["measured"] == 66
    assert rows["v3_macs"]["measured"] == pytest.approx(5.713216096)
    published = [row for row in rows.values() if row["verdict"] == "published"]
    assert len(published) == 15 and all(row["measured"] is None for row in published)
    assert rows["inception_v4_slim_top1"]["stated"] == 80.2


def test_a_tiny_training_proves_nothing(rows):
    trained = [row for row in rows.values() if row["command"].startswith("inception-fast compare")]
    assert len(trained) == 9
    assert {row["verdict"] for row in trained} == {"not established", "not measured"}


def test_the_page_opens_alone(report):
    text = (report / "index.html").read_text()
    resources = Resources()
    resources.feed(text)
    assert not resources.outside and "<script" not in text and "@import" not in text
    plots = json.loads((report / "claims.json").read_text())["plots"]
    assert resources.inside == len(plots) >= 5
    for name in plots:
        with Image.open(report / name) as picture:
            picture.load()
            assert picture.format == "PNG" and min(picture.size) >= 200
    for study in studies():
        assert f'<h2 id="{study}">' in text


def test_only_some_studies_as_json(tmp_path, capsys):
    assert main(["claims", "--only", "networks,published", "--out", str(tmp_path), "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document == json.loads((tmp_path / "claims.json").read_text())
    assert {row["command"].split()[-1] for row in document["rows"]} == {"networks", "published"}


@pytest.mark.parametrize(
    "arguments, said",
    [
        (["--only", "nothing"], "--only 'nothing' is not known; allowed: factorising, "),
        (
            ["--only", "networks", "--training", "x"],
            "--training with --only networks; allowed: with the study training",
        ),
        (["--training", "absent"], "is no result of 'inception-fast compare --experiment'"),
        (["--training", "."], "holds no result of 'inception-fast compare --experiment'"),
    ],
)
def test_wrong_requests_get_one_line(tmp_path, capsys, arguments, said):
    assert main(["claims", "--out", str(tmp_path / "out"), *arguments]) == 2
    err = capsys.readouterr().err
    assert said in err and len(err.splitlines()) == 1 and not (tmp_path / "out").exists()


def comparison(name: str, accuracies: dict[str, list[float]], losses: dict[str, list[float]] | None = None) -> dict:
    """What `compare` writes of an experiment, with the ends and the losses given."""
    runs = [
        {"model": label, "seed": seed, "status": "done", "accuracy": a, "held_out_accuracy": a}
        for label, seeds in accuracies.items()
        for seed, a in enumerate(seeds)
    ]
    rows = [
        {"model": label, "seed": seed, "step": i, "loss": loss}
        for label, curve in (losses or {}).items()
        for seed in range(len(accuracies[label]))
        for i, loss in enumerate(curve, 1)
    ]
    settings = {"steps": 4, "batch_size": 8, "data": "digits"}
    return {"about": {"name": name}, "settings": settings, "variants": list(accuracies), "runs": runs, "rows": rows}


def judged(tmp_path: Path, document: dict) -> dict[str, Row]:
    (tmp_path / "compare.json").write_text(json.dumps(document))
    ((name, read),) = training.read_comparisons(tmp_path).items()
    context = Context(tmp_path, quick=True, trained={name: read})
    return {
        row.id: row for row in (judge(context, training.EXPERIMENTS[name], read) for judge in training.JUDGES[name])
    }


@pytest.mark.parametrize(
    "plain, smooth, verdict, measured",
    [
        ([0.900, 0.901] * 3, [0.903, 0.902] * 3, "confirmed", 0.2),
        ([0.90, 0.91] * 3, [0.95, 0.96] * 3, "differs", 5.0),
        ([0.95, 0.96] * 3, [0.90, 0.91] * 3, "refuted", -5.0),
        ([0.90, 0.95] * 3, [0.93, 0.94] * 3, "not established", 1.0),
        ([0.90] * 5, [0.99] * 5, "not established", 9.0),  # five seeds cannot tell
    ],
)
def test_a_given_comparison_is_judged(tmp_path, plain, smooth, verdict, measured):
    row = judged(tmp_path, comparison("label_smoothing", {"smoothing 0": plain, "smoothing 0.1": smooth}))
    assert row["label_smoothing"].verdict == verdict
    assert row["label_smoothing"].measured == pytest.approx(measured)


ENDS = {"residual": [0.9] * 6, "plain": [0.9] * 6}


def test_steps_to_a_loss_that_both_reach(tmp_path):
    curves = {"residual": [4.0, 1.0, 0.5, 0.2], "plain": [4.0, 3.0, 2.0, 1.0]}
    row = judged(tmp_path, comparison("residual", ENDS, curves))["residual"]
    assert (row.measured, row.verdict) == (2.0, "confirmed")
    slower = {"residual": curves["plain"], "plain": curves["residual"]}
    row = judged(tmp_path, comparison("residual", ENDS, slower))["residual"]
    assert (row.measured, row.verdict) == (0.5, "refuted")


def noisy(seed: object, offset: float = 0.0) -> list[float]:
    """A loss that falls to a plateau, which noise crosses up and down; lower by `offset` from the start."""
    rng = random.Random(str(seed))
    return [max(0.5, 2.3 * 0.9**step) - offset + rng.gauss(0, 0.05) for step in range(100)]


def steps_document(residual: Sequence[list[float]], plain: Sequence[list[float]]) -> dict:
    document = comparison("residual", ENDS)
    document["settings"]["steps"] = 100
    document["rows"] = [
        {"model": label, "seed": seed, "step": step, "loss": loss}
        for label, curves in (("residual", residual), ("plain", plain))
        for seed, curve in enumerate(curves)
        for step, loss in enumerate(curve, 1)
    ]
    return document


def test_steps_saved_by_nothing_are_not_confirmed():
    """Of like trainings at most 5 in 100 are told apart, and one is as often called the faster as the other."""
    verdicts = []
    for trial in range(60):
        sides = [[noisy((trial, side, seed)) for seed in range(6)] for side in "ab"]
        verdicts.append(training.steps_saved(steps_document(*sides), ["residual"], ["plain"]).verdict)
    assert sum(verdict != "not established" for verdict in verdicts) <= 0.05 * 60 + 4  # two deviations
    twins = steps_document(sides[0], sides[0])
    found = training.steps_saved(twins, ["residual"], ["plain"])
    assert (found.measured, found.verdict) == (1.0, "not established")


def test_steps_saved_with_the_sides_exchanged_are_steps_lost():
    document = steps_document([noisy(("a", s), 0.3) for s in range(6)], [noisy(("b", s)) for s in range(6)])
    found = training.steps_saved(document, ["residual"], ["plain"])
    other = training.steps_saved(document, ["plain"], ["residual"])
    assert (found.verdict, other.verdict) == ("confirmed", "refuted")
    assert found.measured == pytest.approx(1 / other.measured) and found.measured > 1


def test_a_spike_of_the_loss_is_forgotten(tmp_path):
    """One that ends higher is the slower, whatever rounding a loss of 1e18 left in a running sum."""
    slower = [[1e18 if step == 2 else loss for step, loss in enumerate(noisy(s))] for s in range(6)]
    document = steps_document(slower, [noisy(s, 0.3) for s in range(6)])
    assert training.steps_saved(document, ["residual"], ["plain"]).verdict == "refuted"


def watched(with_norm: list[float | None], without: list[float | None]) -> dict:
    """What `compare --experiment covariate_shift` writes, with each seed's drift given; two layers and looks each."""
    labels = {f"{kind} BN, rate {rate}": kind for kind in ("with", "without") for rate in ("0.02", "0.1")}
    document = comparison("covariate_shift", {label: [0.9] * len(without) for label in labels})
    document["drift"] = [
        {"model": label, "seed": seed, "step": step, "layer": layer, "drift": None if drift is None else factor * drift}
        for label, kind in labels.items()
        for seed, drift in enumerate(with_norm if kind == "with" else without)
        for step in (10, 20)
        for layer, factor in (("stem", 0.5), ("fc", 1.5))
    ]
    return document


@pytest.mark.parametrize(
    "with_norm, without, verdict, measured",
    [
        ([0.1, 0.2] * 3, [0.4, 0.5] * 3, "confirmed", 3.0),
        ([0.4, 0.5] * 3, [0.1, 0.2] * 3, "refuted", 1 / 3),
        ([0.1, 0.3] * 3, [0.2, 0.2] * 3, "not established", 1.0),
        ([0.1] * 5, [0.9] * 5, "not established", 9.0),  # five seeds cannot tell
        ([0.1] * 6, [0.9] * 5 + [None], "not established", None),  # one without a number proves nothing
    ],
)
def test_drift_is_judged_both_ways(tmp_path, with_norm, without, verdict, measured):
    row = judged(tmp_path, watched(with_norm, without))["covariate_shift"]
    assert row.verdict == verdict and row.unit == "times the drift with batch norm"
    assert row.measured == (None if measured is None else pytest.approx(measured))


def test_drift_that_was_not_watched_is_not_judged(tmp_path):
    document = watched([0.1] * 6, [0.9] * 6)
    del document["drift"]
    row = judged(tmp_path, document)["covariate_shift"]
    assert (row.verdict, row.measured) == ("not established", None) and "not watched" in row.note


def test_a_comparison_that_was_cut_short_is_refused(tmp_path, capsys):
    document = comparison("residual", ENDS)
    document["runs"] = [run for run in document["runs"] if (run["model"], run["seed"]) != ("plain", 5)]
    (tmp_path / "compare.json").write_text(json.dumps(document))
    assert main(["claims", "--only", "training", "--training", str(tmp_path), "--out", str(tmp_path / "out")]) == 2
    assert "has no run of 'plain' with seed 5, which others have: it was cut short" in capsys.readouterr().err


def test_trainings_of_an_earlier_report_are_not_taken_for_this_one(tmp_path, monkeypatch):
    """Without --resume, or under other conditions, everything is trained again."""
    seen = []

    def compare(variants, settings, seeds, folder, options, *, about):
        seen.append((folder / "old").exists())
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "old").touch()

    monkeypatch.setattr(training, "compare", compare)
    for resume, commit in ((False, "a"), (True, "a"), (True, "b"), (True, "b"), (False, "b")):
        context = Context(tmp_path, True, resume=resume, conditions={"commit": commit})
        training._run(training.EXPERIMENTS["residual"], context)
    assert seen == [False, True, False, True, False]


def test_a_comparison_of_something_else_is_refused(tmp_path):
    with pytest.raises(ValueError, match="is of experiment 'mine'; allowed: batchnorm_rate, "):
        judged(tmp_path, comparison("mine", {}))


def test_verdicts():
    assert counted(28.0, 28) == counted(30.0, 28) == counted(5.0, None) == "confirmed"
    assert (counted(40.0, 28), counted(-28.0, 28)) == ("differs", "refuted")
    assert (saved(25, 28, True), saved(10, 28, True), saved(-3, 28, True)) == ("confirmed", "differs", "refuted")
    assert (below(23.8, 25), below(26, 25), below(25, 25)) == ("confirmed", "refuted", "refuted")
    assert saved(90, 28, False) == higher([1.0], [0.0]) == higher([], []) == "not established"
    six, five = [float(x) for x in range(6)], [float(x) for x in range(5)]
    assert higher([x + 1 for x in six], six) == "confirmed" and higher(six, [x + 1 for x in six]) == "refuted"
    assert higher([x + 1 for x in five], five) == higher(six, six) == "not established"


def test_two_ways_to_train_that_are_alike_are_called_so():
    """Of 400 pairs of six or ten like trainings at most 5 in 100 are told apart; a seed is good or bad for both."""
    rng = random.Random(0)
    for seeds in (6, 10):
        days = [[rng.gauss(0.9, 0.05) for _ in range(seeds)] for _ in range(400)]
        told = [higher([d + rng.gauss(0, 0.01) for d in day], [d + rng.gauss(0, 0.01) for d in day]) for day in days]
        assert sum(verdict != "not established" for verdict in told) <= 0.05 * 400 + 8  # two deviations


def test_many_seeds_are_judged_in_no_time():
    """Where all ways to set the signs are too many to try, the same sample of them gives the same verdict."""
    rng = random.Random(0)
    noise = [rng.gauss(0, 1) for _ in range(100)]
    assert higher([x + 0.4 for x in noise], [0.0] * 100) == "confirmed"
    assert higher([x - 0.4 for x in noise], [0.0] * 100) == "refuted"
    assert higher(noise, [0.0] * 100) == "not established"


def test_verdicts_have_names():
    with pytest.raises(ValueError, match="verdict 'surely'; allowed: confirmed"):
        Row("a", "b", "c", None, None, "d", "e", "surely")


def test_a_race_sees_a_difference_and_none_where_there_is_none():
    wave = [1.0, 1.02, 0.98, 1.01, 0.99] * 4
    found = Race({"a": wave, "same": wave[::-1], "half": [x / 2 for x in wave]})
    assert found.saving("half", "a") == pytest.approx(50) and found.established("half", "a")
    assert found.saving("a", "half") == pytest.approx(-100) and found.established("a", "half")
    assert not found.established("same", "a")


def test_nothing_wrong_is_timed(tmp_path, monkeypatch):
    x = nets.images(8, 5, 5)
    good = Contestant(nets.settled(nets.square(3, 8)))
    with torch.inference_mode():
        good.ready(x)
        monkeypatch.setattr("inception_fast.claims.race.optimize", lambda module, x: lambda x: module(x) + 1)
        with pytest.raises(RedGate, match="not timed"):
            good.ready(x)
    context = Context(tmp_path, quick=True)
    (row,) = raced(context, "factorising", "broken", "it is right", "nobody", 28, x, good, good)
    assert (row.measured, row.verdict) == (None, "not measured") and "off by" in row.note


def test_passes_are_left_out_and_come_back():
    before = passes.PIPELINE
    with without("form_chains"):
        assert {p.__name__ for p in before} - {p.__name__ for p in passes.PIPELINE} == {"form_chains"}
    assert passes.PIPELINE is before
    with pytest.raises(ValueError, match="passes fuse_all; allowed: "), without("fuse_all"):
        pass


def test_contestants_do_the_same_job():
    x = nets.images(8, 9, 9)
    shapes = {macs(nets.square(n, 8), x) for n in (3, 5)}
    assert shapes == {81 * 64 * 9, 81 * 64 * 25}
    for module in (nets.square(3, 8), nets.asymmetric(3, 8), nets.stacked(2, 3, 8), nets.stacked(2, 2, 8)):
        assert module(x).shape == x.shape
    assert nets.wide(8)(x).shape == nets.deep(8)(x).shape == (1, 16, 9, 9)


def test_the_flush_runs_before_every_timed_call_and_outside_its_window():
    said: list[str] = []
    ticks = iter(range(100))

    def clock() -> float:
        said.append("clock")
        return float(next(ticks))

    plan = Plan(seconds=1e-9, least=2, most=2, warmup=0, settle=1)
    interleave({"a": lambda: said.append("call")}, plan, clock=clock, before=lambda: said.append("flush"))
    timed = ["call", "flush", "clock", "call", "clock"]
    assert said == ["clock", *timed, "clock", *timed, "clock"]
    Flush(1 << 16)()


def test_unknown_studies_and_numbers(tmp_path):
    with pytest.raises(ValueError, match="study 'x'; allowed: factorising"):
        run(Context(tmp_path), ["x"])
    said = {None: "-", 28.0: "28", 2.7777: "2.78", 92480.0: "92,480", 1234.5: "1,234", 999.7: "1,000"}
    assert {x: number(x) for x in said} == said


def test_a_run_that_was_cut_short_goes_on(tmp_path, monkeypatch, capsys):
    """A study that was finished is read, one that was not is measured, and other conditions void what is there."""
    calls = []

    def measured(context):
        calls.append("a")
        return [Row("a", "it is so", "s", None, 1.5, "%", "c", "confirmed", details={"x": [1, 2]})]

    def dies(context):
        calls.append("b")
        raise ArithmeticError

    monkeypatch.setattr("inception_fast.claims.study.studies", lambda: {"factorising": measured, "caches": dies})
    command = ["claims", "--only", "factorising,caches", "--out", str(tmp_path)]
    for _ in range(2):
        with pytest.raises(ArithmeticError):
            main([*command, "--resume"])
    assert calls == ["a", "b", "b"] and "factorising, already measured" in capsys.readouterr().err
    with pytest.raises(ArithmeticError):
        main([*command, "--resume", "--quick"])
    with pytest.raises(ArithmeticError):
        main(command)
    assert calls == ["a", "b", "b", "a", "b", "a", "b"]
    monkeypatch.setattr(
        "inception_fast.claims.study.studies", lambda: {"factorising": measured, "caches": lambda c: []}
    )
    assert main([*command, "--resume"]) == 0 and len(calls) == 7
    (row,) = json.loads((tmp_path / "claims.json").read_text())["rows"]
    assert (row["measured"], row["details"]) == (1.5, {"x": [1, 2]})


def test_a_page_without_plots_and_with_sharp_brackets(tmp_path):
    row = Row("a", "x < y & z", "<b>", 1.0, None, "%", "inception-fast claims", "not measured", "no <tool>")
    origin = {"machine": "m", "threads": 1, "load": 0, "date": "d", "commit": None, "versions": {}, "command": "c"}
    text = page({"caches": [row]}, {}, tmp_path, origin)
    assert "x &lt; y &amp; z" in text and "no &lt;tool&gt;" in text and "<img" not in text
    pytest.importorskip("matplotlib")
    assert figures.draw([row], tmp_path) == {}
