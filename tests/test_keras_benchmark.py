"""The program that times Keras: it proves its outputs, times nine rounds or says that it did not, writes a result."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from checkout import ROOT


def test_a_quick_run_writes_a_result_that_is_not_filed(tmp_path: Path) -> None:
    pytest.importorskip("tensorflow", reason="the program times TensorFlow")
    command = [sys.executable, str(ROOT / "benchmarks" / "keras_models.py"), "inception_v1", "--quick"]
    command += ["--image-size", "47", "--batch", "2", "--dtype", "float32", "--winograd", "--out", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    document = json.loads((tmp_path / "bench.json").read_text())
    rows = document["rows"]
    ours = ["inception_fast", "inception_fast+winograd"]
    assert [row["runtime"] for row in rows] == [*ours, "keras", "tf.function", "jit_compile"]
    for row in rows:
        assert (
            (row["status"], row["batch"]) == ("ok", 2)
            and row["model"] == "inception_v1 in Keras"
            and row["rounds"] == 3
        )
        assert 0 < row["rel_error"] <= 1e-5 and row["median_ms"] > 0
        assert row["runtime"] in ours or row["note"] in ("plain", "batch norm folded")
    assert document["models"]["inception_v1 in Keras"]["image_size"] == 47
    filing = [sys.executable, str(ROOT / "benchmarks" / "publish.py"), str(tmp_path / "bench.json")]
    refused = subprocess.run(filing, capture_output=True, text=True)
    assert refused.returncode == 2 and "a run with --quick; allowed: full ones" in refused.stderr


def test_the_truth_of_a_batch_is_that_of_its_photographs() -> None:
    """Computed once for each, in the order and as often as the batches hold them."""
    pytest.importorskip("tensorflow", reason="the program times TensorFlow")
    spec = importlib.util.spec_from_file_location("keras_models", ROOT / "benchmarks" / "keras_models.py")
    assert spec is not None and spec.loader is not None
    program = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(program)
    net = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(12, 3)).eval()
    photos = torch.randn(3, 3, 2, 2)
    for batch in (1, 2, 5):
        inputs = program.comparison.batches(photos, batch)
        found = program.truth(net, photos, inputs)
        for x, y in zip(inputs, found, strict=True):
            assert y.dtype == torch.float64 and torch.allclose(y, net.double()(x.double()), atol=1e-12)
            net.float()
