"""The Hopper kernels' library where there is no GPU, over host memory: plain loops behind the same C interface, or the
kernels' own source on an emulated device.
"""

from __future__ import annotations

import ctypes
import subprocess
import tempfile
from functools import cache
from pathlib import Path

from inception_fast.kernels.cuda.loader import Config, Library

from checkout import ROOT
from emulated import HERE, build
from emulated_conv import SOURCES

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
    names = {config.number: config.name for config in stub().configs}
    names |= {-1 - config.number: config.name for config in stub().pair_configs}
    rows = [values[4 * i : 4 * i + 4] for i in range(count)]
    return [(row[0], names[row[1]], bool(row[2]), row[3]) for row in rows]


class Emulated(Library):
    """The kernels' own source on the emulated device; of all configurations those that are compiled for it."""

    WIDTHS = (32, 48, 80, 192)

    def _configs(self) -> tuple[Config, ...]:
        return tuple(config for config in super()._configs() if config.columns in self.WIDTHS)


@cache
def emulated() -> Library:
    """Compiled once a process, which takes half a minute; the queue's probe is in it as well."""
    folder = Path(_folder.name) / "emulated"
    folder.mkdir()
    return Emulated(build(folder, (*SOURCES, HERE / "api.cpp", ROOT / "benchmarks" / "gpu" / "probe.cu")))
