"""Runs: resumed bit for bit, ended by what cannot go on, judged and exported at the end."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

from inception_fast import create_model, dispatch
from inception_fast.cli import main
from inception_fast.images import prepare_batch
from inception_fast.train import loop
from inception_fast.train.data import Normalise, evaluation_loader, load_data
from inception_fast.train.distributed import SharedDropout, World, share_statistics
from inception_fast.train.loop import Options, train
from inception_fast.train.networks import REDUCTIONS, TinyInception
from inception_fast.train.recipe import get_recipe
from inception_fast.train.settings import Settings
from inception_fast.train.trainer import Trainer
from training import curve, damage_newest, folder_of_classes, tiny

ARGUMENTS = "train --model tiny_inception --data digits --steps 4 --batch-size 8 --image-size 16".split()
QUICK = Options(checkpoint_every=2, eval_images=0)


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    torch.set_num_threads(1)
    yield


def test_a_run_leaves_log_checkpoints_summary_and_picture(tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = []
    summary = train(tiny(5), tmp_path, Options(checkpoint_every=2, eval_images=20), on_row=rows.append)
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5]
    assert [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()] == rows
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        ".lock",
        "checkpoint-00000004.safetensors",
        "checkpoint-00000005.safetensors",
        "curves.svg",
        "log.jsonl",
        "summary.json",
    ]
    assert json.loads((tmp_path / "summary.json").read_text()) == summary
    assert summary["status"] == "done" and summary["evaluation"]["images"] == 20
    assert summary["flops_per_step"] == 6 * 8 * summary["macs_per_image"] > 0
    assert (tmp_path / "curves.svg").read_text().count("<polyline") == 3


def test_training_learns_the_digits(tmp_path: Path) -> None:
    settings = Settings("tiny_inception", steps=60, batch_size=32, image_size=16)
    summary = train(settings, tmp_path, Options(eval_images=200))
    assert summary["accuracy"] > 0.7 and summary["evaluation"]["accuracy"] > 0.7


@pytest.mark.parametrize(("recipe", "optimizer"), [("paper", None), ("modern", None), ("modern", "adamw")])
def test_resumed_equals_uninterrupted(
    tmp_path: Path, recipe: str, optimizer: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run that dies between two checkpoints repeats the steps since the last and gives the same curve and weights."""
    settings = tiny(7, get_recipe(recipe, optimizer=optimizer))
    train(settings, tmp_path / "whole", QUICK)

    def die(row: dict[str, Any]) -> None:
        if row["step"] == 5:
            raise RuntimeError("power cut")

    with pytest.raises(RuntimeError, match="power cut"):
        train(settings, tmp_path / "cut", QUICK, on_row=die)
    said: list[str] = []
    train(settings, tmp_path / "cut", Options(checkpoint_every=2, eval_images=0, resume=True), say=said.append)
    assert said == ["resuming after step 4"]
    assert curve(tmp_path / "cut") == curve(tmp_path / "whole")
    name = "checkpoint-00000007.safetensors"
    whole, cut = (loop.read(tmp_path / run / name)[0] for run in ("whole", "cut"))
    assert whole.keys() == cut.keys() and all(torch.equal(whole[key], cut[key]) for key in whole)
    assert {key.partition("/")[0] for key in whole} == {"model", "average", "optimizer"}


def test_resume_falls_back_from_a_damaged_checkpoint(tmp_path: Path) -> None:
    train(tiny(6), tmp_path / "whole", QUICK)
    train(tiny(6), tmp_path / "cut", QUICK)
    damage_newest(tmp_path / "cut")
    said: list[str] = []
    train(tiny(6), tmp_path / "cut", Options(checkpoint_every=2, eval_images=0, resume=True), say=said.append)
    assert "checkpoint-00000006" in said[0] and said[1] == "resuming after step 4"
    assert curve(tmp_path / "cut") == curve(tmp_path / "whole")


