"""torchvision's data sets, from the folder that holds them: "torchvision:NAME" or "torchvision:NAME:ROOT"."""

from __future__ import annotations

import inspect
from operator import itemgetter
from pathlib import Path
from typing import Any

from .check import Rows, Say, judge, label, table_faults
from .labelled import Data, DataError, split

PREFIX = "torchvision:"
ROOT = "data"  # torchvision's own examples keep their sets there
HELD_OUT = ("val", "valid", "test")


def load_vision(name: str, bad: str, download: bool, cache: Path | None, say: Say) -> Data:
    """The parts called train and test where the set has them, else every fifth image of a class held out."""
    kind, _, root = name.removeprefix(PREFIX).partition(":")
    parts = _parts(name, _class(name, kind), root or ROOT, download)
    labels = [value for part in parts for value in _labels(name, part)]
    names = getattr(parts[0], "classes", None)
    classes = [str(each) for each in names] if names else [str(value) for value in range(max(labels, default=-1) + 1)]
    source = Rows(name, classes, parts, labels, itemgetter(0))
    left_out, problems = table_faults(source, [len(part) for part in parts], None, cache, say)
    judge(problems, bad)
    first, second = split(labels)
    if len(parts) == 2:
        first, second = list(range(len(parts[0]))), list(range(len(parts[0]), len(labels)))
    return Data(
        source, [i for i in first if i not in left_out], [i for i in second if i not in left_out], tuple(problems)
    )


def _class(name: str, kind: str) -> Any:
    try:
        from torchvision import datasets
    except (ImportError, RuntimeError) as error:  # RuntimeError: a torchvision built for another torch
        raise DataError(
            f"data {name} needs torchvision ({error}); install the one that goes with your torch"
        ) from error
    found = getattr(datasets, kind, None)
    if kind not in datasets.__all__ or not inspect.isclass(found):
        raise DataError(f"data {name}: torchvision has no data set {kind!r}; allowed: {', '.join(datasets.__all__)}")
    return found


def _parts(name: str, kind: Any, root: str, download: bool) -> list[Any]:
    """What to train on and, where the set has another part, what to judge on."""
    takes = inspect.signature(kind).parameters
    shared: dict[str, Any] = {"root": root} if "root" in takes else {}
    if download and "download" not in takes:
        raise DataError(f"data {name}: torchvision cannot download it; put its files into {root}")
    shared |= {"download": download} if "download" in takes else {}
    if "train" in takes:
        return [_made(name, kind, shared | {"train": part}) for part in (True, False)]
    if "split" not in takes:
        return [_made(name, kind, shared)]
    train = _made(name, kind, shared | {"split": "train"})
    faults = []
    for part in HELD_OUT:
        try:
            return [train, _made(name, kind, shared | {"split": part})]
        except DataError as error:
            faults.append(str(error))
    raise DataError(faults[-1])


def _made(name: str, kind: Any, arguments: dict[str, Any]) -> Any:
    try:
        return kind(**arguments)
    except Exception as error:  # each set has its own ways of missing its files
        text = " ".join(str(error).split())[:200]
        given = ", ".join(f"{key}={value!r}" for key, value in arguments.items())
        raise DataError(
            f"data {name} cannot be opened with {given} ({text or type(error).__name__}); name its folder as "
            f"{PREFIX}NAME:ROOT, or fetch it with --download"
        ) from error


def _labels(name: str, part: Any) -> list[int]:
    """From the list that most sets keep; from the images themselves where there is none."""
    for attribute in ("targets", "labels", "_labels"):
        found = getattr(part, attribute, None)
        if found is not None and len(found) == len(part):
            return [label(name, i, value) for i, value in enumerate(found)]
    return [label(name, i, part[i][1]) for i in range(len(part))]
