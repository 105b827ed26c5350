"""What a run says and leaves when it ends otherwise than meant: at its last step, in its judgement, short of files."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from inception_fast.train.comparison import Variant, compare
from inception_fast.train.data import lost_workers_named
from inception_fast.train.labelled import DataError
from inception_fast.train.loop import Options, train
from training import curve, folder_of_classes, tiny

QUICK = Options(checkpoint_every=2, eval_images=0)


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    torch.set_num_threads(1)
    yield


@pytest.mark.parametrize("when", ["last step", "last checkpoint"])
def test_a_signal_at_the_end_of_the_steps_ends_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, when: str
) -> None:
    """It was forgotten: the run was judged all the same, and a comparison began its next."""
    from inception_fast.train.checkpoint import Checkpoints

    said: list[str] = []
    save = Checkpoints.save

    def stop(*_: Any) -> None:
        os.kill(os.getpid(), signal.SIGTERM)

    if when == "last checkpoint":
        monkeypatch.setattr(Checkpoints, "save", lambda *a: (stop(), save(*a))[1])
    with pytest.raises(KeyboardInterrupt):
        train(tiny(1), tmp_path, QUICK, say=said.append, on_row=stop if when == "last step" else lambda row: None)
    assert said == ["stopped after step 1; resume goes on after step 1"] and not (tmp_path / "summary.json").exists()
    monkeypatch.undo()
    assert train(tiny(1), tmp_path, Options(eval_images=4, resume=True))["evaluation"]["images"] == 4


def test_a_held_out_image_that_breaks_later_is_named(tmp_path: Path) -> None:
    """Read by a worker when the steps are made: one line, and a resumed run has only the judgement left."""
    root = folder_of_classes(tmp_path / "data")
    spoilt = root / "cat" / "4.png"
    settings, whole = tiny(1, data=str(root)), spoilt.read_bytes()
    with pytest.raises(DataError, match=rf"^{spoilt} is damaged[^\n]*$"):
        train(
            settings, tmp_path / "out", Options(workers=1), on_row=lambda row: spoilt.write_bytes(whole[:60]) and None
        )
    spoilt.write_bytes(whole)
    assert train(settings, tmp_path / "out", Options(workers=1, resume=True))["evaluation"]["images"] == 2


def test_a_resumed_run_looks_at_no_image_again(tmp_path: Path) -> None:
    """Nor does another process of the same run. What is refused leaves no folder all the same."""
    root, out = folder_of_classes(tmp_path / "data"), tmp_path / "out"
    said: list[str] = []
    train(tiny(1, data=str(root)), out, Options(eval_images=0, workers=0), say=said.append)
    assert said == ["looking at 12 images"]
    train(tiny(2, data=str(root)), out, Options(eval_images=0, workers=0, resume=True), say=said.append)
    assert said[1:] == ["resuming after step 1"]
    for fields, message in (({"aux": "on"}, "auxiliary heads"), ({"bad_data": "refuse"}, "1 faults in the data")):
        if "bad_data" in fields:
            (root / "cat" / "0.png").write_text("no picture")
        with pytest.raises(ValueError, match=message):
            train(tiny(1, data=str(root), **fields), tmp_path / "refused")
        assert not (tmp_path / "refused").exists()


def test_the_dtype_of_the_callers_modules_changes_nothing(tmp_path: Path) -> None:
    train(tiny(2), tmp_path / "a", QUICK)
    torch.set_default_dtype(torch.float64)
    try:
        train(tiny(2), tmp_path / "b", QUICK)
        assert torch.get_default_dtype() is torch.float64
    finally:
        torch.set_default_dtype(torch.float32)
    assert curve(tmp_path / "a") == curve(tmp_path / "b")


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_there_are_gradients_whatever_the_caller_computes_without(tmp_path: Path, mode: Any) -> None:
    train(tiny(2), tmp_path / "a", QUICK)
    with mode():
        train(tiny(2), tmp_path / "b", QUICK)
        assert not torch.is_grad_enabled()
    assert curve(tmp_path / "a") == curve(tmp_path / "b")


def test_a_run_among_the_classes_of_its_data_is_refused(tmp_path: Path) -> None:
    """It would be a class without images for whoever resumes it, and for the second of a comparison."""
    root = folder_of_classes(tmp_path / "data")
    settings, contestants = tiny(1, data=str(root)), [Variant("a", "tiny_inception")]
    for out in (root / "run", root):
        with pytest.raises(DataError, match=f"out {out}.* lies among the classes of data {root};"):
            compare(contestants, settings, 1, out, QUICK)
    with pytest.raises(DataError, match="name a folder elsewhere"):
        train(settings, root / "run", QUICK)
    assert sorted(path.name for path in root.iterdir()) == ["cat", "dog"]
    for part in ("train", "val"):
        folder_of_classes(tmp_path / "parts" / part)
    for resume in (False, True):
        control = Options(eval_images=0, workers=0, resume=resume)
        train(tiny(1, data=str(tmp_path / "parts")), tmp_path / "parts" / "run", control)


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (OSError(24, "Too many open files"), "need more open files than the system allows.*fewer workers"),
        (RuntimeError("Too many open files. Communication with the workers is no"), "need more open files than the"),
        (
            RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed. "),
            r"is gone \(DataLoader worker .pid 7",
        ),
        (ConnectionResetError(104, "Connection reset by peer"), r"is gone \(\[Errno 104\] Connection reset by peer\)"),
        (OSError(28, "No space left on device"), None),
        (RuntimeError("another"), None),
    ],
)
def test_what_processes_that_prepare_images_lack_is_named(error: Exception, message: str | None) -> None:
    """A hundred of them hand over more files than most systems allow; what is not of them stays as it was."""
    before = signal.getsignal(signal.SIGCHLD)
    with pytest.raises(type(error) if message is None else DataError, match=message) as raised, lost_workers_named():
        raise error
    assert (raised.value is error) == (message is None)
    signal.signal(signal.SIGCHLD, before)
