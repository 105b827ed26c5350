"""Compiles kernels for a GPU that is not here, and reads registers, spills, shared memory and instructions.

Triton brings ptxas, cuobjdump and nvdisasm; neither a driver nor a GPU is asked for.
"""

from __future__ import annotations

import collections
import re
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.tools.tensor_descriptor import TensorDescriptor

from .launch import Launch, interpreting

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
TARGETS = {"sm_80": 80, "sm_90a": 90, "sm_100a": 100}
# What a tensor core is asked for, by architecture.
TENSOR_CORE = {"sm_80": "HMMA", "sm_90a": "HGMMA", "sm_100a": "tcgen05"}
# Classes of instructions as the disassembler spells them: products, loads past the registers, spills.
CLASSES = {
    "HMMA": "HMMA",
    "HGMMA": "HGMMA",
    "UTCHMMA": "tcgen05",
    "UTCQMMA": "tcgen05",
    "FFMA": "FFMA",
    "FFMA2": "FFMA",
}
CLASSES |= {name: name for name in ("UTMALDG", "UTMASTG", "LDGSTS", "LDL", "STL")}
TYPES = {
    torch.float32: "fp32",
    torch.float16: "fp16",
    torch.bfloat16: "bf16",
    torch.uint8: "u8",
    torch.int64: "i64",
}


@dataclass(frozen=True)
class Compiled:
    """What one kernel became. `spill_bytes` are those of a thread; `instructions` counts those worth a look."""

    arch: str
    registers: int
    spill_bytes: int
    shared_bytes: int
    instructions: dict[str, int]

    @property
    def uses_tensor_cores(self) -> bool:
        return TENSOR_CORE[self.arch] in self.instructions


def compile_launch(launch: Launch, arch: str) -> Compiled:
    """The launch's kernel for "sm_80", "sm_90a" or "sm_100a", specialised as its arguments would be.

    Raises ValueError for another architecture, RuntimeError where the compiler or its tools fail.
    """
    made = built(launch, arch)
    return inspect(made.asm["cubin"], arch, made.metadata.shared)


def built(launch: Launch, arch: str) -> Any:
    """What Triton makes of it, `asm["ptx"]` among the rest."""
    if arch not in TARGETS:
        raise ValueError(f"architecture {arch!r}; allowed: {', '.join(TARGETS)}")
    if interpreting():
        raise RuntimeError("kernels are interpreted in this process; allowed: without TRITON_INTERPRET")
    types, constants, attributes = describe(launch)
    source = ASTSource(fn=launch.kernel, signature=types, constexprs=constants, attrs=attributes)
    target = GPUTarget("cuda", TARGETS[arch], 32)
    return triton.compile(source, target=target, options=dict(launch.options))


def complaint(found: Compiled, tensor_cores: bool) -> str:
    """What is wrong with a compiled kernel that should, or should not, use tensor cores; empty when nothing is."""
    if found.spill_bytes:
        return f"{found.spill_bytes} bytes of registers spill"
    if tensor_cores:
        return "" if found.uses_tensor_cores else f"no {TENSOR_CORE[found.arch]} instruction"
    # Small products of later architectures are those of an earlier one.
    rounding = [name for name in TENSOR_CORE.values() if name in found.instructions]
    return f"{rounding[0]} instructions would round float32" if rounding else ""


def describe(launch: Launch) -> tuple[dict[str, str], dict[tuple[int], Any], dict[tuple[int], Any]]:
    """Types, constants and alignments of the kernel's arguments, as Triton would find them at a launch."""
    types: dict[str, str] = {}
    constants: dict[tuple[int], Any] = {}
    attributes: dict[tuple[int], Any] = {}
    for i, parameter in enumerate(launch.kernel.params):
        value = launch.arguments[parameter.name]
        if parameter.is_constexpr or (isinstance(value, int) and not isinstance(value, bool) and value == 1):
            types[parameter.name], constants[(i,)] = "constexpr", value
            continue
        types[parameter.name] = type_of(value)
        if _whole_16(value):
            attributes[(i,)] = [["tt.divisibility", 16]]
    return types, constants, attributes


def type_of(value: Any) -> str:
    """Triton's name for the type of an argument."""
    if isinstance(value, TensorDescriptor):
        return f"tensordesc<{TYPES[value.base.dtype]}{list(value.block_shape)}>"
    if isinstance(value, Tensor):
        return f"*{TYPES[value.dtype]}"
    if isinstance(value, float):
        return "fp32"
    return "i32" if -(1 << 31) <= value < 1 << 31 else "i64"


def _whole_16(value: Any) -> bool:
    if isinstance(value, Tensor):
        return value.data_ptr() % 16 == 0
    return isinstance(value, int) and value % 16 == 0


def inspect(cubin: bytes, arch: str, shared: int) -> Compiled:
    """Reads a cubin. A spill is a store to local memory; a stack of its own would be one too."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "kernel.cubin"
        file.write_bytes(cubin)
        usage = _tool("cuobjdump", "-res-usage", str(file))
        listing = _tool("nvdisasm", "-c", str(file))
    found = re.search(r"REG:(\d+) STACK:(\d+)", usage)
    if found is None:
        raise RuntimeError(f"cuobjdump reports no registers: {usage.strip()[:200]}")
    return Compiled(arch, int(found[1]), int(found[2]), shared, instructions(listing))


def instructions(listing: str) -> dict[str, int]:
    """How many instructions of each class a disassembly holds."""
    found = re.findall(rf"\b({'|'.join(CLASSES)})\b", listing)
    return dict(sorted(collections.Counter(CLASSES[name] for name in found).items()))


def _tool(name: str, *arguments: str) -> str:
    done = subprocess.run([str(TOOLS / name), *arguments], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{name} failed: {done.stderr.strip()[:200]}")
    return done.stdout
