"""Watches imports: runs something once a module is imported, and keeps Triton apart from TensorFlow."""

from __future__ import annotations

import contextlib
import importlib.abc
import importlib.util
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from importlib.machinery import ModuleSpec
from types import ModuleType

Action = Callable[[ModuleType], None]


def when_imported(name: str, action: Action) -> None:
    """action(module) now if the module `name` is there, else right after its first import, in the importing thread."""
    if name in sys.modules:
        action(sys.modules[name])
    else:
        sys.meta_path.insert(0, _Watch(name, action))


class _Watch(importlib.abc.MetaPathFinder):
    """Finds nothing itself: leaves at the first import of `name` and lets the others' loader do the action as well."""

    def __init__(self, name: str, action: Action) -> None:
        self._name, self._action = name, action

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != self._name:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(fullname)
        if spec is not None and spec.loader is not None:
            run = spec.loader.exec_module

            def run_and_act(module: ModuleType) -> None:
                run(module)
                self._action(module)

            spec.loader.exec_module = run_and_act  # type: ignore[method-assign]
        return spec


def keep_triton_apart() -> None:
    """From now on Triton, which torch imports to compile, is bound to its own LLVM where TensorFlow is there.

    Bound to TensorFlow's it ends the process.
    """
    if "triton" not in sys.modules:
        sys.meta_path.insert(0, _Apart())


class _Apart(importlib.abc.MetaPathFinder):
    """Finds what the other finders find, and has it loaded with its own symbols first."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != "triton" or "tensorflow" not in sys.modules:
            return None
        finders = [finder for finder in sys.meta_path if finder is not self and hasattr(finder, "find_spec")]
        spec = next(filter(None, (finder.find_spec(fullname, path, target) for finder in finders)), None)
        if spec is not None and spec.loader is not None:
            spec.loader.exec_module = _apart(spec.loader.exec_module)  # type: ignore[method-assign, assignment]
        return spec


def _apart(run: Action) -> Action:
    def run_apart(module: ModuleType) -> None:
        with own_symbols():
            run(module)

    return run_apart


@contextlib.contextmanager
def own_symbols() -> Iterator[None]:
    """Libraries that are loaded meanwhile look for symbols among their own before those of the process."""
    flags = sys.getdlopenflags()
    sys.setdlopenflags(os.RTLD_NOW | getattr(os, "RTLD_DEEPBIND", 0))
    try:
        yield
    finally:
        sys.setdlopenflags(flags)
