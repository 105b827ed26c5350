"""Cycles of a multiprocessor for what the walk is made of: products of few columns, copies of few rows, exchanges."""

from __future__ import annotations

import ctypes
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[2]
INCLUDE = ROOT / "kernels" / "cuda"
COMMAND = ("nvcc", "-std=c++17", "-O3", "-gencode=arch=compute_90a,code=sm_90a", "-cudart", "static")
SOURCES = (Path(__file__).with_name("rates.cu"), INCLUDE / "encode.cu")
COLUMNS = (8, 16, 32, 64, 128, 256)
# (columns, warpgroups, channels of a row, row of x at which the operand begins): halo tiles shift x by pixels.
PRODUCTS = (
    *((columns, warpgroups, 64, 0) for columns in COLUMNS for warpgroups in (1, 2)),
    *((columns, 2, depth, shift) for columns in (32, 64, 128) for depth in (64, 32) for shift in (0, 1, 2, 3, 4, 8)),
)
# (by whole warps, warps that bring x, that bring weights, pixels of a box of x, rows of one of weights)
COPIES = (
    (0, 1, 0, 64, 0), (0, 3, 0, 64, 0), (1, 1, 0, 64, 0), (1, 3, 0, 64, 0), (1, 1, 0, 128, 0), (1, 2, 0, 128, 0),
    (1, 0, 1, 0, 32), (1, 0, 3, 0, 32), (1, 0, 1, 0, 256), (1, 1, 1, 64, 32), (1, 3, 3, 64, 32), (1, 3, 3, 64, 64),
    (1, 1, 1, 128, 128), (1, 1, 1, 64, 192),
)  # fmt: skip
LINES = ((32, 150), (64, 75), (64, 150), (32, 38), (64, 38))  # (channels, pixels) of a row of a map


def compiled(target: Path) -> Path:
    target.parent.mkdir(parents=True, exist_ok=True)
    wanted = [*COMMAND, "-shared", "-Xcompiler", "-fPIC", f"-I{INCLUDE}", *map(str, SOURCES), "-o", str(target)]
    subprocess.run(wanted, check=True)
    return target


def rate_rows(file: Path) -> Iterator[dict[str, Any]]:
    """A row for each rate: cycles by the clock of block 0's multiprocessor; `code` is what CUDA said."""
    library = ctypes.CDLL(str(file))
    memory = torch.zeros(2, dtype=torch.int64, device="cuda")
    place = ctypes.c_void_p(memory.data_ptr())
    for case in PRODUCTS:
        about = {"probe": "products", **dict(zip(("columns", "warpgroups", "depth", "shift"), case, strict=True))}
        yield about | _asked(library.rate_products, place, *case)
    yield from copy_rows(library, place)
    yield from line_rows(library, place)
    yield from exchange_rows(library, memory)


def copy_rows(library: ctypes.CDLL, place: ctypes.c_void_p) -> Iterator[dict[str, Any]]:
    x = torch.randn(1, 17, 17, 192, device="cuda").bfloat16()
    weights = torch.randn(7, 384, 192, device="cuda").bfloat16()
    for case in COPIES:
        for blocks, apart in ((1, 0), (132, 0), (132, 1)):
            given = (ctypes.c_uint64(x.data_ptr()), ctypes.c_uint64(weights.data_ptr()), *case, blocks, apart)
            names = ("whole", "x_warps", "weight_warps", "pixels", "rows", "blocks", "apart")
            about = {"probe": "copies", **dict(zip(names, (*case, blocks, apart), strict=True))}
            yield about | _asked(library.rate_copies, place, *given)


def line_rows(library: ctypes.CDLL, place: ctypes.c_void_p) -> Iterator[dict[str, Any]]:
    for channels, pixels in LINES:
        x = torch.randn(132, 16, pixels, channels, device="cuda").bfloat16()
        for warps, blocks in ((1, 1), (1, 132), (2, 132)):
            case = (channels, pixels, 16, 132, warps, blocks)
            names = ("channels", "pixels", "height", "images", "warps", "blocks")
            about = {"probe": "lines", **dict(zip(names, case, strict=True))}
            yield about | _asked(library.rate_lines, place, ctypes.c_uint64(x.data_ptr()), *case)


def exchange_rows(library: ctypes.CDLL, memory: torch.Tensor) -> Iterator[dict[str, Any]]:
    fitting = {}
    for size in (2, 4, 8, 16):
        found = ctypes.c_int(0)
        code = library.rate_clusters(size, ctypes.byref(found))
        fitting[size] = found.value
        yield {"probe": "clusters", "size": size, "fit": found.value, "code": code}
    place, wrong = ctypes.c_void_p(memory.data_ptr()), ctypes.c_void_p(memory.data_ptr() + 8)
    for clusters, cooperative in ((1, 0), (fitting[4], 0), (fitting[4], 1)):
        about = {"probe": "exchanges", "clusters": clusters, "cooperative": cooperative}
        yield about | _asked(library.rate_exchanges, place, wrong, clusters, cooperative) | {"wrong": int(memory[1])}


def _asked(call: Any, *given: Any) -> dict[str, Any]:
    result = ctypes.c_double(0.0)
    code = call(*given, ctypes.byref(result))
    return {"cycles": round(result.value, 1), "code": code, "status": "ok" if code == 0 else "failed"}
