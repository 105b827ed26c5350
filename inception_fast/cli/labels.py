"""The names of classes: from a file, from the weights' own metadata, from timm, or else the index."""

from __future__ import annotations

import json
from pathlib import Path

from .common import CommandError

IMAGENET = 1000


def find_labels(file: str | None, weights: str | None, classes: int) -> list[str]:
    """`classes` names. Raises CommandError when a named file is missing, unreadable or of another length."""
    if file is not None:
        return _from_file(Path(file), classes)
    return _from_metadata(weights, classes) or _from_timm(classes) or [str(index) for index in range(classes)]


def _from_file(path: Path, classes: int) -> list[str]:
    if not path.is_file():
        raise CommandError(f"--labels {path}: no such file; name a text file with a label a line, or a JSON list")
    try:
        text = path.read_text(encoding="utf-8-sig")
        labels = _parse_json(text) if path.suffix == ".json" else text.splitlines()
    except (UnicodeDecodeError, ValueError) as error:
        raise CommandError(
            f"--labels {path} cannot be read ({error}); allowed: a label a line, or a JSON list"
        ) from error
    while labels and not labels[-1].strip():
        labels.pop()
    if len(labels) != classes:
        raise CommandError(f"--labels {path} holds {len(labels)} labels; the model has {classes} classes")
    return [label.strip() for label in labels]


def _parse_json(text: str) -> list[str]:
    """A JSON list of names, or an object from index to name. Raises ValueError for anything else."""
    try:
        value = json.loads(text)
    except RecursionError as error:
        raise ValueError(str(error)) from error
    if isinstance(value, dict):
        try:
            value = [value[str(index)] for index in range(len(value))]
        except KeyError as error:
            raise ValueError(f"index {error} is missing") from error
    if not isinstance(value, list) or not all(isinstance(label, str) for label in value):
        raise ValueError("not a list of names")
    return value


def _from_metadata(weights: str | None, classes: int) -> list[str] | None:
    """A safetensors file may carry its labels as a JSON list under the metadata key "labels"."""
    if weights is None or not weights.endswith(".safetensors") or not Path(weights).is_file():
        return None
    from ..weights import _safetensors

    with _safetensors.opened(weights) as file:
        text = (file.metadata() or {}).get("labels")
    if text is None:
        return None
    try:
        labels = _parse_json(text)
    except ValueError as error:
        raise CommandError(f"{weights}: its labels cannot be read ({error}); pass --labels FILE") from error
    if len(labels) != classes:
        raise CommandError(f"{weights} names {len(labels)} labels for {classes} classes; pass --labels FILE")
    return labels


def _from_timm(classes: int) -> list[str] | None:
    """ImageNet's names for 1000 classes, or 1001 with a background class in front; None without timm."""
    if classes not in (IMAGENET, IMAGENET + 1):
        return None
    try:
        from timm.data import ImageNetInfo
    except (ImportError, RuntimeError):  # RuntimeError: timm meets a torchvision built for another torch
        return None
    info = ImageNetInfo()
    names = [info.index_to_description(index) for index in range(IMAGENET)]
    return names if classes == IMAGENET else ["background", *names]
