"""What decides a run's curve, and what does not: plain data, validated at once, stored in every checkpoint."""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass, field, fields
from typing import Any

from .._numbers import is_integer, is_number, plain
from .recipe import PAPER, Recipe

AUGMENTS = ("auto", "paper", "shift", "none")
AUX = ("auto", "on", "off")
BATCH_NORMS = ("sync", "local", "frozen")
DTYPES = ("float32", "bfloat16")
BAD_DATA = ("refuse", "skip")
PYTHON = {"True": True, "False": False, "None": None}
TAKEN = {
    "num_classes": "none, the data decides",
    "in_chans": "none, images are RGB",
    "aux_logits": "none, --aux on, off or auto decides",
    "weights": "none, --weights SOURCE decides",
    "features_only": "none, training needs a classifier",
    "out_indices": "none, training needs a classifier",
}
"""Arguments of `create_model` that are no options of a run, and what decides them."""


def parse_value(text: str) -> Any:
    """The value of an option on the command line: as JSON has it or Python, else the text itself.

    >>> [parse_value(text) for text in ("0.5", "true", "True", "plain")]
    [0.5, True, True, 'plain']
    """
    if text in PYTHON:
        return PYTHON[text]
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        return text


@dataclass(frozen=True)
class Settings:
    """One run. Two runs with equal settings have equal curves, bit for bit on one machine with as many threads.

    model: a name for `create_model`, or "tiny_inception"; `options` are its keyword arguments. weights: where to
    start from.
    data: "digits", a folder with a folder for each class, "hf:NAME" or "torchvision:NAME:ROOT".
    batch_size: over all processes. init_scale: factor on the initial weights of every convolution and linear layer.
    batch_norm: "sync" takes the statistics of the whole batch over all processes, "local" of each one's part,
    "frozen" learns none. winograd: as `replace_layers` has it.
    """

    model: str
    data: str = "digits"
    steps: int = 1000
    batch_size: int = 32
    image_size: int = 299
    seed: int = 0
    recipe: Recipe = PAPER
    options: dict[str, Any] = field(default_factory=dict)
    weights: str | None = None
    augment: str = "auto"
    aux: str = "auto"
    batch_norm: str = "sync"
    dtype: str = "float32"
    bad_data: str = "refuse"
    init_scale: float = 1.0
    winograd: bool = False

    def __post_init__(self) -> None:
        for item in fields(self):
            object.__setattr__(self, item.name, plain(getattr(self, item.name)))
        self._check_kinds()
        object.__setattr__(self, "options", {key: plain(value) for key, value in self.options.items()})
        for name, low, high in (
            ("steps", 1, 10**9),
            ("batch_size", 1, 65536),
            ("image_size", 1, 4096),
            ("seed", 0, 2**31 - 1),
        ):
            value = getattr(self, name)
            if not is_integer(value) or not low <= value <= high:
                raise ValueError(f"{name} {value!r}; allowed: an integer from {low} to {high}")
        for name, allowed in (
            ("augment", AUGMENTS),
            ("aux", AUX),
            ("batch_norm", BATCH_NORMS),
            ("dtype", DTYPES),
            ("bad_data", BAD_DATA),
        ):
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} {getattr(self, name)!r}; allowed: {', '.join(allowed)}")
        try:
            json.dumps(self.options, allow_nan=False)
        except (TypeError, ValueError) as error:
            raise ValueError(f"options {self.options!r} ({error}); allowed: what JSON can hold") from error
        for key, instead in TAKEN.items():
            if key in self.options:
                raise ValueError(f"option {key}={self.options[key]!r}; allowed: {instead}")
        if not isinstance(self.winograd, bool):
            raise ValueError(f"winograd {self.winograd!r}; allowed: True or False")
        if self.winograd and self.dtype != "float32":
            raise ValueError(f"winograd with dtype {self.dtype!r}; allowed: float32")
        if not is_number(self.init_scale) or not 0 < self.init_scale < 1e6:
            raise ValueError(f"init_scale {self.init_scale!r}; allowed: more than 0, below 1000000")

    def _check_kinds(self) -> None:
        """Paths become text, as every checkpoint keeps them; ValueError for what is of another kind."""
        for name in ("data", "weights"):
            value = getattr(self, name)
            if isinstance(value, os.PathLike):
                object.__setattr__(self, name, os.fspath(value))
            elif not isinstance(value, str) and (name == "data" or value is not None):
                raise ValueError(f"{name} {value!r}; allowed: text or a path")
        if not isinstance(self.recipe, Recipe):
            raise ValueError(f"recipe {self.recipe!r}; allowed: a Recipe, as get_recipe gives it")
        if not isinstance(self.options, dict):
            raise ValueError(f"options {self.options!r}; allowed: a dict")

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


def difference(old: dict[str, Any], new: Settings) -> str | None:
    """What keeps a run with settings `old` (as JSON) from going on with `new`: the first field that differs, in
    words, or None.

    More or fewer steps are allowed where the learning rate does not depend on their number.
    """
    wanted = new.as_json()
    for item in fields(new):
        # A checkpoint from before the field was has what it stands for.
        before, after = old.get(item.name, False if item.name == "winograd" else None), wanted[item.name]
        if item.name == "recipe":
            before, after = _first_difference(before or {}, after)
        if before != after and not (item.name == "steps" and not new.recipe.needs_length):
            return f"{item.name} is {before!r} there and {after!r} here"
    return None


def _first_difference(old: dict[str, Any], new: dict[str, Any]) -> tuple[Any, Any]:
    for key, value in new.items():
        if old.get(key) != value:
            return {key: old.get(key)}, {key: value}
    return None, None