def test_a_half_written_row_is_dropped(tmp_path: Path) -> None:
    train(tiny(4), tmp_path / "whole", QUICK)
    train(tiny(2), tmp_path / "cut", QUICK)
    with open(tmp_path / "cut" / "log.jsonl", "a") as file:
        file.write('{"step": 3, "lo')
    train(tiny(4), tmp_path / "cut", Options(checkpoint_every=2, eval_images=0, resume=True))
    assert curve(tmp_path / "cut") == curve(tmp_path / "whole")


@pytest.mark.parametrize("broken", [None, b'{"step": 2, "lo', b"\xff\xfe\0", b"2", b'{"loss": 1}'])
def test_a_log_that_lost_rows_is_told(tmp_path: Path, broken: bytes | None) -> None:
    """A line cut in the middle takes none behind it along."""
    train(tiny(4), tmp_path, QUICK)
    log = tmp_path / "log.jsonl"
    lines = log.read_bytes().splitlines()
    left = lines[:1] if broken is None else [lines[0], broken, *lines[2:]]
    log.write_bytes(b"\n".join(left) + b"\n")
    said: list[str] = []
    train(tiny(5), tmp_path, Options(checkpoint_every=2, eval_images=0, resume=True), say=said.append)
    gone = 3 if broken is None else 1
    assert said == [f"{log} has lost {gone} of the 4 rows up to here: the curve has a gap", "resuming after step 4"]
    assert [row[0] for row in curve(tmp_path)] == ([1, 5] if broken is None else [1, 3, 4, 5])


def test_resume_of_a_finished_run_does_nothing(tmp_path: Path) -> None:
    train(tiny(3), tmp_path, QUICK)
    before = curve(tmp_path)
    summary = train(tiny(3), tmp_path, Options(checkpoint_every=2, eval_images=0, resume=True))
    assert summary["status"] == "done" and summary["steps"] == 3 and curve(tmp_path) == before


def test_workers_and_intervals_do_not_change_the_curve(tmp_path: Path) -> None:
    data = str(folder_of_classes(tmp_path / "data"))
    settings = tiny(3, data=data)
    train(settings, tmp_path / "a", Options(checkpoint_every=1, eval_images=0, workers=0))
    train(settings, tmp_path / "b", Options(checkpoint_every=3, eval_images=0, workers=2))
    assert curve(tmp_path / "a") == curve(tmp_path / "b")
    train(tiny(3, data=data, seed=1), tmp_path / "c", QUICK)
    assert curve(tmp_path / "c") != curve(tmp_path / "a")


def test_sigterm_ends_after_a_checkpoint(tmp_path: Path) -> None:
    import os
    import signal

    train(tiny(6), tmp_path / "whole", QUICK)

    def stop(row: dict[str, Any]) -> None:
        if row["step"] == 3:
            os.kill(os.getpid(), signal.SIGTERM)

    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(KeyboardInterrupt):
        train(tiny(6), tmp_path / "cut", Options(checkpoint_every=100, eval_images=0), on_row=stop)
    assert signal.getsignal(signal.SIGTERM) is before
    assert (tmp_path / "cut" / "checkpoint-00000003.safetensors").exists()
    train(tiny(6), tmp_path / "cut", Options(eval_images=0, resume=True))
    assert curve(tmp_path / "cut") == curve(tmp_path / "whole")


def test_divergence_ends_the_run_and_is_told(tmp_path: Path) -> None:
    said: list[str] = []
    recipe = get_recipe("modern", lr=1e8, clip=0.0, warmup=0.0)
    summary = train(tiny(50, recipe, options={"norm": False}), tmp_path, QUICK, say=said.append)
    assert summary["status"].startswith("diverged at step ") and summary["steps"] < 50
    assert any("not a finite number" in text for text in said)
    assert len(curve(tmp_path)) == summary["steps"]


def test_weights_with_broken_statistics_are_not_left_behind(tmp_path: Path) -> None:
    """The forward pass of the step that diverges moves the statistics; without an average they are the result's."""
    said: list[str] = []
    recipe = get_recipe("modern", lr=1e30, ema=0.0, clip=0.0, warmup=0.0)
    settings = Settings("inception_v1", steps=4, batch_size=2, image_size=32, aux="off", recipe=recipe)
    summary = train(settings, tmp_path, QUICK, say=said.append)
    assert summary["status"].startswith("diverged") and "model.safetensors" not in summary["files"]
    assert not (tmp_path / "model.safetensors").exists() and "no weights are left behind" in said[-1]


