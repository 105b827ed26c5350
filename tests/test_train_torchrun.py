"""What a person sees of a run under torchrun: progress and no noise, a refusal once, a last checkpoint on a signal."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from inception_fast.train.checkpoint import read
from inception_fast.train.loop import Options, train
from training import command, folder_of_classes, photo, rows, start, tiny, under_torchrun, wait_for, workers

ALONE = """
import os, sys
import torch
from inception_fast.cli import main
from inception_fast.train import torchrun
from inception_fast.train.data import Digits
from inception_fast.train.labelled import DataError

torchrun.PATIENCE = 0.5
look = Digits.image

def broken(self, index):
    if os.environ["RANK"] == "1":
        raise DataError(f"image {index} of digits is damaged")
    return look(self, index)

Digits.image = broken
code = main()
print("group left behind:", torch.distributed.is_initialized(), flush=True)
sys.exit(code)
"""


@pytest.fixture(autouse=True)
def linux() -> None:
    if not sys.platform.startswith("linux"):
        pytest.skip("finds processes through /proc")
    torch.set_num_threads(1)


def test_a_run_says_nothing_but_its_progress(tmp_path: Path) -> None:
    """Auxiliary heads included: no warning of torch's about unused parameters, the process group or anything else."""
    flags = ["--model", "inception_v1", "--image-size", 64, "--steps", 2, "--eval-images", 4, "--out", tmp_path]
    process = start(under_torchrun(command(*flags)), stderr=subprocess.PIPE)
    output, errors = process.communicate(timeout=200)
    assert process.returncode == 0, errors
    assert "with auxiliary heads: done" in output and output.count("done, 2 steps") == 1
    odd = [line for line in errors.splitlines() if not re.match(r"step \d/2  loss", line)]
    assert not odd, errors


def arguments(what: str, root: Path) -> tuple[list[str], str]:
    """(a command that two processes of torchrun must refuse, what they say)."""
    out, quick = root / "out", Options(eval_images=0)
    flags = ["--out", out, "--resume", "--steps", 3]
    if what == "settings":
        train(tiny(2), out, quick)
        return command(*flags, "--seed", 1), "is of another run: seed is 0 there and 1 here"
    if what == "processes":
        return command(*flags, "--batch-size", 9), "train: batch size 9 over 2 processes; allowed: a multiple of 2"
    if what == "data":
        data = folder_of_classes(root / "data")
        train(tiny(2, data=str(data)), out, quick)
        for i in range(6):
            photo(data / "fox" / f"{i}.png", i)
        counts = [f"{n} classes and {5 * n} images to train on" for n in (2, 3)]
        return command(*flags, "--data", data), f"its data has {counts[0]} there and {counts[1]} here"
    line = f"-m inception_fast compare --models tiny_inception --steps 3 --image-size 16 --out {out}"
    words = "compare: a comparison by 2 processes of torchrun; allowed: one, or train for each variant"
    return [sys.executable, *line.split()], words


def held(folder: Path) -> dict[str, bytes]:
    """What a run cannot do without."""
    return {path.name: path.read_bytes() for path in (*folder.glob("*.jsonl"), *folder.glob("*.safetensors"))}


@pytest.mark.parametrize("what", ["settings", "processes", "data", "compare"])
def test_a_refusal_is_said_once_and_ends_all(tmp_path: Path, what: str) -> None:
    refused, words = arguments(what, tmp_path)
    before = held(tmp_path / "out")
    process = start(under_torchrun(refused))
    output, _ = process.communicate(timeout=120)
    said = [line for line in output.splitlines() if line.startswith("inception-fast: error: ")]
    assert len(said) == 1 and words in said[0], output
    codes = re.findall(r"^  exitcode  : (-?\d+)", output, flags=re.MULTILINE)
    assert process.returncode == 1 and sorted(codes) == ["-15", "2"], output  # torchrun ends the one that waits
    assert output.count("Traceback") == 1, output  # torchrun's own
    assert held(tmp_path / "out") == before


def test_a_failure_of_one_process_is_said_by_it(tmp_path: Path) -> None:
    """The others lose their connection when it ends: its reason comes first, theirs is one line too."""
    script = tmp_path / "alone.py"
    script.write_text(ALONE)
    _, _, _, *flags = command("--steps", 3, "--out", tmp_path / "out")
    process = start(under_torchrun([sys.executable, str(script), *flags]))
    output, _ = process.communicate(timeout=120)
    said = [line for line in output.splitlines() if line.startswith("inception-fast:")]
    assert process.returncode == 1 and 1 <= len(said) <= 2, output
    assert re.fullmatch(r"inception-fast: error: train: image \d+ of digits is damaged", said[0]), output
    assert all("train: another process of this run is gone (" in line for line in said[1:]), output
    assert output.count("Traceback") == 1 and rows(tmp_path / "out") == 0, output
    assert "group left behind: False" in output and "group left behind: True" not in output, output


@pytest.mark.parametrize("who", ["torchrun", "one process"])
def test_a_signal_ends_all_after_the_same_step(tmp_path: Path, who: str) -> None:
    """SIGINT to torchrun, which passes it on, and SIGTERM to the second process alone."""
    flags = ["--steps", 10**6, "--checkpoint-every", 10**6, "--eval-images", 0, "--out", tmp_path]
    process = start(under_torchrun(command(*flags)))
    wait_for(process, tmp_path, 3)
    if who == "torchrun":
        process.send_signal(signal.SIGINT)
    else:
        os.kill(max(workers(process.pid)), signal.SIGTERM)
    output, _ = process.communicate(timeout=60)
    done = rows(tmp_path)
    assert process.returncode == 1, output
    assert output.count(f"stopped after step {done}; resume goes on after step {done}\n") == 1, output
    assert output.count("inception-fast: interrupted") == 1 and output.count("Traceback") == 1, output
    assert read(tmp_path / f"checkpoint-{done:08d}.safetensors")[1]["step"] == done
