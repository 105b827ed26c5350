"""The six variants for Keras 3, written in Keras layers alone: TensorFlow, torch or JAX below, NHWC images.

Keras is loaded at the first use of a name. Raises ImportError, naming the extra to install, where it cannot be.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
from typing import TYPE_CHECKING, Any

from ..weights._tensorflow import settle_triton

KERAS = (3, 10)  # older ones put casts before a net of 16 bits, or lack keras.tree.flatten_with_path
_HOMES = {
    "AsymmetricPair": "layers",
    "ConvBNReLU": "layers",
    "InceptionResNetV1": "applications",
    "InceptionResNetV2": "applications",
    "InceptionV1": "applications",
    "InceptionV2": "applications",
    "InceptionV3": "applications",
    "InceptionV4": "applications",
    "OptimizedModel": "runner",
    "ParallelSplit": "layers",
    "Residual": "layers",
    "convert": "transfer",
    "create_model": "models",
    "decode_predictions": "applications",
    "endpoints": "models",
    "fold_batch_norm": "folding",
    "from_torch": "transfer",
    "optimize": "runner",
    "preprocess_input": "applications",
    "save_slim": "transfer",
    "to_torch": "transfer",
}

if TYPE_CHECKING:
    from .applications import (
        InceptionResNetV1,
        InceptionResNetV2,
        InceptionV1,
        InceptionV2,
        InceptionV3,
        InceptionV4,
        decode_predictions,
        preprocess_input,
    )
    from .folding import fold_batch_norm
    from .layers import AsymmetricPair, ConvBNReLU, ParallelSplit, Residual
    from .models import create_model, endpoints
    from .runner import OptimizedModel, optimize
    from .transfer import convert, from_torch, save_slim, to_torch

__all__ = [
    "AsymmetricPair",
    "ConvBNReLU",
    "InceptionResNetV1",
    "InceptionResNetV2",
    "InceptionV1",
    "InceptionV2",
    "InceptionV3",
    "InceptionV4",
    "OptimizedModel",
    "ParallelSplit",
    "Residual",
    "convert",
    "create_model",
    "decode_predictions",
    "endpoints",
    "fold_batch_norm",
    "from_torch",
    "optimize",
    "preprocess_input",
    "save_slim",
    "to_torch",
]


def _load_keras() -> None:
    # The full module asks for attention by logging.
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    settle_triton()
    try:
        keras = importlib.import_module("keras")
    except ImportError as error:
        raise ImportError(
            f"inception_fast.tf needs Keras 3 and its backend, by default TensorFlow ({error}); "
            "to install both: pip install inception-fast[tensorflow]"
        ) from error
    if tuple(int(part) for part in keras.__version__.split(".")[:2]) < KERAS:
        allowed = ".".join(map(str, KERAS))
        raise ImportError(
            f"Keras {keras.__version__}; inception_fast.tf needs {allowed} or newer: pip install -U keras"
        )


def _installed(package: str) -> bool:
    try:
        return importlib.util.find_spec(package) is not None
    except (ImportError, ValueError):
        return False


if not (_installed("keras") and _installed("tensorflow")):
    _load_keras()


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    _load_keras()
    importlib.import_module(f"{__name__}.layers")  # so that Keras finds them in files, whichever name is used first
    value = getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
