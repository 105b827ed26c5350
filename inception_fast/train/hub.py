"""Hugging Face data sets, through the `datasets` package where it is installed."""

from __future__ import annotations

import importlib
from itertools import zip_longest
from operator import itemgetter
from pathlib import Path
from typing import Any

from .check import Rows, Say, judge, label, table_faults
from .labelled import Data, DataError, split

INSTALL = "pip install 'inception-fast[train]', or pip install datasets"
TRAIN_PARTS, HELD_OUT_PARTS = ("train",), ("validation", "valid", "val", "test")


def load_hub(name: str, bad: str, cache: Path | None, say: Say) -> Data:
    """ "hf:NAME": a data set of the hub, or a folder that `save_to_disk` wrote, with one image and one label column."""
    parts = _parts(name)
    train = next((parts[key] for key in TRAIN_PARTS if key in parts), None)
    if train is None:
        raise DataError(f"data {name} has the parts {', '.join(parts)}; allowed: one called train")
    held_out = next((parts[key] for key in HELD_OUT_PARTS if key in parts), None)
    columns = _columns(name, train.features)
    chosen = [train] if held_out is None else [train, held_out]
    if held_out is not None:
        _check_alike(name, columns, train.features, held_out.features)
    raw = [value for part in chosen for value in part[columns[1]]]
    labels = [label(name, index, value) for index, value in enumerate(raw)]
    names = getattr(train.features[columns[1]], "names", None)
    classes = list(names) if names else [str(value) for value in range(max(labels, default=-1) + 1)]
    source = Rows(name, classes, chosen, labels, itemgetter(columns[0]))
    counts, marks = [len(part) for part in chosen], [getattr(part, "_fingerprint", None) for part in chosen]
    left_out, problems = table_faults(source, counts, marks, cache, say)
    judge(problems, bad)
    if held_out is None:
        first, second = split(labels)
    else:
        first, second = list(range(len(train))), list(range(len(train), len(labels)))
    return Data(
        source, [i for i in first if i not in left_out], [i for i in second if i not in left_out], tuple(problems)
    )


def _parts(name: str) -> dict[str, Any]:
    where = name.removeprefix("hf:")
    if not where:
        raise DataError("data 'hf:' names no data set; allowed: hf:NAME")
    try:
        datasets: Any = importlib.import_module("datasets")
    except ImportError as error:
        raise DataError(f"data {name} needs the datasets package ({error}); {INSTALL}") from error
    try:
        found = datasets.load_from_disk(where) if Path(where).is_dir() else datasets.load_dataset(where)
    except Exception as error:  # the package raises a class of its own for each of many ways to fail
        text = " ".join(str(error).split())
        raise DataError(
            f"data {name} cannot be loaded ({text[:200] or type(error).__name__}); allowed: a data set that the hub or "
            "its cache on this machine holds, or hf:DIR, a folder that save_to_disk wrote"
        ) from error
    return dict(found) if isinstance(found, dict) else {"train": found}


def _check_alike(name: str, columns: tuple[str, str], train: Any, held_out: Any) -> None:
    """Refuses a held-out part whose labels are numbered otherwise, as classes are where each part counts its own."""
    for column in columns:
        if column not in held_out:
            raise DataError(
                f"data {name} has the column {column!r} to train on, and of what is held out {', '.join(held_out)}; "
                "allowed: the same columns"
            )
    there, here = (getattr(features[columns[1]], "names", None) for features in (held_out, train))
    if there and here and there != here:  # plain numbers have no names
        odd = next(pair for pair in zip_longest(here, there) if pair[0] != pair[1])
        raise DataError(
            f"data {name} has class {odd[0]!r} to train on where what is held out has {odd[1]!r}; allowed: the same "
            "classes in the same order"
        )


def _columns(name: str, features: Any) -> tuple[str, str]:
    """(image column, label column): the first of the type Image, and the first of the type ClassLabel or called
    label.
    """
    kinds = {column: type(feature).__name__ for column, feature in features.items()}
    images = [column for column, kind in kinds.items() if kind == "Image"]
    labels = [column for column, kind in kinds.items() if kind == "ClassLabel"] + [
        c for c in ("label", "labels") if c in kinds
    ]
    if not images or not labels:
        raise DataError(
            f"data {name} has the columns {kinds}; allowed: one of the type Image and one of the type ClassLabel"
        )
    return images[0], labels[0]
