"""`bench --cpu-suite`: every part is there, bounded, and not measured twice when a run goes on."""

from __future__ import annotations

import json
import sys

import pytest
from inception_fast.kernels.spec import ConvSpec, PairSpec
from PIL import Image

from inception_fast import dispatch
from inception_fast.cli import main
from inception_fast.measure.compare import Row
from inception_fast.measure.cpu_suite import SETTLE, resized, time_pair
from inception_fast.measure.timer import Plan

CAPTURE = 14e6  # bytes that torch.export's objects of v3 may leave behind


@pytest.mark.alone
def test_cpu_suite_end_to_end(tmp_path, capsys, monkeypatch):
    pytest.importorskip("matplotlib")
    monkeypatch.setattr("inception_fast.measure.cpu_suite.BATCHES", (1,))
    monkeypatch.setattr("inception_fast.measure.cpu_suite.SIDES", (75,))
    arguments = [
        "bench",
        "inception_v3",
        "--cpu-suite",
        "--winograd",
        "--quick",
        "--against",
        "none",
        "--image-size",
        "139",
    ]
    assert main([*arguments, "--threads", "1", "--out", str(tmp_path)]) == 0
    assert "peak on registers" in capsys.readouterr().out
    document = json.loads((tmp_path / "cpu-suite.json").read_text())
    plain, tiled = (
        [row for row in document["rows"] if row["runtime"] == name]
        for name in ("inception_fast", "inception_fast+winograd")
    )
    for rows in (plain, tiled):
        assert [(row["dtype"], row["status"]) for row in rows] == [("float32", "ok"), ("bfloat16", "ok")]
    assert all(0 < row["peak_share"] < 1.1 for row in plain)
    assert {(row["batch"], row["fused"]) for row in document["pairs"]} == {(1, False), (16, True)}
    times = ("separate_us", "fused_us", "onednn_us", "mixed_us")
    assert all(min(row[name] for name in times) > 0 for row in document["pairs"])
    assert [(row["axis"], row["value"]) for row in document["growth"]] == 2 * [("batch", 1), ("side", 75)]
    direct, tiles = document["start"][:2], document["start"][2:]
    assert [(row["dtype"], row["winograd"]) for row in direct] == [("float32", False), ("bfloat16", False)]
    assert [(row["dtype"], row["winograd"]) for row in tiles] == [("float32", True), ("bfloat16", True)]
    assert tiles[0]["packed_bytes"] > 1.2 * direct[0]["packed_bytes"] and tiles[0]["packing_s"] > 0
    more = tiles[1]["packed_bytes"] / direct[1]["packed_bytes"]
    assert more == 1 if "amx" in document["tier"] else more > 1.2
    for row in direct:
        weights = 24e6 * (4 if row["dtype"] == "float32" else 2)
        assert weights * 0.95 < row["packed_bytes"] < weights * 1.1 and row["arena_bytes"] > 0
        # Merged siblings are 30 % of v3's weights: joined in float32 they would be 30 MB more.
        needed = row["packed_bytes"] + row["arena_bytes"]
        assert 0.95 * needed < row["grew_bytes"] < 1.05 * needed + CAPTURE
        assert 0 <= row["files_bytes"] < CAPTURE and row["grew_bytes"] - row["files_bytes"] < 1.1 * needed
    with Image.open(tmp_path / "cpu-growth.png") as picture:
        assert picture.format == "PNG" and min(picture.size) >= 300
    assert list(document["seconds"]) == ["peak", "inception_v3", "pairs", "growth", "start"]


