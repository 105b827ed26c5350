"""The Hopper kernels' library where there is no GPU, over host memory: plain loops behind the same C interface, or the
kernels' own source on an emulated device.
"""

from __future__ import annotations

import ctypes
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path

from inception_fast.kernels.cuda.loader import Config, Library

import emulated_conv
import emulated_walk
from checkout import ROOT
from emulated import HERE, build

WALK = -100  # STUB_WALK of hopper_stub.h
_folder = tempfile.TemporaryDirectory(prefix="hopper-stub-")


@cache
def stub_file() -> Path:
    """The stub, compiled once a process."""
    file = Path(_folder.name) / "stub.so"
    sources, include = (ROOT / "tests" / f"hopper_stub{name}.cpp" for name in ("", "_walk")), ROOT / "kernels" / "cuda"
    command = ["c++", "-std=c++17", "-O2", "-shared", "-fPIC", "-Wall", "-Wextra", "-Werror", "-I", include, *sources]
    subprocess.run([*map(str, command), "-o", str(file)], check=True, capture_output=True, text=True)
    return file


@cache
def stub() -> Library:
    return Library(stub_file())


def launched() -> list[tuple[int, str, bool, int]]:
    """(convolutions, or jobs of a walk, configuration, may overlap, splits) of each launch of the stub since the last
    call.
    """
    values = (ctypes.c_int32 * 4000)()
    count = ctypes.CDLL(str(stub_file())).stub_launched(values, 1000)
    assert count <= 1000
    names = {config.number: config.name for config in stub().configs}
    names |= {-1 - config.number: config.name for config in stub().pair_configs}
    names[WALK] = "walk"
    rows = [values[4 * i : 4 * i + 4] for i in range(count)]
    return [(row[0], names[row[1]], bool(row[2]), row[3]) for row in rows]


@contextmanager
def walking_in_order(seed: int) -> Iterator[None]:
    """The stub's walks take any order that needs allow, below zero one that puts off job -1 - seed as long as it can;
    without this the last job that may run comes first.
    """
    library = ctypes.CDLL(str(stub_file()))
    library.stub_walk_order(seed)
    try:
        yield
    finally:
        library.stub_walk_order(0)


class Emulated(Library):
    """The kernels' own source on the emulated device; of all configurations those that are compiled for it."""

    WIDTHS = (32, 48, 80, 192)

    def _configs(self) -> tuple[Config, ...]:
        others = (("halo3x", 128), ("twos", 96), ("behind", 96), ("pooled", 96))  # other columns than these widths
        return tuple(
            c for c in super()._configs()
            if c.columns in self.WIDTHS or any(c.form.startswith(form) and c.columns == n for form, n in others)
        )  # fmt: skip


@cache
def emulated() -> Library:
    """Compiled once a process, which takes half a minute; the queue's probe is in it as well."""
    folder = Path(_folder.name) / "emulated"
    folder.mkdir()
    sources = dict.fromkeys((*emulated_conv.SOURCES, *emulated_walk.SOURCES, HERE / "api.cpp"))
    return Emulated(build(folder, (*sources, ROOT / "benchmarks" / "gpu" / "probe.cu")))