def test_options_that_cannot_be_kept_are_refused() -> None:
    for value in (torch.float32, {1, 2}, float("nan")):
        with pytest.raises(ValueError, match="allowed: what JSON can hold"):
            tiny(options={"width": value})


def test_paths_of_data_and_weights_are_taken_as_their_text(tmp_path: Path) -> None:
    """A path for the weights ended the run at its first checkpoint, which JSON could not hold."""
    start, data = tmp_path / "start", folder_of_classes(tmp_path / "data")
    recipe = get_recipe("modern")
    first = Settings("inception_v1", steps=1, batch_size=2, image_size=32, aux="off", data=data, recipe=recipe)  # type: ignore[arg-type]
    train(first, start, QUICK)
    train(replace(first, weights=start / "model.safetensors"), tmp_path / "out", QUICK)  # type: ignore[arg-type]
    _, state = loop.read(tmp_path / "out" / "checkpoint-00000001.safetensors")
    assert state["settings"]["data"] == str(data)
    assert state["settings"]["weights"] == str(start / "model.safetensors")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"data": None}, "data None; allowed: text or a path"),
        ({"weights": b"x"}, "weights b'x'; allowed: text or a path"),
        ({"options": None}, "options None; allowed: a dict"),
        ({"recipe": "paper"}, "recipe 'paper'; allowed: a Recipe"),
        ({"init_scale": "1"}, "init_scale '1'; allowed: more than 0"),
    ],
)
def test_settings_of_another_kind_are_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Settings("tiny_inception", **fields)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"checkpoint_every": 2.5}, "checkpoint_every 2.5; allowed: an integer, 1 or more"),
        ({"eval_images": None}, "eval_images None; allowed: an integer, 0 or more"),
        ({"workers": "2"}, "workers '2'; allowed: an integer from 0 to 256"),
    ],
)
def test_options_of_another_kind_are_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Options(**fields)


def test_gradient_is_clipped_and_label_smoothing_counts(tmp_path: Path) -> None:
    smooth = get_recipe("paper", clip=1e-6, label_smoothing=0.5)
    train(tiny(2, smooth), tmp_path, QUICK)
    first, second = curve(tmp_path)
    assert first[2] != first[3]  # loss beside cross entropy
    assert first[6] > 1e-3  # the norm before clipping
    assert abs(second[3] - first[3]) < 0.5


def test_frozen_batch_norm_keeps_its_statistics() -> None:
    trainer = Trainer(tiny(batch_norm="frozen"), load_data("digits"), World())
    before = {key: value.clone() for key, value in trainer.model.state_dict().items()}
    trainer.step(torch.randint(0, 255, (8, 3, 16, 16), dtype=torch.uint8), torch.arange(8), 0.0)
    after = trainer.model.state_dict()
    assert all(torch.equal(before[key], after[key]) for key in before if ".bn." in key)
    assert not torch.equal(before["stem.conv.weight"], after["stem.conv.weight"])


def test_auxiliary_loss_counts_with_its_weight() -> None:
    """Two heads that say the same as the main one add their shares of the same loss."""
    settings = tiny(recipe=get_recipe("paper", aux_weight=0.4))
    trainer = Trainer(settings, load_data("digits"), World())
    logits, labels = torch.randn(4, 10), torch.arange(4)
    alone, _ = trainer._loss(logits, labels)
    three, main_head = trainer._loss((logits, logits, logits), labels)
    assert three.item() == pytest.approx(1.8 * alone.item()) and main_head is logits


