"""Training: the papers' recipe, data that never depends on order or workers, runs that resume bit for bit, and their
comparison.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

_HOMES = {
    "Experiment": "experiments",
    "Recipe": "recipe",
    "RMSpropTF": "optim",
    "Settings": "settings",
    "Variant": "comparison",
    "compare": "comparison",
    "get_recipe": "recipe",
    "keep_freed_memory": "allocator",
    "train": "loop",
}

if TYPE_CHECKING:
    from .allocator import keep_freed_memory
    from .comparison import Variant, compare
    from .experiments import Experiment
    from .loop import train
    from .optim import RMSpropTF
    from .recipe import Recipe, get_recipe
    from .settings import Settings

__all__ = [
    "Experiment",
    "RMSpropTF",
    "Recipe",
    "Settings",
    "Variant",
    "compare",
    "get_recipe",
    "keep_freed_memory",
    "train",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
