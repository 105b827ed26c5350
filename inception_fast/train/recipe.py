"""Recipes: which optimizer, which learning rate at which step, which regularisation. Plain data; nothing here needs
torch.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields, replace
from typing import Any

from .._numbers import is_number, plain

OPTIMIZERS = ("rmsprop_tf", "sgd", "adamw")
SCHEDULES = ("exponential", "cosine")


@dataclass(frozen=True)
class Recipe:
    """How to train.

    lr: at its highest; `schedule` bends it down: "exponential" multiplies by `decay_rate` after every `decay_epochs`
        epochs, "cosine" falls to zero at the last step. `warmup` is the fraction of all steps over which it
        first rises.
    clip: largest global norm of the gradient, 0 for no limit. aux_weight: share of each auxiliary loss in the sum.
    ema: decay of the averaged weights, min(ema, (1 + n) / (10 + n)) after n steps; 0 keeps no average.
    rms_decay, epsilon: of "rmsprop_tf"; momentum: of "rmsprop_tf" and "sgd" (Nesterov's).
    """

    name: str
    optimizer: str
    lr: float
    schedule: str
    momentum: float = 0.9
    rms_decay: float = 0.9
    epsilon: float = 1.0
    weight_decay: float = 0.0
    decay_rate: float = 0.94
    decay_epochs: float = 2
    warmup: float = 0.0
    clip: float = 0.0
    label_smoothing: float = 0.1
    aux_weight: float = 0.4
    ema: float = 0.9999

    def __post_init__(self) -> None:
        for item in fields(self):
            object.__setattr__(self, item.name, plain(getattr(self, item.name)))
            self._require(item.name, item.type == "str" or is_number(getattr(self, item.name)), "a number")
        for field, allowed in (("optimizer", OPTIMIZERS), ("schedule", SCHEDULES)):
            if getattr(self, field) not in allowed:
                raise ValueError(f"{field} {getattr(self, field)!r}; allowed: {', '.join(allowed)}")
        for field in ("lr", "epsilon", "decay_rate", "decay_epochs"):
            self._require(field, 0 < getattr(self, field) < math.inf, "a finite number more than 0")
        for field in ("momentum", "rms_decay", "label_smoothing", "ema", "warmup"):
            self._require(field, 0 <= getattr(self, field) < 1, "0 to below 1")
        for field in ("weight_decay", "clip", "aux_weight"):
            self._require(field, 0 <= getattr(self, field) < math.inf, "a finite number, 0 or more")

    def _require(self, field: str, condition: bool, allowed: str) -> None:
        if not condition:
            raise ValueError(f"{field} {getattr(self, field)!r}; allowed: {allowed}")

    def learning_rate(self, step: int, steps: int, epoch: float) -> float:
        """For the update that follows `step` finished ones of `steps`, `epoch` passes over the data having been
        made.
        """
        warm = round(self.warmup * steps)
        if step < warm:
            return self.lr * (step + 1) / (warm + 1)
        if self.schedule == "exponential":
            return self.lr * self.decay_rate ** (epoch // self.decay_epochs)
        return self.lr * 0.5 * (1 + math.cos(math.pi * (step - warm) / max(steps - warm, 1)))

    @property
    def needs_length(self) -> bool:
        """Whether the curve depends on the total number of steps, so that a run cannot be made longer later."""
        return self.schedule == "cosine" or self.warmup > 0


PAPER = Recipe("paper", "rmsprop_tf", lr=0.045, schedule="exponential", weight_decay=4e-5, clip=2.0)
"""Inception v3's, arXiv:1512.00567 section 8. Momentum and weight decay, which it does not give, are TF-slim's."""

MODERN = Recipe("modern", "sgd", lr=0.1, schedule="cosine", weight_decay=5e-5, warmup=0.05, clip=2.0)

RECIPES = {recipe.name: recipe for recipe in (PAPER, MODERN)}

ADAMW = {"lr": 1e-3, "weight_decay": 0.05}
"""Takes the place of a recipe's own values where the optimizer alone is changed to AdamW."""


def get_recipe(name: str, **overrides: Any) -> Recipe:
    """The recipe `name` with some fields changed; None leaves a field alone. Raises ValueError for what is not allowed.

    >>> get_recipe("paper", lr=0.01).lr
    0.01
    """
    if name not in RECIPES:
        raise ValueError(f"recipe {name!r}; allowed: {', '.join(RECIPES)}")
    known = {field.name for field in fields(Recipe)} - {"name"}
    given = {key: value for key, value in overrides.items() if value is not None}
    for key in given:
        if key not in known:
            raise ValueError(f"recipe field {key!r}; allowed: {', '.join(sorted(known))}")
    return changed(RECIPES[name], given)


def changed(recipe: Recipe, given: dict[str, Any]) -> Recipe:
    """`recipe` with the fields of `given`, and where these make AdamW its optimizer, with AdamW's own values."""
    if given.get("optimizer") == "adamw" != recipe.optimizer:
        given = ADAMW | given
    found = replace(recipe, **given)
    if "momentum" in given and found.optimizer == "adamw":
        raise ValueError(f"momentum {found.momentum} with optimizer 'adamw'; allowed: with rmsprop_tf, sgd")
    return found
