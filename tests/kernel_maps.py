"""The index arithmetic of the Hopper kernels' headers as a library, for tests that do the rest in NumPy."""

from __future__ import annotations

import ctypes
import subprocess
from pathlib import Path
from typing import Any

from inception_fast.kernels.cuda import abi
from numpy.typing import NDArray

from checkout import ROOT


def built(folder: Path) -> ctypes.CDLL:
    """`tests/cuda/maps.cpp` with the part of the C interface that is arithmetic."""
    kernels, file = ROOT / "kernels" / "cuda", folder / "maps.so"
    sources = (ROOT / "tests" / "cuda" / "maps.cpp", kernels / "conv_api.cpp", kernels / "conv_reasons.cpp")
    command = ["g++", "-std=c++17", "-O1", "-shared", "-fPIC", "-Wall", "-Wextra", "-Werror", *map(str, sources)]
    subprocess.run([*command, "-o", str(file)], check=True)
    library = ctypes.CDLL(str(file))
    library.maps_tiles.restype = ctypes.c_int64
    for name in ("hopper_conv_configs", "hopper_conv_reasons", "hopper_conv_units"):
        function = getattr(library, name)
        function.restype, function.argtypes = abi.FUNCTIONS[name]
    return library


def every_config(library: ctypes.CDLL) -> ctypes.Array[abi.Config]:
    """The configurations, in their order."""
    configs = (abi.Config * library.hopper_conv_configs(None, 0))()
    library.hopper_conv_configs(configs, len(configs))
    return configs


def pointer(values: NDArray[Any]) -> ctypes.c_void_p:
    return ctypes.c_void_p(values.ctypes.data)
