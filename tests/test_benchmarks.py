"""The benchmark suites: they hold what the networks are made of, record interleaved samples, and time nothing wrong."""

from __future__ import annotations

import importlib.util
import json
import math
import subprocess
import sys
from collections import Counter
from types import ModuleType, SimpleNamespace

import inventory
import pytest
import torch

import inception_fast as fast
from checkout import ROOT
from conv_shapes import CONV_SHAPES
from inception_fast.measure.timer import noise_floor

# Convolutions and linear layers, chains, splits of each network, as counted in the reference implementations.
MADE_OF = {
    "inception_v1": (58, 0, 0),
    "inception_v2": (71, 0, 0),
    "inception_v3": (95, 13, 4),
    "inception_v4": (150, 26, 6),
    "inception_resnet_v2": (245, 30, 0),
    "inception_resnet_v1": (134, 16, 0),
}


def _conftest() -> ModuleType:
    spec = importlib.util.spec_from_file_location("benchmarks_conftest", ROOT / "benchmarks" / "conftest.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_inventory_is_what_the_networks_are_made_of() -> None:
    assert set(MADE_OF) == set(fast.list_models())
    for name, (convs, chains, splits) in MADE_OF.items():
        parts = inventory.parts(name)
        kinds = Counter(pair.kind for pair in parts.pairs())
        assert (len(parts.convs), kinds["chain"], kinds["split"]) == (convs, chains, splits), name
    every = inventory.convs()
    assert sum(sum(count.values()) for count in every.values()) == sum(convs for convs, *_ in MADE_OF.values())
    # Not in the table: v1's first layer with torch's padding, and Inception-ResNet-v1's classifier.
    assert sorted((s.c, s.oc) for s in set(every) - set(CONV_SHAPES)) == [(3, 64), (512, 1000)]
    counts = {str(block): count for block, count in inventory.blocks().items()}
    assert (
        counts["inception_resnet_v2-repeat_1.0-17x17x1088"] == 20 and counts["inception_v4-features.11-17x17x1024"] == 7
    )


def test_the_suite_runs_selects_and_compares(tmp_path) -> None:
    """One small convolution on every backend of this machine, recorded and read by pytest-benchmark itself."""
    pytest.importorskip("pytest_benchmark")
    arguments = ["benchmarks/test_convs.py", "-k", "3x3x192-192-1x3", "-q", "-p", "no:cacheprovider"]
    arguments += ["--benchmark-max-time=0.01", "--benchmark-min-rounds=3", f"--benchmark-json={tmp_path / 'run.json'}"]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", *arguments], cwd=ROOT, capture_output=True, text=True, timeout=280
    )
    assert done.returncode == 0, done.stdout + done.stderr
    document = json.loads((tmp_path / "run.json").read_text())
    found = {one["extra_info"]["backend"]: one for one in document["benchmarks"]}
    assert {"cpu", "torch"} <= set(found) and len({one["group"] for one in found.values()}) == 1
    for one in found.values():
        assert one["stats"]["rounds"] >= 3 and 0 < one["stats"]["min"] <= one["stats"]["median"] < 60
        assert one["extra_info"]["multiplicity"] == {"inception_resnet_v1": 6}
        assert one["extra_info"]["macs"] == 9 * 192 * 192 * 3 and one["extra_info"]["noise_floor"] >= 0
    assert "benchmarks/test_convs.py" in document["provenance"]["command"]
    assert "ratio" not in found["torch"]["extra_info"] and found["cpu"]["extra_info"]["ratio"] > 0
    assert found["cpu"]["extra_info"]["established"] in (True, False)
    files = [tmp_path / "run.json", tmp_path / "later.json"]
    files[1].write_text(files[0].read_text())
    command = [sys.executable, "-m", "pytest_benchmark", "compare", *map(str, files), "--group-by=group"]
    shown = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert shown.returncode == 0 and shown.stdout.count("test_conv[cpu-3x3x192-192-1x3") == 2
    assert "run" in shown.stdout and "later" in shown.stdout


def test_nothing_wrong_is_timed() -> None:
    conftest = _conftest()
    options = SimpleNamespace(warm=True, benchmark_max_time="0.01", benchmark_min_rounds=3)
    item = SimpleNamespace(originalname="test_x", callspec=SimpleNamespace(params={"backend": "cpu", "shape": "s"}))
    session = SimpleNamespace(config=SimpleNamespace(option=options), items=[item])
    x = torch.ones(1 << 18)
    right = conftest.Contests(session).samples(item, lambda name: lambda: x.clone(), lambda: x.double())
    assert len(right["cpu"]) >= 3
    options.benchmark_max_time, options.benchmark_min_rounds = "1e-6", 1
    few = conftest.Contests(session).samples(item, lambda name: lambda: x.clone(), lambda: x.double())
    assert math.isfinite(noise_floor(few["cpu"])), "JSON has no infinity"
    with pytest.raises(pytest.fail.Exception, match=r"cpu is off by .*not timed"):
        conftest.Contests(session).samples(item, lambda name: lambda: x + 1e-3, lambda: x.double())
    contests = conftest.Contests(session)
    contests.empty = 1.0
    with pytest.raises(pytest.fail.Exception, match=r"cpu takes no longer than the clock's noise"):
        contests.samples(item, lambda name: lambda: x.clone(), lambda: x.double())


