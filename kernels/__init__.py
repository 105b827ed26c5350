"""Every kernel of the package: no autograd, no registration, no policy. Installed as `inception_fast.kernels`."""

import os
from collections.abc import Callable

if __name__ != "inception_fast.kernels":
    raise ImportError(f"import this package as inception_fast.kernels, not as {__name__!r}")

_forked = False  # since this was imported


def in_forked_children(call: Callable[[], object]) -> None:
    """Calls `call` in every child that is forked from now on, and now in one that was since this was imported."""
    if _forked:
        call()
    if hasattr(os, "register_at_fork"):
        os.register_at_fork(after_in_child=call)


def _note_fork() -> None:
    global _forked
    _forked = True


in_forked_children(_note_fork)
