"""Fast, exact GoogLeNet/Inception models: fused kernels, an inference engine and the measurements behind them.

Importing this package loads nothing heavier than torch; every public name is resolved at first use. The operators,
which saved programs ask for by name, are registered at once where torch is there already.
"""

from __future__ import annotations

import importlib
import sys
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

importlib.import_module(f"{__name__}.kernels")  # which notes from now on that the process was forked
importlib.import_module(f"{__name__}._when_imported").keep_triton_apart()

_HOMES = {
    "create_model": "models",
    "list_models": "models",
    "optimize": "engine",
    "replace_layers": "replace",
    "ConvBNReLU": "layers",
    "AsymmetricPair": "layers",
    "ParallelSplit": "layers",
    "PoolProject": "layers",
    "LabelSmoothingCrossEntropy": "losses",
    "Available": "dispatch",
    "Unavailable": "dispatch",
    "backend_status": "dispatch",
    "use_backend": "dispatch",
}
_MODULES = ("models", "engine", "layers", "losses", "ops", "dispatch", "weights", "measure", "fid", "tf")

if TYPE_CHECKING:
    from . import dispatch, engine, fid, layers, losses, measure, models, ops, weights
    from .dispatch import Available, Unavailable, backend_status, use_backend
    from .engine import optimize
    from .layers import AsymmetricPair, ConvBNReLU, ParallelSplit, PoolProject
    from .losses import LabelSmoothingCrossEntropy
    from .models import create_model, list_models
    from .replace import replace_layers

__all__ = [
    "AsymmetricPair",
    "Available",
    "ConvBNReLU",
    "LabelSmoothingCrossEntropy",
    "ParallelSplit",
    "PoolProject",
    "Unavailable",
    "__version__",
    "backend_status",
    "create_model",
    "dispatch",
    "engine",
    "fid",
    "layers",
    "list_models",
    "losses",
    "measure",
    "models",
    "ops",
    "optimize",
    "replace_layers",
    "use_backend",
    "weights",
]


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return importlib.import_module(f"{__name__}.{name}")
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)


if "torch" in sys.modules:  # the command line does without torch until a command needs it
    importlib.import_module(f"{__name__}.ops")
