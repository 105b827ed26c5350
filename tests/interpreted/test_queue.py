"""What the measuring queue does on a GPU, on small maps and interpreted: the way from a job to its rows."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import pytest
import torch

from queue_modules import loaded

from .maps import DEVICE

LAYERS = {
    "pointwise": (5, 16, 24, (1, 1), 1, (0, 0, 0, 0)),
    "row": (4, 16, 16, (1, 3), 1, (0, 0, 1, 1)),
}


@pytest.fixture
def queue(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, Any]]:
    """The modules, with calls run once in place of being timed by events of a GPU."""

    def once(calls: Mapping[str, Callable[[], Any]], *rounds: int, **options: int) -> dict[str, list[float]]:
        for call in calls.values():
            call()
        return {name: [1e-3, 2e-3, 3e-3] for name in calls}

    with loaded("catalogue", "measure", "training_layers") as modules:
        for name, module in modules.items():
            monkeypatch.setattr(module, "LAYERS", LAYERS)
            if name != "catalogue":
                monkeypatch.setattr(module, "DEVICE", DEVICE)
                monkeypatch.setattr(module, "device_seconds", once)
        monkeypatch.setattr(modules["measure"], "host_seconds", once)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (8, 0))
        yield modules


def test_layers_are_timed_where_they_are_right(queue: dict[str, Any]) -> None:
    monkeyed = queue["measure"]
    *_, rows = monkeyed.layer_rows(2, "float16")
    found = {(row["layer"], row["runtime"]): row for row in rows}
    for layer in LAYERS:
        ours, eager = found[layer, "ours"], found[layer, "eager"]
        assert ours["status"] == eager["status"] == "ok", (ours, eager)
        assert ours["median_ms"] == 2.0 and ours["tflops"] > 0 and ours["back_to_back_ms"] > 0
        assert 0 < ours["rel_error"] < 2.5e-3
        assert found[layer, "xla"]["status"] in ("ok", "unavailable")


def test_tiles_are_tried(queue: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    measure = queue["measure"]
    monkeypatch.setattr(measure, "BATCHES", (1, 2))
    monkeypatch.setattr(measure.tune, "TRIED", 2)
    monkeypatch.setattr(measure.tune.tried, "__kwdefaults__", {"tf32": False, "count": 2})
    parts = [list(rows) for rows in measure.tuned_rows("row", "float16")]
    assert [len(rows) for rows in parts] == [1, 2]
    assert parts[-1][1]["row"][:5] == ["sm_80", "half", 32, 16, 48] and parts[-1][1]["tried"] == 2


@pytest.mark.parametrize("form", ["separate", "fused"])
def test_a_pair_runs_under_the_profiler(form: str, queue: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    measure, marks = queue["measure"], list[str]()

    class Runtime:
        def __getattr__(self, name: str) -> Any:
            return lambda: marks.append(name)

    monkeypatch.setattr(measure, "PAIR_BATCH", 1)
    monkeypatch.setattr(measure, "PAIR_SIZES", {"small": (16, 16, 16)})
    monkeypatch.setattr(torch.cuda, "cudart", Runtime)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    measure.pair_once("small", form)
    assert marks == ["cudaProfilerStart", "cudaProfilerStop"]


def test_training_steps_are_compared_and_timed(queue: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    training = queue["training_layers"]
    monkeypatch.setattr(training, "BATCH", 2)
    monkeypatch.setattr(training, "NAMES", tuple(LAYERS))
    monkeypatch.setattr(torch, "compile", lambda module: module)
    *_, rows = training.training_rows("float16")
    assert {row["runtime"] for row in rows} == {"ours", "eager", "compile"} and len(rows) == 6
    for row in rows:
        assert row["status"] == "ok" and row["median_ms"] == 2.0 and row["rel_error"] > 0, row
