"""`train`: from settings to a folder with log, checkpoints, weights, summary and plot; again, with `resume`, from
where it stopped.
"""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from types import FrameType
from typing import Any

import torch

from .._numbers import is_integer, plain
from ..dispatch import backend_status
from ..measure.held import held
from ..measure.results import write_json
from .check import Say
from .checkpoint import LEAST_KEPT, CheckpointError, Checkpoints, read
from .data import check_apart, load_data, lost_workers_named, readable, training_loader
from .distributed import World, join
from .drift import NAME as DRIFT
from .drift import Probe
from .labelled import Data
from .log import NAME, Log, board_writer, read_log
from .settings import Settings, difference
from .stream import Stream
from .trainer import Diverged, Trainer

SUMMARY = "summary.json"
VERDICT = "data-check.json"


@dataclass(frozen=True)
class Options:
    """What does not change a run's curve. eval_images: how many held-out images the end is judged on, 0 for no
    judgement.

    export: leave model.safetensors behind. download: let torchvision fetch data. shard: every process of torchrun's
    holds its part of weights and optimizer alone (FSDP2), the checkpoints stay whole. drift_every:
    steps between two looks at how each layer's input is distributed (OUT/drift.jsonl), 0 for none."""

    checkpoint_every: int = 100
    keep: int = LEAST_KEPT
    resume: bool = False
    workers: int | None = None
    eval_images: int = 500
    tensorboard: bool = False
    device: str | None = None
    export: bool = True
    download: bool = False
    shard: bool = False
    drift_every: int = 0

    def __post_init__(self) -> None:
        for item in fields(self):
            object.__setattr__(self, item.name, plain(getattr(self, item.name)))
        for name, low in (("checkpoint_every", 1), ("keep", LEAST_KEPT), ("eval_images", 0), ("drift_every", 0)):
            value = getattr(self, name)
            if not is_integer(value) or value < low:
                raise ValueError(f"{name} {value!r}; allowed: an integer, {low} or more")
        if self.workers is not None and not (is_integer(self.workers) and 0 <= self.workers <= 256):
            raise ValueError(f"workers {self.workers!r}; allowed: an integer from 0 to 256")


@dataclass
class Run:
    """Everything one run works with."""

    settings: Settings
    options: Options
    out: Path
    world: World
    data: Data
    trainer: Trainer
    checkpoints: Checkpoints
    say: Say
    probe: Probe | None
    weights: dict[str, torch.Tensor] = field(default_factory=dict)  # whole, once the steps are made
    seconds: float = 0.0  # spent on steps, in this process and those before it


def train(
    settings: Settings,
    out: Path | str,
    options: Options | None = None,
    *,
    say: Say = lambda text: None,
    on_row: Callable[[dict[str, Any]], None] = lambda row: None,
) -> dict[str, Any]:
    """Trains and returns the summary, also in OUT/summary.json. `say` gets remarks, `on_row` each step's row of
    OUT/log.jsonl.

    Under torchrun every process calls this with the same arguments; the first writes. SIGINT and SIGTERM end it after
    a last checkpoint.

    Raises:
        ValueError: the settings, the data or the checkpoint to resume from cannot be used; another run writes to OUT.
        OSError: the log cannot be written.
        KeyboardInterrupt: a signal asked for the end.
    """
    options = options or Options()
    with torch.random.fork_rng(devices=[]), _float32(), _gradients(), join(options.device) as world:
        quiet: Say = say if world.leader else lambda text: None
        run = _prepare(settings, Path(out), options, world, quiet)
        with _begun(run), lost_workers_named():
            status = _fit(run, on_row if world.leader else lambda row: None)
            run.weights = run.trainer.whole_weights()
            return _summary(run, status) if world.leader else {}


@contextmanager
def _gradients() -> Iterator[None]:
    """There are some, whatever the caller computes without."""
    with torch.inference_mode(False), torch.enable_grad():
        yield


