"""The Hopper kernels' library where there is no GPU: plain loops behind the same C interface, over host memory."""

from __future__ import annotations

import ctypes
import subprocess
import tempfile
from functools import cache
from pathlib import Path

from inception_fast.kernels.cuda.loader import Library

from checkout import ROOT

_folder = tempfile.TemporaryDirectory(prefix="hopper-stub-")


@cache
def stub_file() -> Path:
    """The stub, compiled once a process."""
    file = Path(_folder.name) / "stub.so"
    source, include = ROOT / "tests" / "hopper_stub.cpp", ROOT / "kernels" / "cuda"
    command = ["c++", "-std=c++17", "-O2", "-shared", "-fPIC", "-Wall", "-Wextra", "-Werror", "-I", include, source]
    subprocess.run([*map(str, command), "-o", str(file)], check=True, capture_output=True, text=True)
    return file


@cache
def stub() -> Library:
    return Library(stub_file())


def launched() -> list[tuple[int, str, bool, int]]:
    """(convolutions, configuration, may overlap, splits) of each launch of the stub since the last call."""
    values = (ctypes.c_int32 * 4000)()
    count = ctypes.CDLL(str(stub_file())).stub_launched(values, 1000)
    assert count <= 1000
    names = [config.name for config in stub().configs]
    rows = [values[4 * i : 4 * i + 4] for i in range(count)]
    return [(row[0], names[row[1]], bool(row[2]), row[3]) for row in rows]
