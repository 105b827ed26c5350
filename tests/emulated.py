"""The GPU emulator of `tests/cuda`: builds kernels' own sources for the CPU and calls them on guarded memory."""

from __future__ import annotations

import ctypes
import fcntl
import os
import re
import subprocess
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from checkout import ROOT

HERE, KERNELS = ROOT / "tests" / "cuda", ROOT / "kernels" / "cuda"
MACHINE = tuple(sorted(HERE / f"{name}.cpp" for name in ("copy", "memory", "scheduler", "sync", "wgmma")))
# Fortified longjmp takes a change of fibers for an attack. Products of float32 may fuse: exact tests hold either way.
FLAGS = ("-std=c++17", "-ftree-vectorize", "-march=native", "-fPIC", "-U_FORTIFY_SOURCE", "-Wall", "-Wextra")
EARLY, LATE, RANDOM = 0, 1, 2


class EmulationError(Exception):
    """What the emulated device found wrong with a kernel."""


@dataclass(frozen=True)
class Mode:
    """When copies and products happen, in which order threads run, and how many clusters run at a time."""

    copies: int = LATE
    products: int = LATE
    schedule: int = 0
    resident: int = 1
    multiprocessors: int = 4
    seed: int = 1


def starved(*, warp: int = 0, thread: int = 0) -> Mode:
    """A warp, or a thread, of each block runs where nothing else can happen; copies and products are early."""
    return Mode(EARLY, EARLY, schedule=1000 + thread if thread else 2 + warp)


# Everything early, everything late, each against the other, and a few random ones.
MODES = (
    Mode(EARLY, EARLY),
    Mode(LATE, LATE),
    Mode(EARLY, LATE),
    Mode(LATE, EARLY),
    *(Mode(RANDOM, RANDOM, schedule=1, resident=2, seed=seed) for seed in (1, 2, 3)),
)


_own = tempfile.TemporaryDirectory(prefix="emulated-")
# What is compiled once: for all processes of a run where the run names a folder, else for this one.
BUILT = Path(os.environ.get("EMULATED_OBJECTS", _own.name))


def _compile(source: Path, target: Path, *options: str, language: str = "c++") -> None:
    command = ["g++", *FLAGS, *options, "-DINCEPTION_FAST_EMULATED", f"-I{HERE}", f"-I{KERNELS}", "-x", language]
    done = subprocess.run([*command, "-c", str(source), "-o", str(target)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]


def _compile_once(source: Path, name: str, *options: str, language: str = "c++") -> Path:
    """What `name` in `BUILT` is or becomes; who comes meanwhile, another thread or process, waits."""
    target = BUILT / name
    with target.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not target.exists():
            _compile(source, target.with_suffix(".part"), *options, language=language)
            target.with_suffix(".part").rename(target)
    return target


@cache
def compiled(source: Path) -> Path:
    """The object of a source of the checkout."""
    return _compile_once(source, f"{source.parent.parent.name}-{source.stem}.o", "-O2")


@cache
def _prelude() -> Path:
    """A folder with the machine's header, compiled: reading it takes longer than compiling a kernel without -O."""
    return _compile_once(HERE / "machine.h", "machine.h.gch", "-O0", "-w", language="c++-header").parent


def _link(library: Path, objects: Iterable[Path]) -> Path:
    link = ["g++", "-shared", "-o", str(library), *map(str, objects)]
    done = subprocess.run(link, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    return library


def build(folder: Path, sources: Iterable[Path]) -> Path:
    """A shared library of `sources`, .cu ones too, with the machine."""
    with ThreadPoolExecutor(2) as pool:
        return _link(folder / "emulated.so", list(pool.map(compiled, (*sources, *MACHINE))))


def spoilt(folder: Path, sources: tuple[Path, ...], headers: Mapping[str, str], *options: str) -> Path:
    """The same with other text in some headers of the kernels, which the first source, a driver of tests/cuda, sees."""
    for name, text in headers.items():
        (folder / name).write_text(text)
    driver = folder / "driver.cpp"
    text = sources[0].read_text().replace('"../../kernels/cuda/', '"')
    driver.write_text(text.replace('#include "machine.h"\n', ""))  # compiled ahead, it has to come first
    _compile(driver, folder / "driver.o", "-O0", f"-I{folder}", f"-I{_prelude()}", "-include", "machine.h", *options)
    return _link(folder / "emulated.so", (folder / "driver.o", *map(compiled, (*sources[1:], *MACHINE))))


def with_mistake(header: str, says: str, mistake: str, beside: Iterable[str]) -> dict[str, str]:
    """Texts of headers of the kernels, in one of them `mistake` for what an expression finds; those `beside` it include
    it, or one another, and so have to be found in one folder.
    """
    wrong, changes = re.subn(says, mistake, (KERNELS / header).read_text())
    assert changes >= 1, "the kernel no longer says this"
    return {**{other: (KERNELS / other).read_text() for other in beside}, header: wrong}


class Device:
    """A library that `build` made. Memory of its kernels comes from `empty` and `like`, inside `memory`."""

    def __init__(self, library: Path) -> None:
        self.lib = ctypes.CDLL(str(library))
        self.lib.emulated_allocate.restype = ctypes.c_void_p
        self.lib.emulated_allocate.argtypes = [ctypes.c_uint64, ctypes.c_int]
        self.lib.emulated_free.argtypes = [ctypes.c_void_p]
        self.lib.emulated_error.restype = ctypes.c_char_p
        self.lib.emulated_switches.restype = self.lib.emulated_prefetches.restype = ctypes.c_uint64
        self.blocks: list[int] = []

    def configure(self, mode: Mode) -> None:
        numbers = (mode.copies, mode.products, mode.schedule, mode.resident, mode.multiprocessors)
        self.lib.emulated_configure(*map(ctypes.c_int, numbers), ctypes.c_uint64(mode.seed))

    def error(self) -> str:
        return self.lib.emulated_error().decode()

    def check(self, result: int) -> None:
        if result:
            raise EmulationError(self.error())

    def empty(self, *shape: int, dtype: torch.dtype, at_end: bool = True) -> Tensor:
        """A tensor full of NaN between forbidden pages, flush with the one behind it or the one ahead."""
        count = 1
        for size in shape:
            count *= size
        room = max(count * dtype.itemsize, 1)
        address = self.lib.emulated_allocate(room, int(at_end))
        assert address, "no memory"
        self.blocks.append(address)
        return torch.frombuffer((ctypes.c_uint8 * room).from_address(address), dtype=dtype, count=count).view(shape)

    def like(self, values: Tensor, at_end: bool = True) -> Tensor:
        """A copy of `values`, contiguous, on the device."""
        made = self.empty(*values.shape, dtype=values.dtype, at_end=at_end)
        return made.copy_(values)

    @contextmanager
    def memory(self) -> Iterator[Device]:
        """Frees what was allocated inside, and fails when a byte beside it was written."""
        try:
            yield self
        finally:
            spoilt = [address for address in self.blocks if self.lib.emulated_free(ctypes.c_void_p(address))]
            self.blocks.clear()
        assert not spoilt, f"{len(spoilt)} blocks of memory were written beside their data"
