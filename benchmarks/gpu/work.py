"""One job of the measuring queue: `python work.py NAME RESULT` writes {"status", "rows" or "note", ...} to RESULT.

A long job writes what it has after each part, as failed, so that its rows outlive its end.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from store import FAILED, OK, UNAVAILABLE

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
PACKAGE = ROOT / "build" / "gpu" / "package"
VERSIONS = ("torch", "triton", "jax", "jaxlib", "timm", "numpy", "nvidia-cudnn-cu13", "nvidia-cublas")
METRICS = (
    "gpu__time_duration.sum",
    "l1tex__t_sector_hit_rate.pct",
    "lts__t_sector_hit_rate.pct",
    "dram__bytes_read.sum",
    "dram__bytes_write.sum",
    "sm__pipe_tensor_cycles_active.avg.pct_of_peak_sustained_active",
)
# The project's own settings name plugins that the machine may lack. -P: the checkout's inception_fast, which has no
# kernels in it, must not come before the linked package.
PYTEST = [
    sys.executable,
    "-P",
    "-m",
    "pytest",
    "-q",
    "-c",
    "benchmarks/gpu/pytest.ini",
    "--rootdir",
    ".",
    "-p",
    "no:cacheprovider",
]
HOPPER_TESTS = "hopper_device"
SANITIZED = ("test_conv.py", "test_pair.py", "test_pool.py", "test_norm.py")

# The tests ask torch for deterministic algorithms, for which cuBLAS wants this.
DETERMINISTIC = {"CUBLAS_WORKSPACE_CONFIG": ":4096:8"}

Result = dict[str, Any]
Report = Callable[[Sequence[dict[str, Any]]], None]


def ran(command: Sequence[str], **environment: str) -> Result:
    """ok, or failed with the end of what the command printed; unavailable where there is no such command."""
    if shutil.which(command[0]) is None:
        return {"status": UNAVAILABLE, "note": f"no {command[0]} here"}
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env={**os.environ, **environment})
    note = (done.stdout + done.stderr)[-2000:]
    return {
        "status": FAILED if done.returncode else OK,
        "note": note.strip().splitlines()[-1] if note.strip() else "",
    } | ({"log": note} if done.returncode else {})


def build() -> Result:
    """The native module where the checkout has it, and the package as links: nothing is installed or fetched."""
    cmake = importlib.util.find_spec("pybind11")
    if cmake is None or cmake.origin is None:
        return {"status": FAILED, "note": "pybind11 is not installed"}
    where = Path(cmake.origin).parent / "share" / "cmake" / "pybind11"
    folder = ROOT / "build" / "gpu" / "cmake"
    options = [f"-Dpybind11_DIR={where}", f"-DCMAKE_INSTALL_PREFIX={ROOT}", f"-DPython_EXECUTABLE={sys.executable}"]
    for step in (
        ["cmake", "-S", ".", "-B", str(folder), *options],
        ["cmake", "--build", str(folder), "--parallel"],
        ["cmake", "--install", str(folder)],
    ):
        result = ran(step)
        if result["status"] != OK:
            return result
    link_package(PACKAGE / "inception_fast")
    built = (ROOT / "kernels" / "cuda" / "_hopper.so").exists()
    return {"status": OK, "note": "with the CUDA kernels" if built else "without the CUDA kernels: no nvcc"}


def link_package(package: Path) -> None:
    """The package as an installation has it: kernels/ inside of inception_fast/."""
    package.mkdir(parents=True, exist_ok=True)
    wanted = {child.name: child for child in (ROOT / "inception_fast").iterdir() if child.name != "__pycache__"}
    wanted["kernels"] = ROOT / "kernels"
    for stale in package.iterdir():
        stale.unlink()
    for name, target in wanted.items():
        (package / name).symlink_to(target)


def machine() -> Result:
    """GPU, driver, clocks, versions, commit."""
    if shutil.which("nvidia-smi") is None:
        return {"status": FAILED, "note": "no nvidia-smi here"}
    fields = "name,driver_version,clocks.sm,clocks.max.sm,clocks.mem,power.limit,memory.total,temperature.gpu"
    done = subprocess.run(
        ["nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader"], capture_output=True, text=True
    )
    if done.returncode or not done.stdout.strip():
        return {"status": FAILED, "note": (done.stdout + done.stderr).strip()[-400:]}
    values = [value.strip() for value in done.stdout.splitlines()[0].split(",")]
    commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True).stdout.strip()
    versions = {}
    for name in VERSIONS:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    nvcc = subprocess.run(["nvcc", "--version"], capture_output=True, text=True) if shutil.which("nvcc") else None
    release = re.search(r"release (\S+),", nvcc.stdout) if nvcc else None
    about = dict(zip(fields.split(","), values, strict=True))
    about |= {"python": platform.python_version(), "versions": versions, "commit": commit or None}
    return {"status": OK, "machine": about | {"nvcc": release[1] if release else None}}


def exact(name: str) -> Result:
    """The tests that the interpreter runs elsewhere, compiled and on the device."""
    why = no_hopper() if name == HOPPER_TESTS else ""
    if why:
        return {"status": UNAVAILABLE, "note": why}
    return ran([*PYTEST, f"tests/interpreted/test_{name}.py"], **DETERMINISTIC)


def sanitizer(tool: str) -> Result:
    """The same tests under one of compute-sanitizer's tools, each allocation on its own."""
    names = (*SANITIZED, *(() if no_hopper() else (f"test_{HOPPER_TESTS}.py",)))
    files = [f"tests/interpreted/{name}" for name in names]
    command = ["compute-sanitizer", "--tool", tool, "--error-exitcode", "9", *PYTEST, "-x", *files]
    return ran(command, PYTORCH_NO_CUDA_MEMORY_CACHING="1", **DETERMINISTIC)


