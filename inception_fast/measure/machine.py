"""Where a number was measured: machine, versions, commit. Every figure that is kept carries this beside it."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import re
import shlex
import subprocess
from collections.abc import Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

PACKAGES = ("torch", "torchvision", "timm", "onnxruntime", "openvino", "tensorflow", "numpy", "pillow")


def version(package: str) -> str | None:
    """The installed version of a distribution, read from its metadata without importing it; None when it is absent."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def cpu_model(info: Path = Path("/proc/cpuinfo")) -> str:
    """The processor's own name, or the architecture where the system does not tell it."""
    if info.exists():
        found = re.search(r"^model name\s*:\s*(.+)$", info.read_text(errors="replace"), re.MULTILINE)
        if found:
            return found.group(1).strip()
    return platform.processor() or platform.machine()


def caches(folder: Path = Path("/sys/devices/system/cpu/cpu0/cache")) -> dict[str, int]:
    """Bytes of the data caches that one core sees, {"L1": ..., "L2": ..., "L3": ...}; empty where nobody tells them."""
    found = {}
    for index in sorted(folder.glob("index*")):
        try:
            kind, level, size = ((index / name).read_text().strip() for name in ("type", "level", "size"))
        except OSError:
            continue
        count = re.fullmatch(r"(\d+)([KMG]?)", size)
        if kind != "Instruction" and count:
            found[f"L{level}"] = int(count.group(1)) << {"": 0, "K": 10, "M": 20, "G": 30}[count.group(2)]
    return found


def gpu_versions(module: Path = Path("/proc/driver/nvidia/version")) -> dict[str, str | None]:
    """What a GPU's times depend on beside it: the driver, CUDA as torch has it, Triton; None for what is absent."""
    import torch

    text = module.read_text(errors="replace") if module.exists() else ""
    found = re.search(r"Kernel Module.*?\s(\d+\.[\d.]+)\s", text)
    return {"driver": found[1] if found else None, "cuda": torch.version.cuda, "triton": version("triton")}


def cores() -> int:
    """How many logical processors this process may use: containers and taskset see fewer than the machine has."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def memory_gb() -> float | None:
    """Physical memory in GiB, where the system tells it."""
    try:
        return round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1)
    except (AttributeError, ValueError, OSError):
        return None


def commit(folder: Path | None = None) -> str | None:
    """The git commit of the checkout this package runs from, with "-dirty" on local changes; None when installed."""
    folder = folder or Path(__file__).resolve().parent
    if _git(folder, "ls-files", "--error-unmatch", "machine.py") is None:
        return None
    head = _git(folder, "rev-parse", "HEAD")
    if head is None:
        return None
    changes = _git(folder, "status", "--porcelain", "--untracked-files=no")
    return head.strip() + ("-dirty" if changes else "")


def _git(folder: Path, *arguments: str) -> str | None:
    command = ["git", "-C", str(folder), *arguments]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout if done.returncode == 0 else None


def provenance(threads: int, arguments: Sequence[str]) -> dict[str, Any]:
    """What a result file says of its origin; `arguments` are those after `inception-fast`."""
    import torch

    from .. import __version__, backend_status

    return {
        "machine": f"{cpu_model()}, {cores()} cores",
        "cpu": cpu_model(),
        "cores": cores(),
        "memory_gb": memory_gb(),
        "caches": caches(),
        "load": round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None,
        "system": platform.platform(),
        "threads": threads,
        "capability": torch.backends.cpu.get_cpu_capability(),
        "tier": getattr(backend_status()["cpu"], "detail", None),
        "python": platform.python_version(),
        "versions": {"inception_fast": __version__} | {p: v for p in PACKAGES if (v := version(p))},
        "commit": commit(),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "command": shlex.join(["inception-fast", *arguments]),
    }
