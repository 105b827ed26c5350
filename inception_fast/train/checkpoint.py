"""Checkpoints that are whole or not there: one safetensors file each, written aside, synced, renamed, and sealed by a
digest.

Tensors are the file's tensors; everything else is JSON in its metadata. Reading one never runs code from it.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from ..measure.results import write_atomically
from ..weights import _safetensors

PATTERN = re.compile(r"checkpoint-(\d{8,})\.safetensors")
FORMAT = "inception_fast training checkpoint 1"
LEAST_KEPT = 2


class CheckpointError(ValueError):
    """A checkpoint that is damaged, or of another run."""


class Checkpoints:
    """Those of one folder. `keep` newest stay, at least two; `say` gets a line for all that goes wrong and is
    survived.
    """

    def __init__(self, folder: Path, keep: int = LEAST_KEPT, say: Callable[[str], None] = lambda text: None) -> None:
        if keep < LEAST_KEPT:
            raise ValueError(f"keep {keep}; allowed: {LEAST_KEPT} or more, one to fall back on")
        self.folder, self.keep, self.say = folder, keep, say

    def path(self, step: int) -> Path:
        return self.folder / f"checkpoint-{step:08d}.safetensors"

    def steps(self) -> list[int]:
        """The steps of the files that are there, sound or not, in rising order."""
        if not self.folder.is_dir():
            return []
        return sorted(int(found[1]) for p in self.folder.iterdir() if (found := PATTERN.fullmatch(p.name)))

    def save(self, step: int, tensors: Mapping[str, Tensor], state: Mapping[str, Any]) -> bool:
        """Writes one and forgets the oldest. False, after saying so, where the disk is full or refuses; older ones
        stay.
        """
        try:
            write_atomically(self.path(step), lambda scratch: write(scratch, tensors, state))
            _sync(self.folder)
        except (OSError, SafetensorError) as error:
            kept = [s for s in self.steps() if s != step]
            last = f"the last good one is of step {kept[-1]}" if kept else "there is none yet"
            reason = getattr(error, "strerror", None) or error
            self.say(f"the checkpoint of step {step} could not be written ({reason}); {last}")
            return False
        # Later ones are damaged, or the run would not have come by here again: they stand for none that is kept.
        for old in [s for s in self.steps() if s <= step][: -self.keep]:
            self.path(old).unlink(missing_ok=True)
        return True

    def load(self) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
        """The newest sound one, after saying which were damaged; None where there is none at all.

        Raises:
            CheckpointError: there are some and all of them are damaged.
        """
        for leftover in self.folder.glob(".checkpoint-*.safetensors"):
            leftover.unlink(missing_ok=True)
        steps = self.steps()
        faults = []
        for step in reversed(steps):
            try:
                return read(self.path(step))
            except CheckpointError as error:
                faults.append(str(error))
                self.say(f"{error}; falling back to the one before")
        if steps:
            raise CheckpointError(
                f"every checkpoint in {self.folder} is damaged ({faults[0]}); remove them to start afresh"
            )
        return None


def write(path: Path, tensors: Mapping[str, Tensor], state: Mapping[str, Any]) -> None:
    """Writes and syncs `path`; raises OSError or SafetensorError."""
    flat = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    text = json.dumps(state, sort_keys=True, allow_nan=False)
    save_file(flat, path, {"format": FORMAT, "state": text, "sha256": _digest(flat, text)})
    with open(path, "rb+") as file:
        os.fsync(file.fileno())


def read(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """(tensors, state) of a checkpoint. Raises CheckpointError for a truncated, foreign or altered file."""
    try:
        with _safetensors.opened(path) as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path} is damaged ({error})") from error
    if metadata.get("format") != FORMAT:
        raise CheckpointError(
            f"{path} is no training checkpoint (format {metadata.get('format')!r}; allowed: {FORMAT!r})"
        )
    text = metadata.get("state", "")
    if metadata.get("sha256") != _digest(tensors, text):
        raise CheckpointError(f"{path} is damaged (its digest does not match)")
    state: dict[str, Any] = json.loads(text)
    return tensors, state


def _digest(tensors: Mapping[str, Tensor], text: str) -> str:
    digest = hashlib.sha256(text.encode())
    for name in sorted(tensors):
        digest.update(name.encode())
        digest.update(tensors[name].reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _sync(folder: Path) -> None:
    """Makes a rename in `folder` last through a power cut."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