def test_the_replayed_clock_tells_the_samples() -> None:
    clock = _conftest().Replay()
    clock.samples = [0.5, 0.25]
    readings = [clock() for _ in range(4)]
    assert [readings[1] - readings[0], readings[3] - readings[2]] == [0.5, 0.25]


def test_a_study_of_the_same_code_against_itself(tmp_path) -> None:
    """Three contests run to the end; what is established between equals is counted and fails."""
    options = ["--runs=3", "--rounds=3", "--seconds=0.01", "--threads=1", f"--out={tmp_path}"]
    done = subprocess.run(
        [sys.executable, "benchmarks/aa.py", *options], cwd=ROOT, capture_output=True, text=True, timeout=280
    )
    assert done.returncode == 0, done.stdout + done.stderr
    document = json.loads((tmp_path / "aa.json").read_text())
    assert document["runs"] == len(document["rows"]) == 3 and document["false_alarms"] == 0
    assert [row["subject"].split()[0] for row in document["rows"]] == ["conv", "pair", "block"]
    assert "benchmarks/aa.py --runs=3" in document["provenance"]["command"]


def test_a_study_of_one_round_is_refused(tmp_path, capsys) -> None:
    import aa

    with pytest.raises(SystemExit):
        aa.main(["--runs=1", "--rounds=1", f"--out={tmp_path / 'out'}"])
    assert "--rounds 1 " in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_a_study_of_what_threads_share(tmp_path) -> None:
    """One thread and more than there are cores; the busiest is no faster than an even share would be."""
    options = ["inception_v1", "--batch=1", "--threads=1,5", "--calls=1", "--seconds=0", f"--out={tmp_path}"]
    done = subprocess.run(
        [sys.executable, "benchmarks/shares.py", *options], cwd=ROOT, capture_output=True, text=True, timeout=280
    )
    assert done.returncode == 0, done.stdout + done.stderr
    rows = json.loads((tmp_path / "shares.json").read_text())["rows"]
    assert [(row["shared_by"], row["dtype"], row["winograd"]) for row in rows] == [
        (count, dtype, winograd) for dtype in ("float32", "bfloat16") for winograd in (False, True) for count in (1, 5)
    ]
    for row in rows:
        assert row["balance"] == 1 if row["shared_by"] == 1 else 0.2 <= row["balance"] <= 1
        assert row["work_ms"] <= row["shared_by"] * row["critical_ms"] * 1.0001


def test_features_are_reported_by_the_statistics_of_the_timer(tmp_path, capsys, monkeypatch) -> None:
    """Quartiles as everywhere, the waiting a share of the round in which it was, a command that can be typed."""
    import features

    asked = SimpleNamespace(out=tmp_path / "f.json", size=8, batch_size=4, threads=1, workers=1, rounds=3)
    seconds = {"inception_fast float32": [1.0, 2.0, 4.0], "torch-fidelity": [4.0, 4.0, 8.0], "pytorch-fid": [3.0] * 3}
    monkeypatch.setattr(sys, "argv", ["features.py", "--folder", "my images"])
    features.report(asked, 12, seconds, {}, {"float32": features.Clock(waiting=1.0, computing=3.0)})
    assert "6.0 images/s   1.50x, 25 % waiting" in capsys.readouterr().out
    document = json.loads(asked.out.read_text())
    assert [row["iqr_s"] for row in document["rows"]] == [1.5, 2.0, 0.0]
    assert document["provenance"]["command"] == "python benchmarks/features.py --folder 'my images'"


def test_subjects_of_the_study_are_spread_over_all(monkeypatch) -> None:
    import aa

    for kind in ("conv", "pair", "block", "network"):
        monkeypatch.setattr(aa, f"_{kind}", lambda one, kind=kind: (f"{kind} {one}", None, None))
    names = [name for name, *_ in aa.subjects(100)]
    assert Counter(name.split()[0] for name in names) == {"conv": 25, "pair": 25, "block": 25, "network": 25}
    assert {name.split()[1] for name in names if name.startswith("network")} == set(fast.list_models())
    assert len(set(names)) > 70
