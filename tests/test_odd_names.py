"""Names of files that are not UTF-8: what they name is read and written, and they are printed with escapes; so are
names that standard output does not hold.
"""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

import inception_fast as fast
from inception_fast.cli import main
from inception_fast.cli.common import print_json
from inception_fast.features.shards import count_features, is_feature_file, read_features, write_shard
from inception_fast.measure.results import write_json, write_text
from inception_fast.train import checkpoint
from inception_fast.weights import resolve

ODD = os.fsdecode(b"odd\xff")


@pytest.fixture
def place(tmp_path: Path) -> Path:
    folder = tmp_path / ODD
    try:
        folder.mkdir()
    except OSError as error:
        pytest.skip(f"no such names on this file system: {error}")
    return folder


def test_the_command_line_prints_them_with_escapes(place: Path) -> None:
    """In a locale whose standard output takes UTF-8 alone, unlike that of C."""
    net = fast.create_model("inception_v1", num_classes=3)
    save_file(net.state_dict(), place / "a.safetensors")
    command = [
        sys.executable,
        "-m",
        "inception_fast",
        "convert",
        str(place / "a.safetensors"),
        str(place / "b.safetensors"),
    ]
    for extra in ([], ["--json"]):
        done = subprocess.run(
            [*command, *extra], capture_output=True, env=os.environ | {"PYTHONIOENCODING": "utf-8:strict"}, timeout=120
        )
        assert done.returncode == 0, done.stderr
        assert "odd\\udcff/b.safetensors" in done.stdout.decode()
    assert json.loads(done.stdout)["target"] == str(place / "b.safetensors")
    assert resolve(place / "b.safetensors").tensors.keys() == net.state_dict().keys()


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "utf-8"])
def test_json_is_json_in_any_locale(encoding: str, monkeypatch: pytest.MonkeyPatch) -> None:
    names = ["größe.jpg", "数.jpg", "\U0001f600.jpg", ODD]
    written = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(written, encoding, errors="backslashreplace"))
    print_json(names)
    sys.stdout.flush()
    text = written.getvalue().decode(encoding)
    assert json.loads(text) == names and ("größe" in text) == (encoding == "utf-8")


def test_inspect_writes_where_it_is_told_to(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", "inception_v1", "--out", str(place)]) == 0
    assert "odd\\udcff" in capsys.readouterr().out and (place / "inspect.json").exists()


def test_results_hold_them(tmp_path: Path) -> None:
    command = ["bench", "--out", ODD, "größe"]
    write_json(tmp_path / "x.json", command)
    text = (tmp_path / "x.json").read_text(encoding="utf-8")
    assert json.loads(text) == command and "größe" in text and r"odd\udcff" in text
    write_text(tmp_path / "x.html", f"<p>{ODD}</p>")
    assert (tmp_path / "x.html").read_bytes() == rb"<p>odd\udcff</p>"


def test_weights_and_checkpoints_are_read(place: Path) -> None:
    tensors = {"a": torch.arange(3.0), "b": torch.ones(2, dtype=torch.bfloat16)}
    file = place / "checkpoint-00000001.safetensors"
    checkpoint.write(file, tensors, {"out": str(place)})
    held, state = checkpoint.read(file)
    assert all(torch.equal(held[name], value) for name, value in tensors.items()) and state == {"out": str(place)}
    with pytest.raises(Exception, match="UTF-8"), safe_open(file, "pt"):
        pass  # were it taken, no link would be needed
    file.write_bytes(file.read_bytes()[:20])
    with pytest.raises(checkpoint.CheckpointError, match="is damaged"):
        checkpoint.read(file)


def test_features_are_written_and_read(place: Path) -> None:
    values, file = np.arange(8, dtype=np.float32).reshape(4, 2), place / "features-00000.parquet"
    write_shard(file, list("abcd"), values, {})
    assert is_feature_file(file) and count_features([file]) == 4
    assert np.array_equal(np.concatenate(list(read_features([file]))), values)
