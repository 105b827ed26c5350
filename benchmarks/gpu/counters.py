"""What a GPU's own counters say of a kernel, by Nsight Compute."""

from __future__ import annotations

import csv
import os
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from commands import LOG, Result, spoken
from store import FAILED, OK, UNAVAILABLE

HERE = Path(__file__).resolve().parent
METRICS = (
    "gpu__time_duration.sum",
    "l1tex__t_sector_hit_rate.pct",
    "lts__t_sector_hit_rate.pct",
    "dram__bytes_read.sum",
    "dram__bytes_write.sum",
    "sm__pipe_tensor_cycles_active.avg.pct_of_peak_sustained_active",
)


def metrics_of(job: str, about: dict[str, Any]) -> Result:
    """What Nsight Compute counts while a job of the queue is profiled, every kernel a row, each with `about`; what this
    GPU has no counter for is left out and named.
    """
    if shutil.which("ncu") is None:
        return {"status": UNAVAILABLE, "note": "no ncu here"}
    once = [sys.executable, str(HERE / "work.py"), job, os.devnull]
    metrics, absent = list(METRICS), []
    while True:
        command = ["ncu", "--csv", "--metrics", ",".join(metrics), "--profile-from-start", "off", *once]
        code, said = spoken(command)
        unknown = unknown_metrics(said, metrics)
        if not unknown or len(unknown) == len(metrics):
            break
        metrics, absent = [m for m in metrics if m not in unknown], absent + unknown
    if "ERR_NVGPUCTRPERM" in said:
        return {"status": UNAVAILABLE, "note": "this user may not read the GPU's counters (ERR_NVGPUCTRPERM)"}
    rows = counted(said)
    if code or not rows:
        return {"status": FAILED, "note": said[-LOG:]}
    note = f"no counter here for {', '.join(absent)}" if absent else ""
    return {"status": OK, "note": note, "rows": [{**about, **row} for row in rows]}


def unknown_metrics(said: str, metrics: Sequence[str]) -> list[str]:
    """Those that Nsight Compute says it does not know."""
    lines = [line for line in said.splitlines() if "Failed to find metric" in line]
    return [metric for metric in metrics if any(metric in line for line in lines)]


def counted(text: str) -> list[dict[str, Any]]:
    """Nsight Compute's CSV as a row a kernel."""
    lines = [line for line in text.splitlines() if line.startswith('"')]
    kernels: dict[str, dict[str, Any]] = {}
    for line in csv.DictReader(lines):
        row = kernels.setdefault(line["ID"], {"kernel": line["Kernel Name"]})
        row[line["Metric Name"]] = f"{line['Metric Value']} {line['Metric Unit']}".strip()
    return list(kernels.values())
