"""The benchmark of a training step, and what it found: a step needs less memory with the drop-in layers."""

from __future__ import annotations

import json
import subprocess
import sys
from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest
import torch
import training_step

from checkout import ROOT

SCRIPT = "--model inception_v1 --batch 2 --size 64 --dtype float32 --against eager --seconds 0.1 --least 2 --threads 1"


@pytest.mark.parametrize("dtype", training_step.DTYPES)
def test_a_step_needs_less_memory_than_eagers(dtype: str) -> None:
    """At 139x139 and batch 16 the benchmark finds 269 MB for 339 in float32; a small step shows the same order."""
    asked = Namespace(model="inception_v3", batch=4, size=96, threads=torch.get_num_threads(), plain_allocator=True)
    peaks = {}
    for runtime in ("inception_fast", "eager"):
        step, model = training_step.build(runtime, asked, dtype)
        step(update=False)
        model.zero_grad(set_to_none=True)
        peaks[runtime] = training_step.measured_peak(step)
    assert peaks["inception_fast"] < 0.97 * peaks["eager"]


@pytest.mark.parametrize("option, seen", [("--against", "compiled"), ("--dtype", "float64")])
def test_what_the_benchmark_does_not_know_is_refused(
    option: str, seen: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", ["training_step.py", "--out", str(tmp_path / "out"), option, seen])
    with pytest.raises(SystemExit, match=f"'{seen}'; allowed: "):
        training_step.collect(training_step.arguments(), {})
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("option, seen, reason", [("--least", "1", "2 rounds and more"), ("--seconds", "0.0", "> 0")])
def test_lengths_that_tell_nothing_are_refused_before_anything_is_built(
    option: str, seen: str, reason: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of one round there is no noise, and a result without it could not be written in the end."""
    monkeypatch.setattr(sys, "argv", ["training_step.py", "--out", str(tmp_path / "out"), option, seen])
    monkeypatch.setattr(training_step, "Peer", lambda *arguments: pytest.fail("a runtime was built"))
    monkeypatch.setattr("inception_fast.measure.results.conditions", lambda origin: {})
    with pytest.raises(SystemExit, match=f"{option} {seen}.*allowed: .*{reason}"):
        training_step.collect(training_step.arguments(), {})


def test_the_benchmark_runs_and_resumes(tmp_path: Path) -> None:
    def run(*more: str) -> tuple[dict[str, Any], str]:
        command = [sys.executable, str(ROOT / "benchmarks" / "training_step.py"), "--out", str(tmp_path)]
        done = subprocess.run([*command, *SCRIPT.split(), *more], check=True, capture_output=True, text=True, cwd=ROOT)
        return json.loads((tmp_path / "training.json").read_text()), done.stderr

    first, said = run()
    assert [row["runtime"] for row in first["rows"]] == ["inception_fast", "eager"]
    assert all(row["status"] == "ok" and row["peak_bytes"] > 0 and row["rounds"] >= 2 for row in first["rows"])
    assert "building eager, float32" in said and "measuring float32" in said
    again, said = run("--resume")
    assert again["rows"] == first["rows"] and "building" not in said
    other, _ = run("--resume", "--plain-allocator")  # another measurement: nothing of the first counts
    assert not any(row["keeps_freed_memory"] for row in other["rows"])
