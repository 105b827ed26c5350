"""Checkpoints: whole or not there, and one to fall back on when the newest is damaged or the disk is full."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import resource
import signal
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from inception_fast.measure.held import LOCK, held
from inception_fast.train.checkpoint import CheckpointError, Checkpoints, read
from inception_fast.train.loop import Options, train
from training import command, curve, start, tiny

TENSORS = {
    "model/w": torch.arange(12.0).reshape(1, 3, 2, 2).to(memory_format=torch.channels_last),
    "model/n": torch.tensor(7),
    "model/half": torch.tensor([1.5, -2.0], dtype=torch.bfloat16),
}


def filled(folder: Path, steps: int = 3, keep: int = 2) -> tuple[Checkpoints, list[str]]:
    said: list[str] = []
    checkpoints = Checkpoints(folder, keep, said.append)
    for step in range(1, steps + 1):
        assert checkpoints.save(step, TENSORS, {"step": step, "words": "é"})
    return checkpoints, said


def test_round_trip(tmp_path: Path) -> None:
    checkpoints, said = filled(tmp_path)
    found = checkpoints.load()
    assert found is not None
    tensors, state = found
    assert state == {"step": 3, "words": "é"} and not said
    assert tensors.keys() == TENSORS.keys()
    assert all(torch.equal(tensors[key], TENSORS[key]) and tensors[key].dtype == TENSORS[key].dtype for key in TENSORS)


@pytest.mark.parametrize("keep", [2, 3])
def test_the_newest_stay(tmp_path: Path, keep: int) -> None:
    checkpoints, _ = filled(tmp_path, 5, keep)
    assert checkpoints.steps() == [1, 2, 3, 4, 5][-keep:]
    with pytest.raises(ValueError, match="keep 1; allowed: 2 or more"):
        Checkpoints(tmp_path, 1)


def damage(path: Path, how: str) -> None:
    content = bytearray(path.read_bytes())
    if how == "truncated":
        content = content[: len(content) - 5]
    elif how == "bit":
        content[-3] ^= 1
    elif how == "state":
        at = content.index(b'\\"step\\": 3')
        content[at : at + 11] = b'\\"step\\": 9'
    elif how == "garbage":
        content = bytearray(b"\x80\x04garbage")
    elif how == "empty":
        content = bytearray()
    path.write_bytes(content)
    if how == "foreign":
        save_file({"w": torch.ones(2)}, path)


@pytest.mark.parametrize("how", ["truncated", "bit", "state", "garbage", "empty", "foreign"])
def test_a_damaged_one_falls_back(tmp_path: Path, how: str) -> None:
    checkpoints, said = filled(tmp_path)
    damage(checkpoints.path(3), how)
    found = checkpoints.load()
    assert found is not None and found[1]["step"] == 2
    assert len(said) == 1 and "checkpoint-00000003" in said[0] and "falling back" in said[0]


def test_damaged_ones_take_the_place_of_none_that_is_sound(tmp_path: Path) -> None:
    """Of step 4, behind the one that a run fell back to; what it leaves on its way to there has to stay."""
    checkpoints, _ = filled(tmp_path, 4, 3)
    damage(checkpoints.path(3), "truncated")
    damage(checkpoints.path(4), "truncated")
    again = Checkpoints(tmp_path, 2)
    assert again.load() is not None and again.save(3, TENSORS, {"step": 3})
    assert again.steps() == [2, 3, 4]
    found = again.load()
    assert found is not None and found[1]["step"] == 3
    damage(again.path(3), "truncated")
    found = again.load()
    assert found is not None and found[1]["step"] == 2


def test_all_damaged_is_refused(tmp_path: Path) -> None:
    checkpoints, _ = filled(tmp_path)
    for step in checkpoints.steps():
        damage(checkpoints.path(step), "truncated")
    with pytest.raises(CheckpointError, match=r"every checkpoint in .* is damaged .*remove them to start afresh"):
        checkpoints.load()


def test_none_at_all(tmp_path: Path) -> None:
    assert Checkpoints(tmp_path / "nowhere").load() is None


def test_what_a_killed_write_left_is_removed(tmp_path: Path) -> None:
    checkpoints, said = filled(tmp_path)
    leftover = tmp_path / ".checkpoint-00000004-abc.safetensors"
    leftover.write_bytes(b"half")
    found = checkpoints.load()
    assert found is not None and found[1]["step"] == 3 and not leftover.exists() and not said


@pytest.mark.parametrize("resume", [False, True])
def test_a_folder_that_another_run_writes_to_is_left_alone(tmp_path: Path, resume: bool) -> None:
    """Both runs said that they were done, with a curve that was of neither."""
    leftover = tmp_path / ".checkpoint-00000002-x.safetensors"
    leftover.write_text("of the other")
    with (
        held(tmp_path),
        pytest.raises(ValueError, match=r"another run writes to .*; wait for it, or name another folder"),
    ):
        train(tiny(2), tmp_path, Options(eval_images=0, resume=resume))
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([leftover.name, LOCK])
    assert train(tiny(2), tmp_path, Options(eval_images=0, resume=resume))["status"] == "done"


def test_a_file_system_without_locks_holds_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(file: object, what: int) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", refuse)
    assert train(tiny(2), tmp_path, Options(eval_images=0))["status"] == "done"


def test_a_missing_file_is_an_error_not_a_crash(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="is damaged"):
        read(tmp_path / "checkpoint-00000001.safetensors")


def test_a_full_disk_keeps_the_old_and_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoints, said = filled(tmp_path, 2)

    def full(*arguments: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("inception_fast.train.checkpoint.save_file", full)
    assert not checkpoints.save(3, TENSORS, {"step": 3})
    assert checkpoints.steps() == [1, 2] and not list(tmp_path.glob(".*"))
    assert said == [
        "the checkpoint of step 3 could not be written (No space left on device); the last good one is of step 2"
    ]


def test_training_survives_a_disk_that_takes_no_checkpoint(tmp_path: Path) -> None:
    """The system itself refuses files of that size: the run ends, its log is whole, it says what is missing."""

    def limit() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))

    process = start(command("--steps", 4, "--checkpoint-every", 2, "--out", tmp_path), preexec_fn=limit)
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 0, output
    assert "the checkpoint of step 2 could not be written" in output and "there is none yet" in output
    assert [json.loads(line)["step"] for line in (tmp_path / "log.jsonl").read_text().splitlines()] == [1, 2, 3, 4]
    assert not list(tmp_path.glob("*.safetensors")) and list(tmp_path.glob(".*")) == [tmp_path / LOCK]


def test_a_disk_that_takes_no_log_is_named_and_the_run_goes_on_later(tmp_path: Path) -> None:
    """The log is what fails here: whole rows stay, the file is named, and the curve is the uninterrupted one."""

    def limit() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (2000, 2000))

    arguments = command("--steps", 12, "--eval-images", 0, "--out", tmp_path / "full", "--resume")
    process = start(arguments, preexec_fn=limit)
    output, _ = process.communicate(timeout=120)
    log = tmp_path / "full" / "log.jsonl"
    assert process.returncode == 2, output
    assert f"error: train: {log} cannot be written (File too large); make room, then resume" in output
    rows = [json.loads(line)["step"] for line in log.read_text().splitlines()]
    assert rows == list(range(1, len(rows) + 1)) and 4 < len(rows) < 12 and log.read_bytes().endswith(b"}\n")
    again = start(arguments)
    output, _ = again.communicate(timeout=120)
    assert again.returncode == 0, output
    torch.set_num_threads(1)
    train(tiny(12), tmp_path / "whole", Options(eval_images=0))
    assert curve(tmp_path / "full") == curve(tmp_path / "whole")
