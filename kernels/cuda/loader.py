"""The built library: where it is, why it is not, and what it offers. Nothing here starts CUDA."""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from . import abi

FILE = Path(__file__).with_name("_hopper.so")
HALO = 2  # `turns` from here on: warpgroups that share a tile of the padded map, whose rows stay for all taps
BUILD = "install nvcc of CUDA 12.5 or newer and build the package anew"


class Config(NamedTuple):
    """One way to cut convolutions into tiles, by its place in the library's list; `name` stands in tables."""

    number: int
    rows: int
    columns: int
    depth: int
    stages: int
    cluster: int
    turns: int
    behind: int
    pooled: int
    shared_bytes: int

    @property
    def name(self) -> str:
        if self.pooled:
            return f"{self.rows}x{self.columns}x{self.depth} pooled"
        if self.halo:
            shared = f" by {self.turns}" if self.turns > HALO else ""
            return f"{self.rows}x{self.columns}x{self.depth} halo{shared}"
        how = " in turn" if self.turns else " behind" if self.behind else ""
        cluster = f" c{self.cluster}" if self.cluster > 1 else ""
        return f"{self.rows}x{self.columns}x{self.depth} s{self.stages}{cluster}{how}"

    @property
    def form(self) -> str:
        """What it has in common with those that differ in columns alone: what is wrong with one is with all."""
        if self.pooled:
            return f"pooled{self.depth}"
        if self.halo:
            return f"halo{f'{self.turns}x' if self.turns > HALO else ''}{self.depth}"
        if self.turns:
            kind = "turns" if self.rows == 64 else "twos"
        else:
            kind = "behind" if self.behind else "halves"
        return f"{kind}{self.depth}c{self.cluster}"

    @property
    def halo(self) -> bool:
        return self.turns >= HALO


class PairConfig(NamedTuple):
    """One way to run a fused pair; `middle`: most channels between its convolutions."""

    number: int
    groups: int
    cluster: int
    middle: int
    shared_bytes: int

    @property
    def name(self) -> str:
        return f"pair {64 * self.groups}" + (f" c{self.cluster}" if self.cluster > 1 else "")

    @property
    def form(self) -> str:
        """As of a `Config`."""
        return f"pair{self.groups}c{self.cluster}"


