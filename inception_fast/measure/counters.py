"""Cache misses by the processor's own counters, through perf, where the machine lets them be read."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

from .cache import Layer, Misses

EVENTS = ("L1-dcache-loads", "L1-dcache-load-misses", "LLC-load-misses")
REPEATS = (11, 111)  # calls of two runs; what lies between them is a hundred calls in the steady state


def parse_perf(text: str) -> dict[str, float]:
    """Counts by event from `perf stat -x,`. Raises RuntimeError naming an event that was not counted, and why."""
    found = {}
    for line in text.splitlines():
        fields = line.split(",")
        name = next((event for event in EVENTS if len(fields) > 2 and fields[2].split(":")[0] == event), None)
        if name is None:
            continue
        if not fields[0].replace(".", "", 1).isdigit():
            raise RuntimeError(f"perf says {fields[0].strip() or 'nothing'} of {name}")
        found[name] = float(fields[0])
    missing = [event for event in EVENTS if event not in found]
    if missing:
        said = " ".join(text.split())[:200]
        raise RuntimeError(f"perf counted no {', '.join(missing)}" + (f": {said}" if said else ""))
    return found


def count(command: list[str]) -> dict[str, float]:
    """The events of one run. Raises RuntimeError where perf is absent, forbidden, or has no such counters here."""
    perf = shutil.which("perf")
    if perf is None:
        raise RuntimeError("perf is not installed; install the system's package linux-perf or linux-tools")
    done = subprocess.run([perf, "stat", "-x,", "-e", ",".join(EVENTS), *command], capture_output=True, text=True)
    if done.returncode != 0:
        raise RuntimeError(f"perf stat {command[0]}: {' '.join(done.stderr.split())[:300]}")
    return parse_perf(done.stderr)


def measure(driver: Path, layer: Layer, tier: str = "avx2") -> Misses:
    """Loads of a call and those that miss, from the difference of two runs of the native driver."""
    few, many = (count([str(driver), "layer", f"tier={tier}", f"repeats={r}", *layer.arguments()]) for r in REPEATS)
    calls = REPEATS[1] - REPEATS[0]
    loads, l1, last = (max(0.0, many[event] - few[event]) / calls for event in EVENTS)
    return Misses(loads, l1, last)
