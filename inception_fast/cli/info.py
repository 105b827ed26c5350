"""What this machine can run, and why not the rest."""

from __future__ import annotations

import argparse
import os
import platform
from collections.abc import Callable
from typing import Any

from .common import OK, add_json, one_line, print_json

TIERS = ("generic", "avx2", "avx512", "avx512_bf16", "amx_bf16")


def add(parser: argparse.ArgumentParser) -> None:
    add_json(parser)


def run(args: argparse.Namespace) -> int:
    """Prints the report; it works, and says what is wrong, where parts of the package are broken."""
    report = collect()
    if args.json:
        print_json(report)
    else:
        _show(report)
    return OK


def collect() -> dict[str, Any]:
    """The report as plain data: package, python, torch, machine, backends, isa, peers."""
    import torch

    from .. import __version__
    from ..measure import machine

    return {
        "package": {"version": __version__, "commit": machine.commit()},
        "python": platform.python_version(),
        "torch": {
            "version": torch.__version__,
            "threads": torch.get_num_threads(),
            "capability": torch.backends.cpu.get_cpu_capability(),
        },
        "machine": {
            "system": platform.platform(),
            "cpu": machine.cpu_model(),
            "cores": machine.cores(),
            "memory_gb": machine.memory_gb(),
        },
        "backends": _probe(_backends),
        "isa": _probe(_isa),
        "peers": _probe(_peers),
    }


def _probe(part: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """A report is wanted most where something is broken, so a part that fails is reported instead of ending it."""
    try:
        return part()
    except Exception as error:
        return {"error": f"{type(error).__name__}: {one_line(error)}"}


def _backends() -> dict[str, Any]:
    from .. import Available, backend_status

    return {
        name: {"available": True, "detail": status.detail}
        if isinstance(status, Available)
        else {"available": False, "detail": status.reason}
        for name, status in backend_status().items()
    }


def _isa() -> dict[str, Any]:
    from ..kernels import cpu

    runnable = cpu.tiers()
    return {
        "runs": list(runnable),
        "default": cpu.default_tier(),
        "missing": {t: "this processor or this build lacks it" for t in TIERS if t not in runnable},
        "INCEPTION_FAST_ISA": os.environ.get("INCEPTION_FAST_ISA"),
    }


def _peers() -> dict[str, Any]:
    from ..measure.machine import version
    from ..measure.peers import RUNTIMES

    found = {}
    for name, runtime in RUNTIMES.items():
        reasons = runtime.reasons("float32")
        found[name] = {"available": not reasons, "version": version(runtime.package), "reasons": reasons}
    return found


def _show(report: dict[str, Any]) -> None:
    package, machine, torch = report["package"], report["machine"], report["torch"]
    lines = [
        f"inception-fast {package['version']}" + (f", commit {package['commit']}" if package["commit"] else ""),
        f"Python {report['python']}, torch {torch['version']}, {torch['threads']} threads, {torch['capability']}",
        f"{machine['cpu']}, {machine['cores']} cores, {machine['memory_gb']} GiB, {machine['system']}",
        "backends",
        *_backend_lines(report["backends"]),
        "native CPU kernels",
        *_isa_lines(report["isa"]),
        "peers for bench",
        *_peer_lines(report["peers"]),
    ]
    print("\n".join(lines))


def _backend_lines(part: dict[str, Any]) -> list[str]:
    if "error" in part:
        return [f"  broken: {part['error']}"]
    return [f"  {name:12} {'runs: ' if s['available'] else 'does not run: '}{s['detail']}" for name, s in part.items()]


def _isa_lines(part: dict[str, Any]) -> list[str]:
    if "error" in part:
        return [f"  broken: {part['error']}"]
    lines = [f"  {tier:12} runs{' (chosen)' if tier == part['default'] else ''}" for tier in part["runs"]]
    return lines + [f"  {tier:12} does not run: {reason}" for tier, reason in part["missing"].items()]


def _peer_lines(part: dict[str, Any]) -> list[str]:
    if "error" in part:
        return [f"  broken: {part['error']}"]
    lines = []
    for name, peer in part.items():
        state = f"{peer['version']}" if peer["available"] else f"does not run: {'; '.join(peer['reasons'])}"
        lines.append(f"  {name:12} {state}")
    return lines