def test_dropout_of_parts_is_dropout_of_the_whole() -> None:
    x = torch.ones(6, 50)

    def dropped(rows: torch.Tensor, world: World) -> torch.Tensor:
        with SharedDropout(3, world):
            return nn.Dropout(0.4)(rows)

    whole = dropped(x, World())
    parts = [dropped(x[2 * rank : 2 * rank + 2], World(rank, 3)) for rank in range(3)]
    assert torch.equal(torch.cat(parts), whole)
    assert whole.unique().tolist() == pytest.approx([0.0, 1 / 0.6])
    assert 0.3 < (whole == 0).float().mean() < 0.5
    with SharedDropout(3, World()):
        assert F.dropout(x, 0.4, training=False) is x
        assert torch.equal(F.dropout(x, 1.0), torch.zeros_like(x))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_batch_norm_of_all_processes_takes_narrow_maps(dtype: torch.dtype) -> None:
    """Of one process alone it is torch's batch norm, output and statistics, in autocast's format too."""
    x = (torch.randn(4, 3, 5, 5) * 2 + 7).to(dtype)
    plain = nn.BatchNorm2d(3)
    shared = nn.Sequential(copy.deepcopy(plain))
    share_statistics(shared)
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        found = shared(x)
    finally:
        dist.destroy_process_group()
    torch.testing.assert_close(found, plain(x))
    torch.testing.assert_close(shared.state_dict(), {f"0.{name}": value for name, value in plain.state_dict().items()})


