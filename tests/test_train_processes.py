"""Processes: killed ones go on where the last checkpoint was, two compute what one would, a dead worker is survived."""

from __future__ import annotations

import json
import os
import signal
import socket
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from torch import nn

from inception_fast.train import distributed
from inception_fast.train.checkpoint import read
from inception_fast.train.distributed import World
from inception_fast.train.loop import Options, train
from inception_fast.train.sharding import share_out
from training import command, curve, folder_of_classes, rows, start, tiny, under_torchrun, wait_for, workers

STEPS = 24


def test_killed_runs_go_on_bit_for_bit(tmp_path: Path) -> None:
    """SIGKILL at a moment nobody chose; with a checkpoint a step it is often inside a checkpoint's writing."""
    arguments = [
        "--steps",
        STEPS,
        "--checkpoint-every",
        1,
        "--eval-images",
        0,
        "--out",
        tmp_path / "killed",
        "--resume",
    ]
    process = start(command(*arguments))
    wait_for(process, tmp_path / "killed", 9)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    done = start(command(*arguments))
    output, _ = done.communicate(timeout=120)
    assert done.returncode == 0, output
    resumed = int(output.split("resuming after step ")[1].split()[0])
    assert rows(tmp_path / "killed") == STEPS and resumed >= 8  # the interval is one step: one step may be lost
    torch.set_num_threads(1)
    train(tiny(STEPS), tmp_path / "whole", Options(eval_images=0))
    assert curve(tmp_path / "killed") == curve(tmp_path / "whole")


@pytest.mark.parametrize("what", ["worker killed", "group asked to end"])
def test_processes_that_prepare_images(tmp_path: Path, what: str) -> None:
    """One that is killed is named and the run can go on; a signal to all at once ends no step halfway.

    Nothing is left of them afterwards.
    """
    if not sys.platform.startswith("linux"):
        pytest.skip("finds the workers through /proc")
    flags = ["--data", folder_of_classes(tmp_path / "data"), "--workers", 2, "--steps", 10**5, "--eval-images", 0]
    out = tmp_path / "out"
    process = start(command(*flags, "--checkpoint-every", 2, "--out", out), start_new_session=True)
    wait_for(process, out, 4)
    prepare = workers(process.pid)
    assert len(prepare) == 2
    if what == "worker killed":
        os.kill(prepare[0], signal.SIGKILL)
    else:
        os.killpg(process.pid, signal.SIGTERM)
    output, _ = process.communicate(timeout=60)
    if what == "worker killed":  # the other worker may complain of its lost companion
        said = "error: train: a process that prepares images is gone ("
        assert process.returncode == 2 and said in output, output
    else:
        assert "Traceback" not in output, output
        assert process.returncode == 130 and f"resume goes on after step {rows(out)}" in output, output
    assert not any(Path(f"/proc/{pid}").exists() for pid in prepare)
    assert (out / "log.jsonl").read_bytes().endswith(b"}\n")


def test_processes_that_prepare_images_leave_signals_to_the_parent_from_birth(tmp_path: Path) -> None:
    """Started as Python 3.14 does by itself: a signal to all at once ended the fork server and those that it made."""
    set_up = "import multiprocessing, sys; multiprocessing.set_start_method('forkserver'); "
    _, _, _, *flags = command("--data", folder_of_classes(tmp_path / "data"), "--workers", 1, "--steps", 10**5)
    code = f"{set_up}from inception_fast.cli import main; sys.exit(main(sys.argv[1:]))"
    out = tmp_path / "out"
    process = start([sys.executable, "-c", code, *flags, "--out", str(out)], start_new_session=True)
    end = time.monotonic() + 120
    while not (out / "log.jsonl").exists():
        assert process.poll() is None and time.monotonic() < end, process.communicate()[0]
        time.sleep(0.01)
    time.sleep(0.3)  # inside what a worker imports
    os.killpg(process.pid, signal.SIGTERM)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 130 and "resume goes on after step 1" in output, output


def test_two_processes_equal_one_and_survive_a_killed_worker(tmp_path: Path) -> None:
    """Batch norm over the whole batch, dropout of the whole batch: the curve is one process's but for rounding.

    One worker is killed on the way; torchrun starts both again, and they go on from the last checkpoint.
    """
    if not sys.platform.startswith("linux"):
        pytest.skip("finds the workers through /proc")
    run = "--max-restarts 1 --monitor-interval 0.2".split()
    flags = ["--steps", STEPS, "--checkpoint-every", 4, "--eval-images", 0, "--option", "drop_rate=0.3"]
    process = start(under_torchrun(command(*flags, "--out", tmp_path / "two"), *run))
    wait_for(process, tmp_path / "two", 9)
    os.kill(max(workers(process.pid)), signal.SIGKILL)
    output, _ = process.communicate(timeout=200)
    assert process.returncode == 0, output
    assert "resuming after step" in output
    assert "/gloo/" not in output, output
    torch.set_num_threads(1)
    train(tiny(STEPS, options={"drop_rate": 0.3}), tmp_path / "one", Options(eval_images=0))
    two, one = curve(tmp_path / "two"), curve(tmp_path / "one")
    assert [row[0] for row in two] == list(range(1, STEPS + 1))
    for a, b in zip(two, one, strict=True):
        assert a[2:4] == pytest.approx(b[2:4], rel=1e-3), f"step {a[0]}"
    assert json.loads((tmp_path / "two" / "summary.json").read_text())["processes"] == 2


