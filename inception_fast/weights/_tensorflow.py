"""Loads TensorFlow where it gets on with Triton: both carry an LLVM, and torch loads Triton when it first compiles."""

from __future__ import annotations

import importlib
import importlib.util
import os
import sys
from typing import Any

from .._when_imported import own_symbols


def load_tensorflow() -> Any:
    """The module `tensorflow`. Raises ImportError without it."""
    # The full module asks for attention by logging.
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    settle_triton()
    return importlib.import_module("tensorflow")


def settle_triton() -> None:
    """Imports Triton, where it is installed, bound to its own LLVM; imported after TensorFlow it crashes otherwise."""
    if "triton" in sys.modules or importlib.util.find_spec("triton") is None:
        return
    with own_symbols():
        importlib.import_module("triton")
