"""Every kernel of the package: no autograd, no registration, no policy. Installed as `inception_fast.kernels`."""

import os

if __name__ != "inception_fast.kernels":
    raise ImportError(f"import this package as inception_fast.kernels, not as {__name__!r}")

_forked = False


def was_forked() -> bool:
    """Whether this process was forked since the package was imported."""
    return _forked


def _note_fork() -> None:
    global _forked
    _forked = True


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_note_fork)