def test_a_model_of_the_package_trains_and_its_weights_load(tmp_path: Path) -> None:
    settings = Settings("inception_v1", steps=1, batch_size=2, image_size=16, aux="off", recipe=get_recipe("modern"))
    summary = train(settings, tmp_path, Options(eval_images=2))
    assert summary["parameters"] == 5_610_154 and not summary["auxiliary_heads"]
    model = create_model("inception_v1", weights=tmp_path / "model.safetensors").eval()
    assert model.num_classes == 10 and model.data_config.input_size == (3, 16, 16)
    data = load_data("digits")
    ((pixels, labels),) = evaluation_loader(data, 2, 2, 16, workers=0)
    judged = [data.source.image(data.held_out[i]) for i in (0, len(data.held_out) // 2)]
    images = prepare_batch(judged, model.data_config)
    seen = Normalise(model.data_config.mean, model.data_config.std, torch.device("cpu"))(pixels)
    torch.testing.assert_close(images, seen, rtol=0, atol=1e-6)  # the pixels that the accuracy was measured on
    with torch.inference_mode():
        loss = float(F.cross_entropy(model(images), labels))
    assert summary["evaluation"]["loss"] == pytest.approx(loss, rel=1e-3)
    tensors, _ = loop.read(tmp_path / "checkpoint-00000001.safetensors")
    state = model.state_dict()
    assert all(torch.equal(tensors[f"average/{key}"], value) for key, value in state.items())


@pytest.mark.parametrize("options", [{"global_pool": "max"}, {"bn_eps": 1}])
def test_the_weights_of_a_run_make_the_network_that_was_judged(tmp_path: Path, options: dict[str, Any]) -> None:
    recipe = get_recipe("modern")
    settings = Settings("inception_v1", steps=1, batch_size=2, image_size=64, aux="off", recipe=recipe, options=options)
    summary = train(settings, tmp_path, Options(eval_images=2))
    model = create_model("inception_v1", weights=tmp_path / "model.safetensors").eval()
    ((pixels, labels),) = evaluation_loader(load_data("digits"), 2, 2, 64, workers=0)
    config = model.data_config
    with torch.inference_mode():
        logits = model(Normalise(config.mean, config.std, torch.device("cpu"))(pixels))
    assert summary["evaluation"]["loss"] == pytest.approx(float(F.cross_entropy(logits, labels)), rel=1e-3)


@pytest.mark.parametrize("aux", ["auto", "on"])
def test_auxiliary_heads_where_the_size_allows(aux: str) -> None:
    settings = Settings("inception_v3", batch_size=2, image_size=75, aux=aux)
    if aux == "on":
        with pytest.raises(ValueError, match=r"auxiliary head got a .* map; allowed: 17x17"):
            Trainer(settings, load_data("digits"), World())
    else:
        assert not Trainer(settings, load_data("digits"), World()).aux


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("residual", [False, True])
def test_tiny_network_shapes(reduction: str, residual: bool) -> None:
    model = TinyInception(7, reduction=reduction, residual=residual, norm=False, activation="sigmoid")
    assert model(torch.zeros(2, 3, 17, 18)).shape == (2, 7)
    assert not any(isinstance(module, nn.BatchNorm2d) for module in model.modules())


def refused(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """The one line of a command that ends with code 2."""
    assert main(arguments) == 2
    captured = capsys.readouterr()
    lines = [line for line in captured.err.splitlines() if "error" in line]
    assert len(lines) == 1 and "Traceback" not in captured.err and not captured.out
    return lines[0]


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (["--data", "/nowhere"], "no such folder"),
        (["--data", ""], "data ''; allowed: digits, a folder, hf:NAME, torchvision:NAME"),
        (["--data", "hf:"], "data 'hf:' names no data set; allowed: hf:NAME"),
        (["--recipe", "fast"], "recipe 'fast'; allowed: paper, modern"),
        (["--model", "inception_v9"], "inception_v9"),
        (["--image-size", "8"], "8x8; allowed: 16x16 or larger"),
        (["--image-size", "0"], "out of range"),
        (["--batch-size", "0"], "out of range"),
        (["--steps", "0"], "out of range"),
        (["--lr", "-1"], "lr -1.0; allowed"),
        (["--option", "speed=3"], "speed"),
        (["--option", "speed"], "KEY=VALUE"),
        (["--option", "norm=off"], "norm 'off'; allowed: True, False"),
        (["--option", "residual=yes"], "residual 'yes'; allowed: True, False"),
        (["--option", "num_classes=0"], "option num_classes=0; allowed: none, the data decides"),
        (["--option", "aux_logits=true"], "option aux_logits=True; allowed: none, --aux on, off or auto decides"),
        (["--option", "in_chans=1"], "option in_chans=1; allowed: none, images are RGB"),
        (["--option", "weights=x.pth"], "option weights='x.pth'; allowed: none, --weights SOURCE decides"),
        (["--option", "features_only=true"], "option features_only=True; allowed: none, training needs a classifier"),
        (["--model", "nope"], "inception_v4, tiny_inception"),
        (["--model", "tiny_inceptoin"], "(did you mean tiny_inception"),
        (["--model", "inception_v1", "--option", "out_indices=[1]"], "option out_indices=[1]; allowed: none"),
        (["--device", "cuda"], "torch sees no GPU"),
        (["--device", "cuda:0"], "device 'cuda:0'; allowed: cpu, cuda"),
        (["--device", ""], "device ''; allowed: cpu, cuda"),
        (["--keep", "1"], "out of range"),
        (["--augment", "wild"], "augment 'wild'; allowed: auto, paper, shift, none"),
        (["--model", "inception_v1", "--image-size", "15", "--batch-size", "1"], "allowed: a batch of 2 or more"),
        (["--aux", "on"], "auxiliary heads"),
        (["--aux", "off", "--aux-weight", "0.3"], "--aux-weight without --aux on or auto; allowed: with"),
    ],
)
def test_requests_that_cannot_be_served(
    tmp_path: Path, more: list[str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert words in refused([*ARGUMENTS, "--out", str(tmp_path / "out"), *more], capsys)
    assert not (tmp_path / "out").exists()


def test_instructions_that_this_machine_lacks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("INCEPTION_FAST_ISA", "neon")
    dispatch._probe.cache_clear()
    assert "INCEPTION_FAST_ISA=neon; this machine can run: generic" in refused(
        [*ARGUMENTS, "--out", str(tmp_path / "out")], capsys
    )
    assert not (tmp_path / "out").exists()


def test_what_ends_before_its_first_step_is_no_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Such as a batch that memory does not hold."""
    with monkeypatch.context() as patch, pytest.raises(RuntimeError, match="no room"):
        patch.setattr(Trainer, "step", Mock(side_effect=RuntimeError("no room")))
        train(tiny(2), tmp_path, QUICK)
    assert train(tiny(2), tmp_path, QUICK)["status"] == "done"


def test_frozen_batch_norm_takes_one_image_at_a_time(tmp_path: Path) -> None:
    settings = Settings("inception_v1", steps=1, batch_size=1, image_size=15, batch_norm="frozen")
    assert train(settings, tmp_path, Options(eval_images=0, export=False))["status"] == "done"


def test_out_that_is_taken(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    here = [*ARGUMENTS, "--eval-images", "0", "--out", str(tmp_path)]
    assert main([*here, "--json"]) == 0
    summary = json.loads(capsys.readouterr().out)
    assert summary["status"] == "done" and summary["steps"] == 4
    assert "holds a run already" in refused(here, capsys)
    assert "of another run: model is 'tiny_inception' there" in refused(
        [*here, "--resume", "--model", "inception_v1", "--image-size", "16"], capsys
    )
    assert "seed is 0 there and 1 here" in refused([*here, "--resume", "--seed", "1"], capsys)
    assert "of step 4; allowed: steps 4 or more, not 3" in refused([*here, "--resume", "--steps", "3"], capsys)
    file = tmp_path / "file"
    file.write_text("")
    assert "is a file" in refused([*ARGUMENTS, "--out", str(file)], capsys)


def test_resume_with_nothing_to_resume_starts_and_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*ARGUMENTS, "--eval-images", "0", "--out", str(tmp_path), "--resume"]) == 0
    captured = capsys.readouterr()
    assert "no checkpoint" in captured.err and "4 steps" in captured.out and "step 4/4" in captured.err


def test_tensorboard_asks_for_its_package(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    line = refused([*ARGUMENTS, "--out", str(tmp_path / "out"), "--tensorboard"], capsys)
    assert "needs tensorboard" in line and "pip install" in line
    assert not (tmp_path / "out").exists()  # the folder is free for the run without it


def test_tensorboards_failures_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its writer raises what its library has, from a thread of its own; the rows stay in the log."""

    class Full:
        def __init__(self, folder: str, purge_step: int) -> None:
            pass

        def add_scalar(self, *row: object) -> None:
            raise RuntimeError("first line\nResourceExhaustedError: No space left on device")

        def close(self) -> None:
            raise RuntimeError("once more")

    monkeypatch.setattr("inception_fast.train.log.board_writer", lambda: Full)
    monkeypatch.setattr("inception_fast.train.loop.board_writer", lambda: Full)
    with pytest.raises(OSError, match=r"TensorBoard's files beside .*log\.jsonl cannot be written .*No space left"):
        train(tiny(2), tmp_path, Options(eval_images=0, tensorboard=True))
    assert len(curve(tmp_path)) == 1


def test_an_image_that_breaks_later_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Broken after the check, read by a worker: still one line with its name, and the checkpoint stays."""
    root = folder_of_classes(tmp_path / "data")
    cache = tmp_path / "out" / "data-check.json"
    cache.parent.mkdir()
    load_data(str(root), cache=cache)
    for path in root.rglob("*.png"):
        content, times = path.read_bytes(), path.stat()
        path.write_bytes(content[:60] + bytes(len(content) - 60))
        import os

        os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
    out = ["--out", str(tmp_path / "out"), "--workers", "1"]
    line = refused([*ARGUMENTS, "--data", str(root), *out], capsys)
    assert ".png is damaged" in line and "Caught" not in line and "File" not in line


def test_winograd_by_command_line_takes_tiles(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Other bits of the same curve; a device or weights that have no tiles are refused."""
    from inception_fast.backends import train_conv

    tiles: set[tuple[int, int]] = set()
    original = train_conv._run
    monkeypatch.setattr(train_conv, "_run", lambda x, call, *a: tiles.add(call.tile) or original(x, call, *a))
    losses = []
    for flags in ([], ["--winograd"]):
        out = tmp_path / f"run{len(flags)}"
        command = "train --model inception_v1 --data digits --steps 1 --batch-size 4 --image-size 64 --eval-images 0"
        assert main([*command.split(), *flags, "--out", str(out)]) == 0
        losses.append(json.loads((out / "log.jsonl").read_text())["loss"])
    assert (4, 4) in tiles and losses[1] == pytest.approx(losses[0], rel=1e-4)
    with pytest.raises(ValueError, match="winograd with shared-out weights; allowed: whole weights on the CPU"):
        Trainer(tiny(winograd=True), load_data("digits"), World(), shard=True)