def test_a_suite_that_was_cut_short_goes_on(tmp_path, capsys, monkeypatch):
    """What is done is not measured again with --resume, and it is without, with other options or instructions."""
    pytest.importorskip("matplotlib")
    calls: list[str] = []
    row = Row("inception_v1", 1, "float32", "inception_fast", 10.0, 0.1, 1e-7, 1.0)

    def fake(name: str, found: object, dies: bool = False) -> None:
        def measure(*_: object, **__: object) -> object:
            calls.append(name)
            if dies:
                raise ArithmeticError
            return found

        monkeypatch.setattr(f"inception_fast.cli.cpu_suite._{name}", measure)

    point = {"axis": "side", "value": 75, "threads": 1, "dtype": "float32", "ms_per_image": 1.0, "gflops": 2.0}
    fake("peaks", {"float32": 100.0, "bfloat16": 200.0})
    fake("compared", ({"macs": 10**8}, [row.as_json()]))
    fake("pairs", [])
    fake("growth", [point], dies=True)
    fake("start", [])
    command = ["bench", "inception_v1", "--cpu-suite", "--out", str(tmp_path)]
    with pytest.raises(ArithmeticError):
        main(command)
    fake("growth", [point])
    assert main([*command, "--resume"]) == 0
    first = ["peaks", "compared", "pairs", "growth"]
    assert calls == [*first, "growth", "start"]
    document = json.loads((tmp_path / "cpu-suite.json").read_text())
    assert document["rows"][0]["peak_share"] == pytest.approx(0.2) and document["growth"] == [point]
    assert list(document["seconds"]) == ["peak", "inception_v1", "pairs", "growth", "start"]
    assert "part 2 of 5: inception_v1, already measured" in capsys.readouterr().err
    calls.clear()
    assert main([*command, "--resume", "--seconds", "3"]) == 0 and calls == [*first, "start"]
    calls.clear()
    assert main([*command, "--resume", "--seconds", "3", "--winograd"]) == 0 and calls == [*first, "start"]
    calls.clear()
    assert main([*command, "--resume", "--image-size", "96"]) == 0 and calls == [*first, "start"]
    calls.clear()
    assert main([*command, "--resume", "--image-size", "96"]) == 0 and calls == []
    longer = [*command, "--resume", "--image-size", "96", "--build-limit", "600"]  # a peer that failed may make it now
    assert main(longer) == 0 and calls == [*first, "start"]
    other = {**dispatch._probe(), "cpu": dispatch.Available("another tier")}
    monkeypatch.setattr(dispatch, "_probe", lambda: other)
    calls.clear()
    assert main([*command, "--resume", "--image-size", "96"]) == 0 and calls == [*first, "start"]
    calls.clear()
    assert main(command) == 0 and calls == [*first, "start"]


def test_a_suite_without_matplotlib_has_no_plot(tmp_path, capsys, monkeypatch):
    found = {"peaks": {"float32": 100.0, "bfloat16": 200.0}, "compared": ({"macs": 10**8}, [])}
    for name in ("peaks", "compared", "pairs", "growth", "start"):
        monkeypatch.setattr(f"inception_fast.cli.cpu_suite._{name}", lambda *_, n=name, **__: found.get(n, []))
    monkeypatch.setattr("inception_fast.cli.bench._exit_code", lambda rows: 0)
    for name in [name for name in sys.modules if name.partition(".")[0] == "matplotlib"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert main(["bench", "inception_v1", "--cpu-suite", "--out", str(tmp_path)]) == 0
    out, err = capsys.readouterr()
    assert out.endswith(f"written: {tmp_path / 'cpu-suite.json'}\n") and "no plot: matplotlib is not installed" in err


@pytest.mark.parametrize("batch, settle", [(1, SETTLE), (16, 2)])
def test_pairs_are_timed_settled_and_mixed(monkeypatch, batch, settle):
    """Short calls are settled, and one form is timed unsettled behind oneDNN's."""
    seen: list[tuple] = []

    def fake(calls, plan, before=None):
        for call in (*calls.values(), *([before] if before else [])):
            call()
        seen.append((list(calls), plan.settle, before is not None))
        return {name: [1e-6 * len(seen)] * 3 for name in calls}

    monkeypatch.setattr("inception_fast.measure.cpu_suite.interleave", fake)
    halves = ConvSpec(1, 5, 5, 4, 4, 1, 3, padding=(0, 0, 1, 1)), ConvSpec(1, 5, 5, 4, 4, 3, 1, padding=(1, 1, 0, 0))
    row = time_pair(resized(PairSpec(*halves), batch, "float32"), 3, 1, Plan(settle=2))
    form = "fused" if row.fused else "separate"
    assert seen == [(["separate", "fused", "onednn"], settle, False), ([form], 0, True)]
    assert row.onednn_us == pytest.approx(1) and row.mixed_us == pytest.approx(2) and row.count == 3


def test_seconds_that_were_asked_for_are_measured():
    """A network of 10 ms beside nobody was done with 50 rounds of 0.1 s, whatever was asked for."""
    from inception_fast.cli import build_parser
    from inception_fast.cli.bench import _plan

    args = build_parser().parse_args(["bench", "inception_v1", "--seconds", "60"])
    assert _plan(args).share(50, 5.5) < 0.1 and _plan(args).share(550, 60.0) >= 1


def test_the_suites_lengths():
    """Bounded by default, as asked for where a length is given."""
    from inception_fast.cli import build_parser
    from inception_fast.cli.bench import _peers, _plan
    from inception_fast.cli.cpu_suite import plan_of

    def plan(batch, *extra):
        args = build_parser().parse_args(["bench", "--cpu-suite", *extra])
        return plan_of(args, batch, _plan(args))

    assert (plan(1).seconds, plan(1).settle, plan(16).seconds, plan(16).settle) == (5.0, 1, 5.0, 0)
    assert plan(16, "--repeats", "7").least == 7 and plan(16, "--seconds", "3").settle == 1
    assert [peer.name for peer in _peers(build_parser().parse_args(["bench", "--cpu-suite"]))] == [
        "onnxruntime",
        "openvino",
    ]
    assert main(["bench", "inception_v1", "--resume"]) == 2