def no_hopper() -> str:
    """Why the CUDA kernels cannot run here, by what is built and what the driver says; empty when they can."""
    from inception_fast.kernels import cuda

    return cuda.missing() or cuda.driver.refusal(cuda.driver.capabilities())


def hopper(batch: str, dtype: str, *, report: Report) -> Result:
    """Every cut of every layer beside cuDNN and Triton."""
    why = no_hopper()
    if why:
        return {"status": UNAVAILABLE, "note": why}
    from hopper import layer_rows

    return timed(layer_rows(int(batch), dtype), report)


def probe(name: str) -> Result:
    """What the design of the CUDA kernels stands on."""
    why = no_hopper()
    if why:
        return {"status": UNAVAILABLE, "note": why}
    from hopper import probe_rows

    return {"status": OK, "rows": list(probe_rows(ROOT / "build" / "gpu" / name))}


def layers(batch: str, dtype: str, *, report: Report) -> Result:
    from measure import layer_rows

    return timed(layer_rows(int(batch), dtype), report)


def network(model: str, batch: str, dtype: str, *, report: Report) -> Result:
    from networks import network_rows

    return timed(network_rows(model, int(batch), dtype), report)


def training(dtype: str, *, report: Report) -> Result:
    from training_layers import training_rows

    return timed(training_rows(dtype), report)


def tune(layer: str, dtype: str, *, report: Report) -> Result:
    from measure import tuned_rows

    return timed(tuned_rows(layer, dtype), report)


def timed(parts: Iterator[list[dict[str, Any]]], report: Report) -> Result:
    """The last of the parts, each of which is all rows so far. Failed where no row of ours is right."""
    rows: list[dict[str, Any]] = []
    for rows in parts:
        report(rows)
    wrong = [row for row in rows if row.get("runtime") == "ours" and row.get("status") != OK]
    if wrong or not rows:
        return {"status": FAILED, "rows": rows, "note": f"ours: {wrong[0].get('note', 'wrong') if wrong else 'no row'}"}
    return {"status": OK, "rows": rows}


def counters(pair: str, form: str) -> Result:
    """What Nsight Compute counts for one call of a pair, every kernel a row; what this GPU has no counter for is left
    out and named.
    """
    if shutil.which("ncu") is None:
        return {"status": UNAVAILABLE, "note": "no ncu here"}
    once = [sys.executable, str(HERE / "work.py"), f"once/{pair}/{form}", os.devnull]
    metrics, absent = list(METRICS), []
    while True:
        command = ["ncu", "--csv", "--metrics", ",".join(metrics), "--profile-from-start", "off", *once]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        said = done.stdout + done.stderr
        unknown = unknown_metrics(said, metrics)
        if not unknown or len(unknown) == len(metrics):
            break
        metrics, absent = [m for m in metrics if m not in unknown], absent + unknown
    if "ERR_NVGPUCTRPERM" in said:
        return {"status": UNAVAILABLE, "note": "this user may not read the GPU's counters (ERR_NVGPUCTRPERM)"}
    rows = counted(done.stdout)
    if done.returncode or not rows:
        return {"status": FAILED, "note": said[-2000:]}
    note = f"no counter here for {', '.join(absent)}" if absent else ""
    return {"status": OK, "note": note, "rows": [{"pair": pair, "form": form, **row} for row in rows]}


def unknown_metrics(said: str, metrics: Sequence[str]) -> list[str]:
    """Those that Nsight Compute says it does not know."""
    lines = [line for line in said.splitlines() if "Failed to find metric" in line]
    return [metric for metric in metrics if any(metric in line for line in lines)]


def counted(text: str) -> list[dict[str, Any]]:
    """Nsight Compute's CSV as a row a kernel."""
    import csv

    lines = [line for line in text.splitlines() if line.startswith('"')]
    kernels: dict[str, dict[str, Any]] = {}
    for line in csv.DictReader(lines):
        row = kernels.setdefault(line["ID"], {"kernel": line["Kernel Name"]})
        row[line["Metric Name"]] = f"{line['Metric Value']} {line['Metric Unit']}".strip()
    return list(kernels.values())


def once(pair: str, form: str) -> Result:
    from measure import pair_once

    pair_once(pair, form)
    return {"status": OK}


WORK: dict[str, Callable[..., Result]] = {
    f.__name__: f
    for f in (build, machine, exact, sanitizer, hopper, probe, layers, network, training, tune, counters, once)
}
IN_PARTS = (hopper, layers, network, training, tune)


def main(argv: Sequence[str]) -> int:
    name, target = argv
    kind, *arguments = name.split("/")
    begin, work = time.monotonic(), WORK[kind]

    def write(result: Result) -> None:
        result = {**result, "seconds": round(time.monotonic() - begin, 1)}
        beside = Path(f"{target}.new")
        beside.write_text(json.dumps(result, allow_nan=False))
        beside.replace(target)

    def report(rows: Sequence[dict[str, Any]]) -> None:
        write({"status": FAILED, "rows": list(rows), "note": "ended before it was done"})

    result = work(*arguments, report=report) if work in IN_PARTS else work(*arguments)
    if target != os.devnull:
        write(result)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
