"""A network of ours call after call for some seconds: its time, and the clocks and power that the GPU is at then."""

from __future__ import annotations

import statistics
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from networks import checked_calls, network_calls
from turns import alone

SECONDS = 3.0
PERIOD_MS = 50  # of the samples; the driver's own are not much finer
FIELDS = ("clocks.sm", "power.draw", "clocks_event_reasons.active")


def steady_rows(model: str, n: int, dtype: str) -> Iterator[list[dict[str, Any]]]:
    """One row, of ours as it chooses."""
    makers, truth = network_calls(model, n, dtype)
    about = {"model": model, "batch": n, "dtype": dtype}
    rows, calls = checked_calls({"ours": makers["ours"]}, about, truth, dtype)
    for name, call in calls.items():
        with alone(), torch.no_grad():
            rows[name] |= steady(call)
    yield list(rows.values())


def steady(call: Callable[[], Any], seconds: float = SECONDS) -> dict[str, Any]:
    """Milliseconds a call of back-to-back calls in the last half of `seconds`, and what was sampled in that half."""
    calls = 0
    with sampled() as samples:
        begin = half = time.perf_counter()
        while (now := time.perf_counter()) - begin < seconds:
            if half == begin and now - begin >= seconds / 2:
                half, calls = now, 0
                samples.clear()
            call()
            torch.cuda.synchronize()
            calls += 1
        each = (time.perf_counter() - half) / calls
    return {"call_ms": each * 1e3, **told(samples)}


@contextmanager
def sampled() -> Iterator[list[list[str]]]:
    """Inside, the values of `FIELDS` again and again; none where there is no nvidia-smi."""
    command = ["nvidia-smi", f"--query-gpu={','.join(FIELDS)}", "--format=csv,noheader,nounits", f"-lms={PERIOD_MS}"]
    found: list[list[str]] = []
    try:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    except OSError:
        yield found
        return

    def read() -> None:
        assert process.stdout is not None
        for line in process.stdout:
            found.append([value.strip() for value in line.split(",")])

    reader = threading.Thread(target=read, daemon=True)
    reader.start()
    try:
        yield found
    finally:
        process.kill()
        process.wait()
        reader.join()


def told(samples: list[list[str]]) -> dict[str, Any]:
    """Medians of clock and power, as far as nvidia-smi knows them, and every reason for a clock below the highest that
    was given.
    """
    whole = [sample for sample in samples if len(sample) == len(FIELDS)]
    clocks, power = ([float(sample[i]) for sample in whole if is_number(sample[i])] for i in (0, 1))
    found: dict[str, Any] = {"samples": len(whole)}
    if clocks:
        found |= {"clock_mhz": statistics.median(clocks), "least_clock_mhz": min(clocks)}
    if power:
        found["power_w"] = statistics.median(power)
    return found | ({"reasons": sorted({sample[2] for sample in whole})} if whole else {})


def is_number(text: str) -> bool:
    """Whether it is a figure, and not [N/A] or another word for none."""
    return text.replace(".", "", 1).isdecimal()