@contextmanager
def _float32() -> Iterator[None]:
    """Weights are of that, whatever dtype the caller's own modules are made with."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def _prepare(settings: Settings, out: Path, options: Options, world: World, say: Say) -> Run:
    backend_status()  # raises where INCEPTION_FAST_ISA names what this machine cannot run
    there = out.exists()
    try:
        return _prepared(settings, out, options, world, say)
    except BaseException:
        if world.leader and not there and out.is_dir():  # what is refused leaves no folder
            (out / VERDICT).unlink(missing_ok=True)
            with suppress(OSError):
                out.rmdir()
        raise


def _prepared(settings: Settings, out: Path, options: Options, world: World, say: Say) -> Run:
    resume = options.resume or world.begun(str(out))
    if out.exists() and not out.is_dir():
        raise ValueError(f"out {out} is a file; name a folder")
    checkpoints = Checkpoints(out, options.keep, say)
    with world.leader_first():
        check_apart(settings.data, out)
        if not resume and world.leader:
            _check_free(checkpoints)
        if options.tensorboard and world.leader:
            board_writer()
        data = load_data(settings.data, settings.bad_data, out / VERDICT, say, options.download)
    for fault in data.bad[:10]:
        say(f"left out: {fault}")
    if data.bad:
        say(f"{len(data.bad)} faults in {data.source.name}; {len(data.train)} images to train on")
    trainer = Trainer(settings, data, world, options.shard)
    probe = Probe(trainer, data) if options.drift_every else None
    return Run(settings, replace(options, resume=resume), out, world, data, trainer, checkpoints, say, probe)


def _check_free(checkpoints: Checkpoints) -> None:
    out = checkpoints.folder
    if checkpoints.steps() or (out / NAME).exists():
        raise ValueError(f"{out} holds a run already; resume it, or name another folder")


@contextmanager
def _begun(run: Run) -> Iterator[None]:
    """Holds the folder, in which the rows and checkpoints of two runs would replace each other, and resumes."""
    run.out.mkdir(parents=True, exist_ok=True)
    with ExitStack() as stack:
        with run.world.leader_first():
            if run.world.leader:
                stack.enter_context(held(run.out))
                if not run.options.resume:
                    _check_free(run.checkpoints)  # again: the data may have taken long
        run.world.begin(str(run.out))
        if run.options.resume:
            _resume(run)
        yield


def _resume(run: Run) -> None:
    """Loads the newest sound checkpoint, the same on every process; without any the run starts at the beginning and
    says so.
    """
    with run.world.leader_first():
        found = run.checkpoints.load() if run.world.leader else None
    step = run.world.agree(found[1]["step"] if found else 0)
    if not step:
        run.say(f"no checkpoint in {run.out} yet: starting at the beginning")
        return
    if found is None:
        found = read(run.checkpoints.path(step))
    tensors, state = found
    odd = difference(state["settings"], run.settings)
    if odd is None and state["data"] != run.data.fingerprint():
        there, here = state.get("holds"), run.data.holds()
        odd = "its data has other images, labels or classes"
        if there not in (None, here):
            odd = f"its data has {there} there and {here} here"
    if odd:
        raise CheckpointError(f"the checkpoint in {run.out} is of another run: {odd}")
    if step > run.settings.steps:
        raise CheckpointError(
            f"the checkpoint in {run.out} is of step {step}; allowed: steps {step} or more, not {run.settings.steps}"
        )
    run.trainer.load(tensors, step)
    run.seconds = state["seconds"]
    if state["threads"] != torch.get_num_threads() or state["processes"] != run.world.size:
        run.say("other threads or processes than before: the curve may differ in its last bits")
    kept = {row["step"] for row in read_log(run.out)} if run.world.leader else set(range(1, step + 1))
    if gone := step - sum(number <= step for number in kept):
        run.say(f"{run.out / NAME} has lost {gone} of the {step} rows up to here: the curve has a gap")
    run.say(f"resuming after step {step}")


def _fit(run: Run, on_row: Callable[[dict[str, Any]], None]) -> str:
    """Makes the steps that are left. Returns "done" or "diverged at step N"."""
    s, trainer = run.settings, run.trainer
    start = trainer.steps_done
    stream = Stream(run.data.train, s.batch_size, s.seed, start, s.steps, run.world.rank, run.world.size)
    loader = training_loader(run.data, stream, s.image_size, s.augment, _workers(run))
    saved = start
    with _log(run) as log, _drift(run) as look, _stop_asked(run.world) as stop:
        clock = time.perf_counter()
        for images, labels in readable(loader):
            try:
                row = trainer.step(images, labels, stream.epoch(trainer.steps_done))
            except Diverged as error:
                run.say(str(error))
                return f"diverged at step {error.step}"
            now = time.perf_counter()
            run.seconds, took, clock = run.seconds + now - clock, now - clock, now
            done = trainer.steps_done
            row = {"step": done, "epoch": stream.epoch(done)} | row
            row |= {"seconds": run.seconds, "images_per_second": s.batch_size / max(took, 1e-9)}
            if run.world.leader:
                log(row)
                look()
                on_row(row)
            stopped = stop()
            if done % run.options.checkpoint_every == 0 or done == s.steps or stopped:
                saved = _save(run, done) or saved
            if stopped or (done == s.steps and stop()):  # nobody behind the last step looks again
                saved = run.world.agree(saved)  # none leaves before the leader has written
                run.say(f"stopped after step {done}; resume goes on after step {saved}")
                raise KeyboardInterrupt
    return "done"


def _save(run: Run, step: int) -> int | None:
    """Writes a checkpoint; returns its step, or None where the disk refused."""
    tensors = run.trainer.tensors()
    if not run.world.leader:
        return None
    state = {
        "step": step,
        "settings": run.settings.as_json(),
        "data": run.data.fingerprint(),
        "holds": run.data.holds(),
        "seconds": run.seconds,
        "threads": torch.get_num_threads(),
        "processes": run.world.size,
    }
    return step if run.checkpoints.save(step, tensors, state) else None


def _workers(run: Run) -> int:
    """Processes that prepare images: photographs are worth some, the 8x8 digits none."""
    if run.options.workers is not None:
        return run.options.workers
    return min(4, torch.get_num_threads()) if run.data.source.natural else 0


@contextmanager
def _log(run: Run) -> Iterator[Callable[[dict[str, Any]], None]]:
    """The writer of rows; on all processes but the leader one that writes nothing."""
    if not run.world.leader:
        yield lambda row: None
        return
    with Log(run.out, run.trainer.steps_done, run.options.tensorboard) as log:
        yield log.write


@contextmanager
def _drift(run: Run) -> Iterator[Callable[[], None]]:
    """Called after each step, writes a row of OUT/drift.jsonl where one is due; the first is of the start."""
    every, trainer, probe = run.options.drift_every, run.trainer, run.probe
    if probe is None:
        yield lambda: None
        return
    with Log(run.out, trainer.steps_done, name=DRIFT) as log:

        def look() -> None:
            if trainer.steps_done % every == 0:
                log.write(probe.row())

        if not trainer.steps_done:
            look()
        yield look


@contextmanager
def _stop_asked(world: World) -> Iterator[Callable[[], bool]]:
    """Whether SIGINT or SIGTERM came to any process: noted, so that the step at work ends whole on all of them.

    torchrun passes a signal on to its processes, waits for them, 30 seconds by itself, and kills them then.
    """
    asked: list[int] = []
    before = {}

    def note(number: int, frame: FrameType | None) -> None:
        if asked and world.size == 1:  # the second time means at once
            raise KeyboardInterrupt
        asked.append(number)

    if threading.current_thread() is threading.main_thread():
        before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield lambda: world.any(bool(asked))
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _summary(run: Run, status: str) -> dict[str, Any]:
    """Judges the result, writes weights, summary and plot."""
    from .report import broken, export_weights, plot_run

    rows = read_log(run.out)
    last = rows[-20:]
    trainer = run.trainer
    summary: dict[str, Any] = {
        "status": status,
        "settings": run.settings.as_json(),
        "data": {
            "name": run.data.source.name,
            "classes": list(run.data.source.classes),
            "train": len(run.data.train),
            "held_out": len(run.data.held_out),
            "left_out": len(run.data.bad),
            "fingerprint": run.data.fingerprint(),
        },
        "steps": trainer.steps_done,
        "parameters": trainer.parameters,
        "auxiliary_heads": trainer.aux,
        "macs_per_image": trainer.macs,
        "flops_per_step": 6 * trainer.macs * run.settings.batch_size,
        "loss": sum(row["loss"] for row in last) / len(last) if last else None,
        "accuracy": sum(row["accuracy"] for row in last) / len(last) if last else None,
        "evaluation": trainer.evaluate(run.data, run.options.eval_images, _workers(run), run.weights),
        "seconds": run.seconds,
        "processes": run.world.size,
        "threads": torch.get_num_threads(),
        "files": [NAME, DRIFT] if run.probe else [NAME],
    }
    if run.options.export and (odd := broken(run.weights)):
        run.say(f"{odd} has values that are no finite numbers: no weights are left behind")
    classes = summary["data"]["classes"]
    weights = export_weights(trainer, run.out, run.weights, classes) if run.options.export else None
    summary["files"] += [path.name for path in (weights, plot_run(run.out, rows)) if path]
    summary["files"] += [run.checkpoints.path(step).name for step in run.checkpoints.steps()]
    write_json(run.out / SUMMARY, summary)
    return summary