def test_a_process_that_lost_its_companion_says_so(tmp_path: Path) -> None:
    """Without torchrun, which may end the one that is left before that has spoken."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        meet = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1]), "WORLD_SIZE": "2"}
    run = command("--steps", 10**6, "--eval-images", 0, "--out", tmp_path)
    first, second = (start(["env", *(f"{k}={v}" for k, v in (meet | {"RANK": str(i)}).items()), *run]) for i in (0, 1))
    wait_for(first, tmp_path, 3)
    second.kill()
    output, _ = first.communicate(timeout=120)
    second.communicate()
    said = [line for line in output.splitlines() if line.startswith("inception-fast: error:")]
    assert first.returncode == 2 and len(said) == 1 and "/gloo/" not in output, output
    assert said[0].startswith("inception-fast: error: train: another process of this run is gone ("), output


def test_shared_out_weights_give_the_same_curve_and_whole_checkpoints(tmp_path: Path) -> None:
    """FSDP2 over two processes: one process's curve but for rounding, and one process goes on from its checkpoint."""
    steps, root = 6, tmp_path / "shared"
    flags = ["--steps", steps, "--checkpoint-every", 3, "--eval-images", 20]
    process = start(under_torchrun(command(*flags, "--out", root, "--shard")))
    output, _ = process.communicate(timeout=200)
    assert process.returncode == 0, output
    torch.set_num_threads(1)
    summary = train(tiny(steps), tmp_path / "one", Options(checkpoint_every=3, eval_images=20))
    for a, b in zip(curve(root), curve(tmp_path / "one"), strict=True):
        assert a[2:4] == pytest.approx(b[2:4], rel=1e-5), f"step {a[0]}"
    shared = json.loads((root / "summary.json").read_text())
    assert shared["evaluation"]["loss"] == pytest.approx(summary["evaluation"]["loss"], rel=1e-4)
    name = f"checkpoint-{steps:08d}.safetensors"
    theirs, ours = (read(folder / name)[0] for folder in (root, tmp_path / "one"))
    assert {key: value.shape for key, value in theirs.items()} == {key: value.shape for key, value in ours.items()}
    for key, value in ours.items():
        torch.testing.assert_close(theirs[key], value, rtol=1e-3, atol=1e-5, msg=key)
    (root / name).unlink()
    train(tiny(steps), root, Options(checkpoint_every=3, eval_images=0, resume=True))
    for a, b in zip(curve(root), curve(tmp_path / "one"), strict=True):
        assert a[2:4] == pytest.approx(b[2:4], rel=1e-5), f"step {a[0]}, gone on alone"


def test_what_cannot_be_shared_out(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="sharding over one process; allowed: two or more"):
        train(tiny(1), tmp_path, Options(shard=True))
    with pytest.raises(ValueError, match="batch_norm 'local' with sharding; allowed: sync, frozen"):
        share_out(nn.Linear(2, 2), World(0, 2), "local")


@pytest.mark.parametrize("word", ["agree", "any", "mean", "sum", "gradient"])
def test_a_word_ends_when_gloo_has_let_go_of_it(monkeypatch: pytest.MonkeyPatch, word: str) -> None:
    """Who holds a tensor last needs the interpreter to free it, and a thread that needs it at its end aborts."""
    let_go: list[str] = []

    def slow(tensor: torch.Tensor, *_: int) -> None:
        thread = torch._C.ScriptList([tensor])  # C++ holds it, Python does not

        def end() -> None:
            let_go.append(word)
            thread.clear()

        threading.Timer(0.1, end).start()

    monkeypatch.setattr(distributed.dist, "broadcast", slow)
    monkeypatch.setattr(distributed.dist, "all_reduce", slow)
    world = World(1, 2)
    if word == "agree":
        assert world.agree(5) == 5
    elif word == "any":
        assert world.any(True)
    elif word == "mean":
        assert world.mean(torch.ones(2)).tolist() == [0.5, 0.5]
    else:
        total = distributed._Sum.apply(torch.ones(2, requires_grad=True))
        if word == "gradient":
            let_go.clear()
            total.sum().backward()
    assert let_go == [word]


@pytest.mark.parametrize("state", ["R", "D", "S"])
def test_a_group_ends_when_the_threads_of_gloo_are_asleep(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, state: str
) -> None:
    """Others may work on, and threads may end while they are asked."""
    monkeypatch.setattr(distributed, "TASKS", tmp_path)
    names = {1: "python", 2: "pt_gloo_runloop", 3: "a (name) b"}

    def write(number: int, state: str) -> None:
        """At once, as the system's own change."""
        (tmp_path / str(number)).mkdir(exist_ok=True)
        (tmp_path / str(number) / "new").write_text(f"{number} ({names[number]}) {state} 1 1 0")
        (tmp_path / str(number) / "new").replace(tmp_path / str(number) / "stat")

    for number, now in ((1, "R"), (2, state), (3, "R")):
        write(number, now)
    (tmp_path / "4" / "stat").mkdir(parents=True)  # cannot be read
    timer = threading.Timer(0.2, write, (2, "S"))
    timer.start()
    begin = time.monotonic()
    distributed._rest()
    waited = time.monotonic() - begin
    timer.join()
    assert waited < 2 and (state == "S" or waited >= 0.2)


def test_a_group_does_not_wait_for_ever(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(distributed, "TASKS", tmp_path)
    (tmp_path / "1").mkdir()
    (tmp_path / "1" / "stat").write_text("1 (pt_gloo_runloop) R 1")
    begin = time.monotonic()
    distributed._rest(0.1)
    assert 0.1 <= time.monotonic() - begin < 1
