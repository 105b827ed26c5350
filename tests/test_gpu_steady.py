"""The measuring queue's loop of a network: its time, and what nvidia-smi said meanwhile."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from queue_modules import loaded


@pytest.fixture
def steady(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    with loaded("steady") as modules:
        yield modules["steady"]


def smi(folder: Path, *lines: str) -> None:
    """An nvidia-smi that says these lines again and again."""
    text = "\\n".join(lines)
    script = folder / "nvidia-smi"
    script.write_text(f"#!/bin/sh\nwhile :; do printf '{text}\\n'; sleep 0.01; done\n")
    script.chmod(0o755)


def test_a_call_has_its_time_and_the_clock_of_that_time(
    steady: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A line that is not whole does not count."""
    smi(tmp_path, "1500, 690.5, 0x4", "1400, 700.5, 0x0", "1980")
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    found = steady.steady(lambda: time.sleep(0.005), seconds=0.4)
    assert 5 <= found["call_ms"] < 50 and found["samples"] > 0
    assert 1400 <= found["clock_mhz"] <= 1500 and found["least_clock_mhz"] == 1400
    assert 690.5 <= found["power_w"] <= 700.5 and found["reasons"] == ["0x0", "0x4"]


def test_what_nvidia_smi_does_not_know_is_left_out(
    steady: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As it has no power of a part of a GPU; the time is worth as much."""
    smi(tmp_path, "1500, [N/A], 0x4")
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    found = steady.steady(lambda: time.sleep(0.005), seconds=0.4)
    assert set(found) == {"call_ms", "samples", "clock_mhz", "least_clock_mhz", "reasons"}
    assert found["clock_mhz"] == 1500 and found["reasons"] == ["0x4"]


def test_a_loop_without_nvidia_smi_has_its_time_alone(steady: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    found = steady.steady(lambda: time.sleep(0.002), seconds=0.1)
    assert set(found) == {"call_ms", "samples"} and found["samples"] == 0 and found["call_ms"] >= 2


def test_a_network_is_right_before_its_loop(steady: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    truth = torch.ones(2, 3)
    for y, status in ((truth, "ok"), (truth + 1, "wrong")):
        monkeypatch.setattr(steady, "network_calls", lambda *at, y=y: ({"ours": lambda: lambda: y}, truth))
        monkeypatch.setattr(steady, "steady", lambda call: {"call_ms": 1.0})
        (row,) = next(steady.steady_rows("inception_v3", 2, "bfloat16"))
        assert row["status"] == status and ("call_ms" in row) == (status == "ok")
