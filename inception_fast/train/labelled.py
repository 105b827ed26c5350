"""What there is to train on: labelled images, and which of them are held out."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from PIL import Image

HELD_OUT = 5  # every fifth image of a class is kept for evaluation where the data set does not say which


class DataError(ValueError):
    """Data that cannot be trained on; the message is one line that names it and says what to do."""


class Source(Protocol):
    """Images with labels. `natural`: photographs, for which the papers' augmentation is meant."""

    name: str
    classes: tuple[str, ...]
    labels: list[int]
    natural: bool

    def image(self, index: int) -> Image.Image:
        """The RGB image; raises DataError where it cannot be read."""
        ...


@dataclass(frozen=True)
class Data:
    """A source with the indices to train on and those held out. bad: what was found broken and left out, in words."""

    source: Source
    train: Sequence[int]
    held_out: Sequence[int]
    bad: tuple[str, ...] = ()

    def fingerprint(self) -> str:
        """Changes with the classes, the labels, their order and the split, not with where the data lies."""
        digest = hashlib.sha256(repr((self.source.classes, list(self.train), list(self.held_out))).encode())
        digest.update(np.asarray(self.source.labels, dtype=np.int64).tobytes())
        return digest.hexdigest()[:16]

    def holds(self) -> str:
        """How much that is, in words."""
        return f"{len(self.source.classes)} classes and {len(self.train)} images to train on"


def split(labels: Sequence[int]) -> tuple[list[int], list[int]]:
    """Indices to train on and, for evaluation, every fifth of each class in order of appearance."""
    seen: dict[int, int] = {}
    train: list[int] = []
    held_out: list[int] = []
    for index, label in enumerate(labels):
        seen[label] = seen.get(label, 0) + 1
        (train if seen[label] % HELD_OUT else held_out).append(index)
    return train, held_out
