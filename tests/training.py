"""Small runs for the tests of training: a network of a few thousand weights on 16x16 digits."""

from __future__ import annotations

import json
import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from inception_fast.train.recipe import Recipe, get_recipe
from inception_fast.train.settings import Settings

CURVE = ("step", "epoch", "loss", "cross_entropy", "accuracy", "lr", "grad_norm")
"""What two runs with equal settings share bit for bit; the rest of a row is time."""


def tiny(steps: int = 6, recipe: Recipe | None = None, **fields: Any) -> Settings:
    return Settings(
        "tiny_inception", steps=steps, batch_size=8, image_size=16, recipe=recipe or get_recipe("paper"), **fields
    )


def curve(folder: Path) -> list[tuple[Any, ...]]:
    """The rows of a run without the times."""
    lines = (folder / "log.jsonl").read_text().splitlines()
    return [tuple(row[key] for key in CURVE) for row in map(json.loads, lines)]


def command(*arguments: object) -> list[str]:
    """A training by command line of the tiny network."""
    base = "-m inception_fast train --model tiny_inception --data digits --batch-size 8 --image-size 16 --threads 1"
    return [sys.executable, *base.split(), *map(str, arguments)]


def start(arguments: list[str], **keywords: Any) -> subprocess.Popen[str]:
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    return subprocess.Popen(arguments, env=environment, **(pipes | keywords))


def under_torchrun(arguments: list[str], *flags: str) -> list[str]:
    """`arguments`, a command of this interpreter, by two processes."""
    run = [sys.executable, *"-m torch.distributed.run --standalone --nproc-per-node 2".split(), *flags]
    return run + arguments[1:]


def workers(parent: int) -> list[int]:
    """The processes of this package that a process started."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                status = (entry / "stat").read_text().rpartition(")")[2].split()
                line = (entry / "cmdline").read_bytes()
            except OSError:
                continue  # it has ended meanwhile
            if int(status[1]) == parent and b"inception_fast" in line:
                found.append(int(entry.name))
    return found


def rows(folder: Path) -> int:
    """Whole lines in a run's log."""
    path = folder / "log.jsonl"
    return path.read_bytes().count(b"\n") if path.exists() else 0


def wait_for(process: subprocess.Popen[str], folder: Path, count: int, seconds: float = 120) -> None:
    end = time.monotonic() + seconds
    while rows(folder) < count:
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < end, f"{rows(folder)} rows after {seconds} s"
        time.sleep(0.01)


def photo(path: Path, seed: int, size: tuple[int, int] = (24, 20)) -> Path:
    """Writes a noisy picture."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)
    return path


def folder_of_classes(root: Path, count: int = 6, classes: tuple[str, ...] = ("cat", "dog")) -> Path:
    for label, name in enumerate(classes):
        for i in range(count):
            photo(root / name / f"{i}.png", 100 * label + i)
    return root


@contextmanager
def small_files(size: int) -> Iterator[None]:
    """Inside, the system refuses to let a file of this process grow beyond `size` bytes, as a full disk would."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)


def damage_newest(folder: Path) -> None:
    """Flips a bit of the newest checkpoint."""
    path = max(folder.glob("checkpoint-*.safetensors"))
    content = bytearray(path.read_bytes())
    content[-10] ^= 4
    path.write_bytes(content)
