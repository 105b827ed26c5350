"""Registers, spills, shared memory and instructions of the built library's kernels, read without a GPU or a driver.

The tools that read it, cuobjdump and nvdisasm, come with the Triton package; Triton itself is not imported.
"""

from __future__ import annotations

import collections
import ctypes
import ctypes.util
import importlib.util
import re
import subprocess
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

ARCH = "sm_90a"
TENSOR_CORE = "HGMMA"
# What waits for, or forgets, memory beyond the block. A kernel has two about the cluster's barriers and one about split
# K by each depth, outside of its loops; a pipeline's barriers at the cluster's scope would have one an arrival and one
# a wait.
DEVICE_WIDE = ("MEMBAR.SC.GPU", "MEMBAR.ALL.GPU", "CCTL.IVALL")
MOST_DEVICE_WIDE = 4  # of each
# A walk orders memory between blocks by design, once a tile or piece, never once a step. Fences: a release where a unit
# ends and one for its split K, by each kind of tile (32 and 64 columns), one for pools, one for the last block.
# Acquires: split K's, the last block's, a first look and a loop both where x and where a pool waits.
WALK_TILES = 2
MOST_OF_A_WALK = {"MEMBAR.SC.GPU": 0, "MEMBAR.ALL.GPU": 2 * WALK_TILES + 2, "CCTL.IVALL": WALK_TILES + 5}
WALK = "walk_jobs"
# Where the compiler cannot keep sums in place it puts a wait behind each product, and says so in a remark alone. A pair
# waits for each tap's products anyway: those of different taps differ in shape.
WAIT = "WARPGROUP.DEPBAR"
ONE_BY_ONE = ("pair",)
FEW = 1 / 3  # of a library's kernels: naming all to cuobjdump takes 25 s, where all unnamed take 10
LANE_LOOP = "BRA.U.ANY"  # round a copy that one lane of a branch asks for (hopper.cuh, ONE_LANE)
# Products, loads and stores past the registers, the registers that warps hand to each other, spills.
CLASSES = (
    "HGMMA", "FFMA", "UTMALDG", "UTMASTG", "UBLKCP", "LDGSTS", "STSM", "USETMAXREG", "LDL", "STL", WAIT, LANE_LOOP,
    *DEVICE_WIDE,
)  # fmt: skip


@dataclass(frozen=True)
class Compiled:
    """What one kernel became. `spill_bytes` are a thread's; `shared_bytes` those fixed at compile time."""

    kernel: str
    config: str
    registers: int
    spill_bytes: int
    shared_bytes: int
    instructions: dict[str, int]

    @property
    def complaint(self) -> str:
        """What is wrong with a kernel that multiplies; empty when nothing is."""
        if self.spill_bytes or "STL" in self.instructions:
            return f"{self.spill_bytes} bytes of registers spill"
        name = self.kernel.rpartition("/")[2]
        walks, waits, products = name == WALK, self.instructions.get(WAIT, 0), self.instructions.get(TENSOR_CORE, 0)
        if products and waits >= products and name not in ONE_BY_ONE:
            return f"{waits} waits for {products} products, which run one by one; allowed: fewer waits"
        if products and LANE_LOOP in self.instructions:
            return f"{self.instructions[LANE_LOOP]} loops over lanes, round copies; allowed: none"
        for kind in DEVICE_WIDE:
            most = MOST_OF_A_WALK[kind] if walks else MOST_DEVICE_WIDE
            if self.instructions.get(kind, 0) > most:
                return f"{self.instructions[kind]} {kind} instructions; allowed: {most}"
        return "" if TENSOR_CORE in self.instructions else f"no {TENSOR_CORE} instruction"


