"""What a result was measured on and with: the GPU, the versions, the sources."""

from __future__ import annotations

import datetime
import hashlib
import importlib.metadata
import json
import os
import platform
import re
import subprocess
from collections.abc import Iterable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
VERSIONS = ("torch", "triton", "jax", "jaxlib", "timm", "numpy", "nvidia-cudnn-cu13", "nvidia-cublas")
SOURCES = (".py", ".cpp", ".h", ".cu", ".cuh", ".json")
NATIVE = (".cpp", ".h", ".cu", ".cuh")


def machine() -> tuple[dict[str, Any], str]:
    """GPU, driver, clocks, versions, commit, and a digest of the sources, which a copy without history has as well; and
    why there is no GPU.
    """
    about, note = smi("name,driver_version,clocks.sm,clocks.max.sm,clocks.mem,power.limit,memory.total,temperature.gpu")
    about |= on_device()
    if "name" not in about:
        return {}, f"no GPU: {note}; {about.get('problem', '')}"
    versions = {}
    for name in VERSIONS:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    about |= {"python": platform.python_version(), "versions": versions, "cores": os.cpu_count()}
    about["date"] = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
    about |= {"commit": printed("git", "rev-parse", "HEAD") or None, "sources": sources()}
    return about | {"nvcc": nvcc()}, ""


def nvcc() -> str | None:
    """The release of CUDA's compiler; None where there is none."""
    release = re.search(r"release (\S+),", printed("nvcc", "--version"))
    return release[1] if release else None


def smi(fields: str) -> tuple[dict[str, Any], str]:
    """What nvidia-smi says of the first GPU, or nothing and why."""
    said = printed("nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader")
    values = [value.strip() for value in said.splitlines()[0].split(",")] if said else []
    if len(values) != len(fields.split(",")):
        return {}, f"nvidia-smi says {said[:200]!r}"
    return dict(zip(fields.split(","), values, strict=True)), ""


def on_device() -> dict[str, Any]:
    """What torch says of the GPU."""
    import torch

    try:
        major, minor = torch.cuda.get_device_capability()
        found = {"name": torch.cuda.get_device_name(), "capability": f"{major}.{minor}", "cuda": torch.version.cuda}
        return found | {"cudnn": torch.backends.cudnn.version()}
    except (RuntimeError, AssertionError) as problem:
        return {"problem": str(problem)[:400]}


def printed(*command: str) -> str:
    """What a command prints; nothing where it is absent or fails."""
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return "" if done.returncode else done.stdout.strip()


def sources() -> str:
    """A digest of every source of the kernels, the package and this queue."""
    folders = ("kernels", "inception_fast", "benchmarks/gpu")
    return digest(f for folder in folders for f in (ROOT / folder).rglob("*") if f.suffix in SOURCES)


def native_sources() -> str:
    """A digest of what is compiled, and of how."""
    compiled = (f for f in (ROOT / "kernels").rglob("*") if f.suffix in NATIVE)
    return digest([*compiled, *(ROOT / folder / "CMakeLists.txt" for folder in (".", "kernels/cuda"))])


def digest(files: Iterable[Path]) -> str:
    found = hashlib.sha256()
    for file in sorted(files):
        found.update(f"{file.relative_to(ROOT)} ".encode() + file.read_bytes())
    return found.hexdigest()[:16]


def written(file: Path, document: dict[str, Any]) -> None:
    """Beside the file, then renamed."""
    file.parent.mkdir(parents=True, exist_ok=True)
    new = file.with_name(f".{file.name}.{os.getpid()}")
    new.write_text(json.dumps(document))
    new.replace(file)