class Library:
    """`api.h` for Python. Raises RuntimeError with the library's own words where a call fails, OSError at loading."""

    def __init__(self, file: Path) -> None:
        self.file = file
        self._c = ctypes.CDLL(str(file))
        abi.bind(self._c)
        self.configs = self._configs()
        self.blob_bytes = int(self._c.hopper_conv_blob_bytes())
        self.pair_configs = self._pair_configs() if abi.has_pairs(self._c) else ()
        self.walk_columns = self._walk_columns() if abi.has_walk(self._c) else ()
        self.walk_traces = abi.has_traces(self._c)

    def config(self, name: str) -> Config:
        """Raises ValueError for a name that no configuration has."""
        for config in self.configs:
            if config.name == name:
                return config
        raise ValueError(f"configuration {name!r}; allowed: {', '.join(c.name for c in self.configs)}")

    def reasons(self, convs: Sequence[abi.Conv], dtype: str, config: Config) -> list[str]:
        """Why this group cannot run with this configuration; empty when it can."""
        text = ctypes.create_string_buffer(1 << 12)
        kind = abi.TYPES[dtype]
        asked = self._c.hopper_conv_reasons(*_group(convs), kind, config.number, text, len(text))
        return text.value.decode().splitlines() if self._counted(asked) else []

    def units(self, convs: Sequence[abi.Conv], config: Config) -> int:
        return self._counted(self._c.hopper_conv_units(*_group(convs), config.number))

    def workspace_bytes(self, convs: Sequence[abi.Conv], config: Config) -> tuple[int, int]:
        """All of it, and how much of its beginning counts and has to start as zeros."""
        whole = self._counted(self._c.hopper_conv_workspace_bytes(*_group(convs), config.number))
        return whole, self._counted(self._c.hopper_conv_counter_bytes(*_group(convs), config.number))

    def prepare(
        self, convs: Sequence[abi.Conv], dtype: str, config: Config, workspace: int = 0, overlap: bool = False,
        blocks: int = 0,
    ) -> ctypes.Array[ctypes.c_char]:  # fmt: skip
        """The launch as bytes, for the current device; `blocks` limits its grid where it is not 0."""
        blob = ctypes.create_string_buffer(self.blob_bytes)
        given = abi.TYPES[dtype], config.number, workspace, blocks, int(overlap)
        self._check(self._c.hopper_conv_prepare(*_group(convs), *given, blob))
        return blob

    def launch(self, blob: ctypes.Array[ctypes.c_char], stream: int) -> None:
        self._check(self._c.hopper_conv_launch(blob, stream))

    def pair_config(self, name: str) -> PairConfig:
        """Raises ValueError for a name that no configuration has."""
        for config in self.pair_configs:
            if config.name == name:
                return config
        raise ValueError(f"configuration {name!r}; allowed: {', '.join(c.name for c in self.pair_configs)}")

    def pair_reasons(self, pair: abi.Pair, dtype: str, config: PairConfig) -> list[str]:
        """Why this pair cannot run with this configuration; empty when it can."""
        text = ctypes.create_string_buffer(1 << 12)
        kind = abi.TYPES[dtype]
        asked = self._c.hopper_pair_reasons(ctypes.byref(pair), kind, config.number, text, len(text))
        return text.value.decode().splitlines() if self._counted(asked) else []

    def prepare_pair(
        self, pair: abi.Pair, dtype: str, config: PairConfig, overlap: bool = False
    ) -> ctypes.Array[ctypes.c_char]:
        """The launch as bytes, for the current device."""
        blob = ctypes.create_string_buffer(int(self._c.hopper_pair_blob_bytes()))
        kind = abi.TYPES[dtype]
        self._check(self._c.hopper_pair_prepare(ctypes.byref(pair), kind, config.number, 0, int(overlap), blob))
        return blob

    def launch_pair(self, blob: ctypes.Array[ctypes.c_char], stream: int) -> None:
        self._check(self._c.hopper_pair_launch(blob, stream))

    def walk_reasons(self, jobs: Sequence[abi.Job], dtype: str) -> list[str]:
        """Why these jobs cannot run as one walk; empty when they can."""
        text = ctypes.create_string_buffer(1 << 14)
        asked = self._c.hopper_walk_reasons(*_walk(jobs), abi.TYPES[dtype], text, len(text))
        return text.value.decode().splitlines() if self._counted(asked) else []

    def walk_sizes(self, jobs: Sequence[abi.Job], blocks: int) -> abi.WalkSizes:
        """Bytes of the table and of the workspace, shared out by `blocks` blocks."""
        sizes = abi.WalkSizes()
        self._check(self._c.hopper_walk_sizes(*_walk(jobs), blocks, ctypes.byref(sizes)))
        return sizes

    def prepare_walk(
        self, jobs: Sequence[abi.Job], dtype: str, table: int, workspace: int, blocks: int
    ) -> tuple[ctypes.Array[ctypes.c_char], ctypes.Array[ctypes.c_char]]:
        """What `table` has to hold before the first launch, and the launch as bytes, for the current device."""
        host = ctypes.create_string_buffer(self.walk_sizes(jobs, blocks).table)
        blob = ctypes.create_string_buffer(int(self._c.hopper_walk_blob_bytes()))
        kind = abi.TYPES[dtype]
        self._check(self._c.hopper_walk_prepare(*_walk(jobs), kind, table, workspace, blocks, host, blob))
        return host, blob

    def walk_units(self, jobs: Sequence[abi.Job], blocks: int) -> list[int]:
        """The job of each unit, in the order of a trace."""
        count = self._counted(self._c.hopper_walk_units(*_walk(jobs), blocks, None, None, 0))
        job, block = (ctypes.c_int32 * count)(), (ctypes.c_int32 * count)()
        self._counted(self._c.hopper_walk_units(*_walk(jobs), blocks, job, block, count))
        return list(job)

    def traced_walk(self, blob: ctypes.Array[ctypes.c_char], trace: int) -> ctypes.Array[ctypes.c_char]:
        """The same launch, which leaves its marks at the address `trace`: int64 [units, abi.WALK_MARKS]."""
        traced = ctypes.create_string_buffer(len(blob))
        self._check(self._c.hopper_walk_traced(blob, trace, traced))
        return traced

    def launch_walk(self, blob: ctypes.Array[ctypes.c_char], stream: int) -> None:
        self._check(self._c.hopper_walk_launch(blob, stream))

    def _walk_columns(self) -> tuple[int, ...]:
        found = (ctypes.c_int32 * self._c.hopper_walk_columns(None, 0))()
        self._c.hopper_walk_columns(found, len(found))
        return tuple(found)

    def _pair_configs(self) -> tuple[PairConfig, ...]:
        found = (abi.PairConfig * self._c.hopper_pair_configs(None, 0))()
        self._c.hopper_pair_configs(found, len(found))
        return tuple(PairConfig(i, *(getattr(c, name) for name, _ in c._fields_)) for i, c in enumerate(found))

    def _configs(self) -> tuple[Config, ...]:
        found = (abi.Config * self._c.hopper_conv_configs(None, 0))()
        self._c.hopper_conv_configs(found, len(found))
        return tuple(Config(i, *(getattr(c, name) for name, _ in c._fields_)) for i, c in enumerate(found))

    def _counted(self, answer: int) -> int:
        """The answer of a function for which only failures are negative."""
        self._check(min(answer, 0))
        return answer

    def _check(self, code: int) -> None:
        if code:
            raise RuntimeError((self._c.hopper_error() or b"").decode() or f"the CUDA library gave code {code}")


def _group(convs: Sequence[abi.Conv]) -> tuple[ctypes.Array[abi.Conv], int]:
    return (abi.Conv * len(convs))(*convs), len(convs)


def _walk(jobs: Sequence[abi.Job]) -> tuple[ctypes.Array[abi.Job], int]:
    return (abi.Job * len(jobs))(*jobs), len(jobs)


def missing() -> str:
    """Why there is no library; empty when there is one."""
    found = _loaded(FILE)
    return found if isinstance(found, str) else ""


def library() -> Library:
    """The library, loaded once. Raises RuntimeError with the reason where there is none."""
    found = _loaded(FILE)
    if isinstance(found, str):
        raise RuntimeError(found)
    return found


@functools.cache
def _loaded(file: Path) -> Library | str:
    if not file.exists():
        return f"the CUDA kernels were not built: no {file.name} beside {file.parent.name}/__init__.py; {BUILD}"
    try:
        return Library(file)
    except OSError as error:
        return f"{file.name} cannot be loaded: {error}; {BUILD}"


verdicts: dict[int, str] = {}  # by the device's number: why its first convolution was wrong, or nothing
walk_verdicts: dict[int, str] = {}  # the same of its first walk, which costs walks alone
form_verdicts: dict[tuple[int, str], str] = {}  # and of a form of tiles that only measurements choose


def distrusted() -> str:
    """Why a GPU of this machine is not trusted with these kernels, as `check` found; empty when it found nothing."""
    return next((why for why in list(verdicts.values()) if why), "")
