"""Provenance that names this machine, and result files that are whole or absent."""

from __future__ import annotations

import json
import os
import subprocess
from datetime import datetime

import pytest
import torch

from inception_fast.measure import machine
from inception_fast.measure.results import write_atomically, write_json
from training import small_files


def test_provenance():
    origin = machine.provenance(3, ["bench", "inception_v3", "--image", "my photo.jpg"])
    assert origin["threads"] == 3 and origin["command"] == "inception-fast bench inception_v3 --image 'my photo.jpg'"
    assert origin["cores"] >= 1 and origin["cpu"] in origin["machine"]
    assert origin["versions"]["torch"] == torch.__version__
    assert datetime.fromisoformat(origin["date"]).utcoffset() is not None
    json.dumps(origin, allow_nan=False)


@pytest.mark.parametrize("kind", ["x86_64 Kernel Module", "Open Kernel Module for x86_64"])
def test_what_a_gpu_runs_under_is_told(tmp_path, kind):
    file = tmp_path / "version"
    assert machine.gpu_versions(file)["driver"] is None
    file.write_text(f"NVRM version: NVIDIA UNIX {kind}  570.86.15  Release Build\nGCC version:  gcc 13.3.0 (x)\n")
    found = machine.gpu_versions(file)
    assert found == {"driver": "570.86.15", "cuda": torch.version.cuda, "triton": machine.version("triton")}


def test_versions_come_from_metadata():
    assert machine.version("no-such-package-here") is None
    assert machine.version("torch") == torch.__version__


def test_cpu_model(tmp_path):
    info = tmp_path / "cpuinfo"
    info.write_text("processor\t: 0\nmodel name\t: A Fine CPU @ 3 GHz\nmodel\t\t: 1\n")
    assert machine.cpu_model(info) == "A Fine CPU @ 3 GHz"
    info.write_text("Features: fp asimd\n")
    assert machine.cpu_model(info) == machine.cpu_model(tmp_path / "missing") != ""


def git(folder, *arguments):
    identity = ["-c", "user.name=a", "-c", "user.email=a@b.c", "-c", "commit.gpgsign=false"]
    subprocess.run(["git", *identity, *arguments], cwd=folder, check=True, capture_output=True)


def test_commit(tmp_path):
    assert machine.commit(tmp_path) is None  # not a checkout
    git(tmp_path, "init")
    module = tmp_path / "machine.py"
    module.write_text("1")
    assert machine.commit(tmp_path) is None  # an environment inside someone else's checkout
    git(tmp_path, "add", "machine.py")
    git(tmp_path, "commit", "--no-verify", "-m", "x")
    clean = machine.commit(tmp_path)
    assert clean is not None and len(clean) == 40
    module.write_text("2")
    assert machine.commit(tmp_path) == f"{clean}-dirty"


def test_a_file_is_whole_or_as_it_was(tmp_path):
    path = tmp_path / "result.json"
    write_json(path, {"a": 1})
    assert json.loads(path.read_text()) == {"a": 1}

    def half(scratch):
        scratch.write_text('{"a":')
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        write_atomically(path, half)
    with pytest.raises(ValueError):
        write_json(path, {"a": float("nan")})
    assert json.loads(path.read_text()) == {"a": 1}
    assert list(tmp_path.iterdir()) == [path]


def test_a_full_disk_is_told_with_the_name_of_the_file(tmp_path):
    path = tmp_path / "result.json"
    with small_files(1000), pytest.raises(OSError, match=rf"File too large: '{path}'"):
        write_json(path, ["x" * 5000])
    with pytest.raises(FileNotFoundError, match=rf"No such file or directory: '{tmp_path}/none/result.json'"):
        write_json(tmp_path / "none" / "result.json", [])

    def reads(scratch):
        (tmp_path / "source").read_bytes()

    with pytest.raises(FileNotFoundError, match="source'"):
        write_atomically(path, reads)
    assert not list(tmp_path.iterdir())


def test_results_may_be_read_by_others(tmp_path):
    before = os.umask(0o022)
    try:
        write_json(tmp_path / "a.json", [])
        assert (tmp_path / "a.json").stat().st_mode & 0o777 == 0o644
        assert os.umask(0o022) == 0o022
    finally:
        os.umask(before)