def kernels(file: Path, only: Collection[str] | None = None) -> list[Compiled]:
    """Every kernel of a library, sorted, or those `only` that have these names: where they are few, others are not
    disassembled.

    Raises RuntimeError where the tools are missing or the library has no kernels at all.
    """
    labels = _labelled(file)
    wanted = {symbol: numbers for symbol, numbers in labels.items() if only is None or numbers[0] in only}
    if not wanted:
        return []
    few = len(wanted) < FEW * len(labels)
    these = ("-fun", ",".join(wanted)) if few else ()
    listings = functions(_tool("cuobjdump", "-sass", *these, str(file)))
    found = [Compiled(*numbers, counted(listings.get(symbol, ""))) for symbol, numbers in wanted.items()]
    return sorted(found, key=lambda one: (one.kernel, one.config))


def names(file: Path) -> list[str]:
    """The names of a library's kernels, without disassembling any; raises as `kernels` does."""
    return sorted({name for name, *_ in _labelled(file).values()})


def _labelled(file: Path) -> dict[str, tuple[str, str, int, int, int]]:
    """(name, configuration, registers, stack, shared) by symbol."""
    usage = resources(_tool("cuobjdump", "-res-usage", str(file)))
    if not usage:
        raise RuntimeError(f"{file} holds no kernels for {ARCH}")
    return {symbol: (*label(demangled(symbol)), *numbers) for symbol, numbers in usage.items()}


def resources(text: str) -> dict[str, tuple[int, int, int]]:
    """(registers, stack, shared) by symbol, from `cuobjdump -res-usage`."""
    pattern = r"Function (\S+?):\s+REG:(\d+) STACK:(\d+) SHARED:(\d+)"
    return {name: (int(a), int(b), int(c)) for name, a, b, c in re.findall(pattern, text)}


def functions(text: str) -> dict[str, str]:
    """Each function's listing by symbol, from `cuobjdump -sass`."""
    parts = re.split(r"^\s*Function : (\S+)\s*$", text, flags=re.MULTILINE)
    return dict(zip(parts[1::2], parts[2::2], strict=True))


def counted(listing: str) -> dict[str, int]:
    """How many instructions of each class a disassembly holds."""
    found = re.findall(rf"\b({'|'.join(map(re.escape, CLASSES))})\b", listing)
    return dict(sorted(collections.Counter(found).items()))


def label(name: str) -> tuple[str, str]:
    """A kernel's short name and its template arguments: `void a::conv<64, true>(...)` is ("conv", "64, true")."""
    found = re.match(r"(?:void )?(?:[\w(]+(?: \w+\))?::)*(\w+)(?:<(.*?)>)?(?:\(|$)", name)
    if found is None:
        return name, ""
    return found[1].removesuffix("_kernel"), re.sub(r"\((?:int|bool|unsigned int)\)|\w+::", "", found[2] or "")


def demangled(symbol: str) -> str:
    """By the C++ runtime that the library links against; the symbol itself where it is no C++ name."""
    runtime = ctypes.CDLL(ctypes.util.find_library("stdc++") or "libstdc++.so.6")
    runtime.__cxa_demangle.restype = ctypes.c_void_p
    status = ctypes.c_int()
    text = runtime.__cxa_demangle(symbol.encode(), None, None, ctypes.byref(status))
    if not text or status.value:
        return symbol
    try:
        return ctypes.string_at(text).decode()
    finally:
        free = ctypes.CDLL(None).free
        free.argtypes = (ctypes.c_void_p,)
        free(text)


def _tool(name: str, *arguments: str) -> str:
    spec = importlib.util.find_spec("triton")
    places = (spec.submodule_search_locations or []) if spec else []
    tools = [Path(place) / "backends" / "nvidia" / "bin" / name for place in places]
    tool = next((tool for tool in tools if tool.exists()), None)
    if tool is None:
        raise RuntimeError(f"{name} comes with Triton, which is not installed; `pip install inception-fast[triton]`")
    done = subprocess.run([str(tool), *arguments], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{name} failed: {done.stderr.strip()[:200]}")
    return done.stdout
